"""An adapter that acts on the text: rows read are its own, the sink's, passages' and a turn's are the base's."""

from copy import deepcopy
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from longstride.engine import sequence as sequence_module
from longstride.engine.adapter import load_adapter
from longstride.engine.context import Context, Placement
from longstride.engine.model import CACHE
from longstride.engine.sequence import Sequence
from longstride.errors import ModelError
from tests.engine.test_exactness import LIMIT, PROMPT, REFRESH, RESERVED, explore
from tests.engine.test_windows import SINK, Windowed, window
from tests.lora import own_file, save_adapter, tiny_loaded
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A tiny llama, its adapter, and peft's model with that merged into its weights."""
    folder, model = tmp_path_factory.mktemp("adapter"), tiny_loaded("llama")
    plain = save_adapter(folder, own=own_file("text", marks=([], []), window="anchors"))
    return SimpleNamespace(model=model, adapter=load_adapter(folder, model), merged=deepcopy(plain).merge_and_unload())


@pytest.fixture(autouse=True)
def drop_early(monkeypatch):
    monkeypatch.setattr(sequence_module, "DROP", 4)


@torch.inference_mode()
def by_runs(models, acting, ids, positions, bias):
    """Logits of all rows, each run of them that an adapter acts on (or not) by the model that has it (or not)."""
    cache, out, start = DynamicCache(), [], 0
    for acts, run in groupby(acting):
        stop = start + len(list(run))
        logits = models[acts](
            input_ids=torch.tensor([ids[start:stop]]),
            position_ids=torch.tensor([positions[start:stop]]),
            attention_mask=bias[:, :, start:stop, :stop],
            use_cache=True,
            **{CACHE: cache},
        ).logits
        out.append(logits[0])
        start = stop
    return torch.cat(out)


class Read(Windowed):
    """The windows' state machine, with an adapter that acts on the text."""

    adapted: SimpleNamespace

    def new_sequence(self, prompt):
        base, self.runner = tiny_model("llama")[0], self.adapted.model.runner

        def plain(*, input_ids, position_ids, attention_mask, use_cache):
            rows = input_ids.shape[1]
            behind = sum(map(len, self.pieces))
            before = self.boundary if self.pieces else rows
            places = [*range(before), *([-1] * behind), *range(before, rows - behind)][:rows]
            turn = rows if self.turn is None else self.turn
            acting = [SINK <= place < turn for place in places]
            models = {True: self.adapted.merged, False: base}
            return SimpleNamespace(
                logits=by_runs(models, acting, input_ids[0].tolist(), position_ids[0].tolist(), attention_mask)[None]
            )

        self.plain = plain
        context = Context(
            prompt, placement=self.placement, limit=LIMIT, reserved=RESERVED, refresh=REFRESH, window=self.new_window()
        )
        sequence = Sequence(
            self.runner, context, max_rows=LIMIT + 3 * RESERVED, store=self.store, adapter=self.adapted.adapter
        )
        assert sequence.piece_adapter == ""  # passages' rows are anybody's
        return sequence


@pytest.mark.parametrize("placement", list(Placement))
@pytest.mark.parametrize("policy", ["anchors", "anchors and recent", "added and recent"])
def test_any_sequence_of_operations_is_exact(adapted, placement, policy):
    machine = type("Machine", (Read,), {
        "kind": "llama", "placement": placement, "policy": policy, "adapted": adapted,
    })  # fmt: skip
    explore(machine, 10, 20)


def test_a_turn_decodes_with_the_base_alone(adapted):
    """Not one row of a turn is computed with the adapter, however text and turn come together in a forward."""
    context = Context(
        [1] * PROMPT, placement=Placement.BESIDE, limit=LIMIT, reserved=RESERVED, window=window("anchors")
    )
    sequence = Sequence(adapted.model.runner, context, max_rows=LIMIT, adapter=adapted.adapter)
    context.append(list(range(40)))
    context.begin_turn()
    context.append([9] * 5)
    taken = sequence.take(512)
    rows = {acts: sum(len(one.ids) for one in taken if (one.adapter is not None) == acts) for acts in (False, True)}
    assert rows == {False: SINK + 5, True: PROMPT + 40 - SINK}
    assert taken[-1].logits == 1


def test_one_that_names_no_window_is_refused(tmp_path):
    save_adapter(tmp_path, own=own_file("text", marks=([], [])))
    with pytest.raises(ModelError, match="names no window"):
        load_adapter(tmp_path, tiny_loaded("llama"))
