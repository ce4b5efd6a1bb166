"""Adapters in the engine's forward equal peft's own models, act where they say, and share forwards."""

import json
import shutil
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from longstride.engine.adapter import load_adapter, shipped_adapter
from longstride.engine.attention import Slice
from longstride.engine.cache import KVCache
from longstride.engine.context import Context, Placement
from longstride.engine.fuse import Block
from longstride.engine.pieces import MemoryPieces
from longstride.engine.sequence import Sequence
from longstride.errors import ModelError
from tests.engine.test_exactness import LIMIT, REFRESH, RESERVED, Exactness, explore, layout
from tests.lora import MARKS, TARGETS, adapted_logits, own_file, save_adapter, tiny_loaded
from tests.tiny import tiny_model

TOKENS = [262, 263]
IDS = [*range(40, 70), 262, *range(80, 90), 263, 5]
RSLORA = {"use_rslora": True}
PATTERNS = {"rank_pattern": {"layers.1.self_attn.v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A tiny llama and its adapters: two that act on the segment, one that acts everywhere; peft's models, and those
    with the adapter merged into their weights."""
    folder, model = tmp_path_factory.mktemp("adapters"), tiny_loaded("llama")
    lora = {"trainable_token_indices": TOKENS}
    plain = [
        save_adapter(folder / "one", own=own_file(), **lora),
        save_adapter(folder / "two", seed=2, own=own_file(), **lora),
        save_adapter(folder / "three", seed=3, **lora),
    ]
    merged = [deepcopy(one).merge_and_unload() for one in plain]
    loaded = [load_adapter(folder / name, model) for name in ("one", "two", "three")]
    return SimpleNamespace(model=model, folder=folder, plain=plain, merged=merged, loaded=loaded)


def causal(count):
    return list(range(count)), torch.ones(count, count, dtype=torch.bool).tril()


def whole(model, ids, adapter=None):
    (logits,) = model.runner.forward(
        [Slice(KVCache(model.runner.layout, 64), ids, range(len(ids)), 0, logits=len(ids), adapter=adapter)]
    )
    return logits


# --- as peft computes it ---


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("lora", [{}, RSLORA, {"trainable_token_indices": TOKENS}])
def test_an_adapter_everywhere_equals_pefts_model(tmp_path, kind, lora):
    untied = {"tie_word_embeddings": False}
    plain = save_adapter(tmp_path, kind, model=untied, **lora)
    model = tiny_loaded(kind, **untied)
    adapter = load_adapter(tmp_path, model)
    assert (adapter.acts, adapter.marks) == ("everywhere", ((), ()))
    expected = adapted_logits(plain, IDS, *causal(len(IDS)))
    torch.testing.assert_close(whole(model, IDS, adapter), expected, atol=1e-4, rtol=1e-4)
    with plain.disable_adapter():
        base = adapted_logits(plain, IDS, *causal(len(IDS)), boundary=len(IDS))
    assert (base - expected).abs().max() > 0.1
    torch.testing.assert_close(whole(model, IDS), base, atol=1e-4, rtol=1e-4)


def test_ranks_and_alphas_of_single_layers(tmp_path):
    plain, model = save_adapter(tmp_path, **PATTERNS), tiny_loaded("llama")
    assert len([layer for layer in model.runner.model.modules() if isinstance(layer, Block)]) == 2
    expected = adapted_logits(plain, IDS, *causal(len(IDS)))
    torch.testing.assert_close(whole(model, IDS, load_adapter(tmp_path, model)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tied_embeddings_keep_the_head_of_the_base(tmp_path, kind):
    """peft gives the head the rows of a tied embedding too. All other logits are equal, and marks are never sampled."""
    tied = {"tie_word_embeddings": True}
    lora = {"trainable_token_indices": TOKENS}
    plain = save_adapter(tmp_path, kind, own=own_file("everywhere"), model=tied, **lora)
    model = tiny_loaded(kind, **tied)
    expected = adapted_logits(plain, IDS, *causal(len(IDS)))
    ours = whole(model, IDS, load_adapter(tmp_path, model))
    torch.testing.assert_close(ours[:, :262], expected[:, :262], atol=1e-4, rtol=1e-4)
    assert (ours - expected)[:, 262:].abs().max() > 0.1
    (tmp_path / "longstride.json").unlink()
    with pytest.raises(ModelError, match="head"):  # a stranger's may well be meant to write them
        load_adapter(tmp_path, model)


# --- from the boundary on ---


def make(adapters, adapter, placement, store=None, reserved=RESERVED):
    context = Context(range(50, 56), placement=placement, limit=LIMIT, reserved=reserved, refresh=REFRESH)
    return Sequence(adapters.model.runner, context, max_rows=LIMIT + 3 * RESERVED, store=store, adapter=adapter)


def walk(sequence, runner, text=range(100, 140), tail=(7, 8)):
    """Read, turn, segment between marks, decode; logits after the last token."""
    sequence.context.append(list(text))
    sequence.run(runner)
    sequence.context.begin_turn()
    sequence.context.append([1, 2, 3])
    pieces = [[262, *range(200, 208), 263], [262, 9, 10, 263]]
    sequence.rewrite(pieces)
    sequence.run(runner)
    sequence.context.append(list(tail))
    return sequence.run(runner)


@pytest.mark.parametrize("placement", list(Placement))
def test_rows_before_the_boundary_are_the_bases_and_the_rest_is_pefts(adapters, placement):
    runner, adapter = adapters.model.runner, adapters.loaded[0]
    base, ours = make(adapters, None, placement), make(adapters, adapter, placement)
    plain_logits, logits = walk(base, runner), walk(ours, runner)
    context, boundary = ours.context, ours.context.boundary
    assert torch.equal(base.cache.read_rows(0, boundary), ours.cache.read_rows(0, boundary))
    assert not torch.equal(base.cache.read_rows(0, context.rows), ours.cache.read_rows(0, context.rows))
    rows = layout(placement, context.text, context.segment, boundary)
    expected = adapted_logits(adapters.plain[0], *rows, boundary=boundary)
    torch.testing.assert_close(logits[-1], expected[-1], atol=1e-4, rtol=1e-4)
    assert (logits - plain_logits).abs().max() > 0.1


@pytest.mark.parametrize("placement", list(Placement))
def test_without_a_segment_an_adapter_of_segments_changes_nothing(adapters, placement):
    runner = adapters.model.runner
    base, ours = make(adapters, None, placement), make(adapters, adapters.loaded[0], placement)
    walk(ours, runner)
    walk(base, runner)
    for sequence in (base, ours):
        sequence.end_turn(keep=True)
    assert torch.equal(base.run(runner), ours.run(runner))  # the tail is encoded again, as plain text
    rows = base.context.rows
    assert torch.equal(base.cache.read_rows(0, rows), ours.cache.read_rows(0, rows))


def test_one_forward_carries_rows_of_several_adapters_and_of_none(adapters):
    runner = adapters.model.runner
    one, two, three = adapters.loaded
    alone, together = [], []
    for adapter in (one, None, two, three, one):
        alone.append(walk(make(adapters, adapter, Placement.TURN), runner))
        together.append(make(adapters, adapter, Placement.TURN))
    for sequence in together:
        walk(sequence, runner)
        sequence.cache.truncate(sequence.context.boundary - 3)  # the forward takes rows before the boundary as well
    taken = [sequence.take(512) for sequence in together]
    assert [len(slices) for slices in taken] == [4] * 5  # text, two pieces, tail
    logits = iter(runner.forward([piece for slices in taken for piece in slices]))
    for slices, expected in zip(taken, alone, strict=True):
        last = [next(logits) for _ in slices][-1]
        torch.testing.assert_close(last, expected, atol=1e-5, rtol=1e-5)
    assert runner.adapted.spans == ()


def test_passages_are_kept_apart_by_adapter(adapters):
    """Rows beside the text are copied to who has the same adapter, and to nobody else."""
    runner, store = adapters.model.runner, MemoryPieces("tiny", 1 << 20)
    copied = []
    for adapter in (None, *adapters.loaded, None, *adapters.loaded):
        sequence = make(adapters, adapter, Placement.BESIDE, store)
        expected = walk(make(adapters, adapter, Placement.BESIDE), runner)
        torch.testing.assert_close(walk(sequence, runner), expected, atol=1e-5, rtol=1e-5)
        copied.append(sequence.copied)
    assert copied == [0, 0, 0, 0, 14, 14, 14, 14]


class Adapted(Exactness):
    """The state machine of the base, with an adapter, against peft."""

    adapters: SimpleNamespace
    which: int

    @property
    def boundary(self):
        """The context's own; where it lies is for the base's test to check."""
        return self.sequence.context.boundary

    @boundary.setter
    def boundary(self, _value):
        pass

    def new_sequence(self, prompt):
        adapter, merged = self.adapters.loaded[self.which], self.adapters.merged[self.which]
        base, self.runner = tiny_model(self.kind)[0], self.adapters.model.runner

        def plain(*, input_ids, position_ids, attention_mask, use_cache):
            boundary = input_ids.shape[1]
            if adapter.acts == "everywhere":
                boundary = 0
            elif self.pieces:
                boundary = self.boundary
            rows = input_ids[0].tolist(), position_ids[0].tolist(), attention_mask[0, 0] == 0
            return SimpleNamespace(logits=adapted_logits(merged, *rows, boundary, base)[None])

        self.plain = plain
        context = Context(prompt, placement=self.placement, limit=LIMIT, reserved=RESERVED, refresh=REFRESH)
        return Sequence(self.runner, context, max_rows=LIMIT + 3 * RESERVED, store=self.store, adapter=adapter)


@pytest.mark.parametrize(("placement", "which"), [*((placement, 0) for placement in Placement), (Placement.BESIDE, 2)])
def test_any_sequence_of_operations_is_exact_with_an_adapter(adapters, placement, which):
    machine = type("Machine", (Adapted,), {
        "kind": "llama", "placement": placement, "adapters": adapters, "which": which,
    })  # fmt: skip
    explore(machine, 5, 20)


# --- what it is ---


def test_the_fingerprint_names_all_that_decides_the_rows_and_no_file(adapters, tmp_path):
    one = adapters.loaded[0]
    shutil.copytree(adapters.folder / "one", tmp_path / "renamed")
    again = load_adapter(tmp_path / "renamed", adapters.model)
    assert (again.name, again.fingerprint) == ("renamed", one.fingerprint)
    assert again.marks == tuple(map(tuple, MARKS))
    seen = {one.fingerprint}
    for own in (own_file("everywhere"), own_file(marks=([263], [262]))):
        (tmp_path / "renamed" / "longstride.json").write_text(json.dumps(own))
        seen.add(load_adapter(tmp_path / "renamed", adapters.model).fingerprint)
    change_config(tmp_path / "renamed", lora_alpha=9)
    seen.add(load_adapter(tmp_path / "renamed", adapters.model).fingerprint)
    change_tensors(tmp_path / "renamed", lambda tensors: tensors[Q_UP].mul_(2))
    seen.add(load_adapter(tmp_path / "renamed", adapters.model).fingerprint)
    assert len(seen) == 5


def test_nothing_is_shipped_for_an_unknown_model():
    assert shipped_adapter("tiny", "end") is None
    assert shipped_adapter("../..", "end") is None


# --- what is refused ---

Q = "base_model.model.model.layers.0.self_attn.q_proj"
Q_UP = f"{Q}.lora_B.weight"
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def config(**changes):
    return lambda folder: change_config(folder, **changes)


def tensors(change):
    return lambda folder: change_tensors(folder, change)


def own(*args, **changes):
    return lambda folder: (folder / "longstride.json").write_text(json.dumps(own_file(*args, **changes)))


def pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


REFUSED = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "safetensors is missing"),
    "pickle": (pickled, "pickle"),
    "damaged config": (lambda folder: (folder / "adapter_config.json").write_text("{"), "could not be read"),
    "a list": (lambda folder: (folder / "adapter_config.json").write_text("[1]"), "does not hold"),
    "damaged weights": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 80), "is damaged"),
    "not finite": (tensors(lambda t: t[Q_UP].fill_(float("nan"))), "finite"),
    "other type": (config(peft_type="IA3"), "type IA3"),
    "dora": (config(use_dora=True), "use_dora"),
    "bias": (config(bias="all"), "bias"),
    "modules to save": (config(modules_to_save=["lm_head"]), "modules_to_save"),
    "changed base": (config(init_lora_weights="pissa"), "init_lora_weights"),
    "alora": (lambda f: (config(alora_invocation_tokens=[1])(f), (f / "longstride.json").unlink()), "alora_invocation"),
    "alpha": (config(lora_alpha=None), "lora_alpha"),
    "pattern": (config(alpha_pattern={"(": 1}), "alpha_pattern"),
    "unknown layer": (tensors(lambda t: t.update({f"{Q[:-6]}w_proj.lora_A.weight": t[Q_UP] + 1})), "w_proj, which is"),
    "head": (tensors(lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[Q_UP].clone()})), "lm_head"),
    "no pair": (tensors(lambda t: t.pop(Q_UP)), "one of the two factors"),
    "shape": (tensors(lambda t: t.update({Q_UP: t[Q_UP][:-1].clone()})), "does not fit"),
    "dimensions": (tensors(lambda t: t.update({Q_UP.replace("B", "A"): torch.ones(4)})), "does not fit"),
    "other tensors": (tensors(lambda t: t.update({"base_model.model.x": torch.ones(1)})), "neither"),
    "nothing": (tensors(dict.clear), "no LoRA factors"),
    "rows": (tensors(lambda t: t.update({ROWS: t[ROWS][:1].clone()})), "rows of 2 tokens"),
    "other rows": (tensors(lambda t: t.update({ROWS.replace("embed_tokens", "x"): t.pop(ROWS)})), "only those of"),
    "token ids": (config(trainable_token_indices=[262, 999]), "does not list token ids"),
    "vocabulary": (own(vocabulary="another"), "another tokenizer"),
    "format": (own(format=2), "format 2"),
    "acts": (own("sometimes"), "'sometimes'"),
    "marks": (own(marks=([262], ["x"])), "two lists of token ids"),
    "marks of another model": (own(marks=([262], [999])), "two lists of token ids"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_with_a_sentence(adapters, tmp_path, case):
    spoil, said = REFUSED[case]
    folder = tmp_path / "spoilt"
    shutil.copytree(adapters.folder / "one", folder)
    spoil(folder)
    with pytest.raises(ModelError) as caught:
        load_adapter(folder, adapters.model)
    message = str(caught.value)
    assert message.startswith(f"adapter {folder}: ")
    assert said in message
    assert "\n" not in message


def test_a_layer_that_sees_some_rows_only_cannot_be_adapted(adapters):
    """As the experts of a mixture: an adapter's rows could not be told from others."""
    product = adapters.model.runner.products["model.layers.0.self_attn.o_proj"]
    adapted = adapters.model.runner.adapted
    adapted.rows, adapted.spans = 5, [(0, 5, adapters.loaded[0])]
    try:
        with pytest.raises(ModelError, match="part of the rows"):
            product(torch.ones(4, 64))
    finally:
        adapted.spans = ()
