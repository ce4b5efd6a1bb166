"""Turns behind a text under a window policy: who answers them, and that what is trained is what a session computes."""

import random

import pytest
import torch
from torch.nn import functional

from longstride.engine.adapter import load_adapter
from longstride.engine.context import Context, Placement
from longstride.engine.model import Model
from longstride.engine.sequence import Sequence
from longstride.engine.tokenizer import Frame
from longstride.engine.verify import generate
from longstride.errors import BadInput
from longstride.tuning.layouts import Layout, Scorer, follow, last_logits, losses_of
from longstride.tuning.recipe import Recipe
from longstride.tuning.strides import Window
from longstride.tuning.trees import Sample, tree
from longstride.tuning.turns import ANSWER, NAMED, QUOTED, WHOLE, Turns
from tests.lora import tiny_loaded
from tests.tiny import ByteTokenizer, tiny_assistant_model
from tests.tuning.test_layouts import PROMPT, SHAPE, window
from tests.tuning.test_training import run

WINDOWS = [
    f"none,window={policy}"
    for policy in ("anchors:6", "anchors:6:9", "anchors-added:6", "anchors-added:6:9", "separators:9", "cascade:8")
]
FRAME = Frame(tuple(PROMPT), (7, 8), (257, 9))
ASKED = [([60, 61, 62, 7, 8], [5, 80, 81, 257]), ([70, 7, 8], [90])]
TALE = (
    "It was raining when they met Old Mary Ann by the river. She had waited there for a whole long day! "
    "Nobody else had come, and so she told Peter of it first of all. Then they went home together in the dark."
)


def asked(layout: Layout, *, kept: bool) -> Sample:
    view = layout.new_window(ByteTokenizer(), max(len(PROMPT), 4)) if kept else None
    return Sample(layout, [], ((), ()), PROMPT, view, ASKED)


def ids_of(of: Window) -> list[int]:
    return [*PROMPT, *of.text, *(target for stride in of.strides for target in stride.targets)]


def engine(model: Model, layout: Layout | None, adapter=None) -> list[float]:
    """Losses of the turns' answers as a session has them, then of the text's tokens behind the sink."""
    ids, sink = ids_of(window()), max(len(PROMPT), 4)
    view = layout.new_window(ByteTokenizer(), sink) if layout is not None else None
    context = Context(PROMPT, placement=Placement.TURN, limit=400, reserved=0, window=view)
    sequence = Sequence(model.runner, context, max_rows=400, adapter=adapter)
    text = ids[len(PROMPT) :]
    context.append(text)
    told = context.text[sink + 1 :]
    logits = last_logits(model.runner, sequence, len(told) + 1)[:-1]
    own = [loss for loss, id_ in zip(losses_of(logits, told), told, strict=True) if view is None or id_ != view.adds]
    sequence.settle()
    out = []
    for turn, answer in ASKED:
        context.begin_turn()
        context.append(turn)
        out += follow(model.runner, sequence, answer)
        sequence.end_turn(keep=False)
    return out + own


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("spelled", WINDOWS)
def test_what_is_trained_is_what_a_session_computes(tmp_path, spelled, kind):
    layout, model = Layout.parse(spelled), tiny_loaded(kind)
    one = run(tmp_path, kind, spelled, acts="text", dropout=0.0, distil=1.0, steps=2)
    one.go()
    for parameter in one.parameters.values():
        parameter.data.copy_(parameter.data.half().float())  # as it is saved
    adapter = load_adapter(tmp_path, model)
    assert (adapter.acts, adapter.window) == ("text", layout.window.partition(":")[0])
    grown = tree(window(), asked(layout, kept=True), SHAPE)
    with torch.no_grad():
        logits, base = one.losses(grown)
    assert base is None
    found = functional.cross_entropy(logits, torch.tensor(grown.wanted), reduction="none").tolist()
    expected = engine(model, layout, adapter)
    assert found == pytest.approx(expected, abs=5e-4)
    assert found != pytest.approx(engine(model, layout), abs=2e-2)  # the adapter does something
    measured = Scorer(model, PROMPT).score(window(), layout, SHAPE, adapter).losses
    assert measured == pytest.approx(expected[len(expected) - len(measured) :], abs=5e-4)
    teacher = tree(window(), one.steps.taught(asked(layout, kept=True)), SHAPE)
    theirs = functional.cross_entropy(one.losses.teacher(teacher), torch.tensor(grown.wanted), reduction="none")
    assert theirs.tolist() == pytest.approx(engine(model, None), abs=5e-4)  # the base with all of it in view


def test_what_anchors_hold_comes_closer_to_the_whole_text(tmp_path):
    one = run(tmp_path, spelled="none,window=anchors:6", acts="text", steps=60, dropout=0.0, distil=1.0)
    before = [parameter.clone() for parameter in one.parameters.values()]
    one.go()
    first, last = (sum(line["apart"] for line in part) / 15 for part in (one.log[:15], one.log[-15:]))
    assert last < 0.8 * first
    assert all((now != then).any() for now, then in zip(one.parameters.values(), before, strict=True))


def test_the_model_itself_answers_with_all_of_the_text_in_view():
    model, ids = tiny_assistant_model(), list(TALE.encode())
    turns = Turns(model, FRAME).about(ids, 4, random.Random(1))
    assert len(turns) == 4
    spelled = [ByteTokenizer().decode(turn).removeprefix("\n\n") for turn, _ in turns]
    assert all(turn[-2:] == [7, 8] for turn, _ in turns)
    assert any(spelled[0] == f"{one}\x07\x08" for one in WHOLE)
    names = {"Old Mary Ann", "Peter"}
    assert set(spelled[1:3]) <= {f"{ask.format(name)}\x07\x08" for ask in NAMED for name in names}
    for turn, answer in turns[:3]:
        context = Context([*PROMPT, *ids, *turn], placement=Placement.TURN, limit=500, reserved=0)
        sequence = Sequence(model.runner, context, max_rows=500)
        banned = sorted(ByteTokenizer.special - ByteTokenizer.eos)
        made = generate(model.runner, sequence, ANSWER, ends=ByteTokenizer.eos, banned=banned)
        assert answer == made.tokens + ([257] if made.ended else [])
    begun = spelled[3].partition('"')[2].partition('"')[0]
    assert spelled[3] == f"{QUOTED.format(begun)}\x07\x08"
    said = ByteTokenizer().decode(turns[3][1])
    assert f"{begun} {said}" in TALE  # and not what the model would make of it
    assert turns == Turns(model, FRAME).about(ids, 4, random.Random(1))


def test_a_text_without_names_or_sentences_is_asked_about_as_a_whole():
    turns = Turns(tiny_assistant_model(), FRAME).about([40] * 30, 4, random.Random(0))
    assert len(turns) == 1


@pytest.mark.parametrize(
    ("spelled", "acts"), [("none,window=anchors:6", "everywhere"), ("none", "text"), ("end", "text")]
)
def test_only_a_window_policy_has_an_adapter_for_the_text(spelled, acts):
    with pytest.raises(BadInput, match="acts on the text"):
        Recipe(layout=Layout.parse(spelled), shape=SHAPE, acts=acts)
