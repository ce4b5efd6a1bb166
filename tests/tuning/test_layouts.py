"""Layouts: spelling, and the losses of each against one plain forward over the same rows."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from longstride.engine.adapter import load_adapter
from longstride.errors import BadInput
from longstride.tuning.layouts import Layout, Scorer
from longstride.tuning.strides import Shape, Stride, Window
from tests.lora import own_file, save_adapter, tiny_loaded
from tests.tiny import fresh_model, reference_logits

SHAPE = Shape(window=30, strides=3, stride=5, query=8, passage=9, passages=2)
PROMPT = [256, 7, 8, 9, 10]
MARKS = ([70, 71], [72])


def window(seed: int = 0) -> Window:
    draw = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(0, 250, (count,), generator=draw).tolist()

    strides = tuple(Stride(ids(5), (ids(9), ids(6)), (ids(7), ids(9)), (ids(8), ids(4))) for _ in range(SHAPE.strides))
    return Window("w", 0, ids(30), strides, 12)


def plain_losses(ids, positions, visible, targets):
    """Losses of the last ids' successors by transformers itself."""
    with torch.inference_mode():
        logits = reference_logits(plain_model(), ids, positions, visible)[-len(targets) :]
    return functional.cross_entropy(logits, torch.tensor(targets), reduction="none").tolist()


def plain_model():
    model = fresh_model("llama")
    model.set_attn_implementation("eager")
    return model


def causal(ids):
    return list(range(len(ids))), torch.ones(len(ids), len(ids), dtype=torch.bool).tril()


def expected(layout: Layout, source: str) -> list[float]:
    """Each stride spelled out by hand."""
    w, text, out = window(), [*PROMPT, *window().text], []
    left, right = MARKS if layout.marks else ([], [])
    found = []
    for number, stride in enumerate(w.strides):
        if number % layout.every == 0:
            found = getattr(stride, source)[: layout.passages]
            boundary = {"end": len(text) - layout.refresh, "turn": len(text) - SHAPE.query}.get(layout.place, 0)
            boundary = len(text) - layout.refresh if layout.place == "beside" else boundary
        run = [*left, *(i for p in reversed(found) for i in p), *right]
        tail = stride.targets[:-1]
        if layout.place == "none":
            ids = [*text, *tail]
            out += plain_losses(ids, *causal(ids), stride.targets)
        elif layout.place == "prepend":
            ids = [*PROMPT, *run, *text[len(PROMPT) :], *tail]
            out += plain_losses(ids, *causal(ids), stride.targets)
        elif layout.place in {"end", "turn"}:
            ids = [*text[:boundary], *run, *text[boundary:], *tail]
            out += plain_losses(ids, *causal(ids), stride.targets)
        else:
            room = SHAPE.passage - len(left) - len(right)  # marks take theirs from the passages
            pieces = [[*left, *p[:room], *right] for p in found]
            rows = sum(map(len, pieces))
            ids = [*text[:boundary], *(i for p in pieces for i in p), *text[boundary:], *tail]
            sink, reserved = len(PROMPT), SHAPE.passage
            places = [i if i < sink else i + reserved for i in range(len(text) + len(tail))]
            positions = [*places[:boundary], *(sink + i for p in pieces for i in range(len(p))), *places[boundary:]]
            visible = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
            at = boundary
            for piece in pieces:
                visible[at : at + len(piece), sink:at] = False
                at += len(piece)
            assert at == boundary + rows
            if layout.weight < 1:  # a passage weighs `weight` times the one before it, for what stands behind them
                added = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
                at = boundary
                for rank, piece in enumerate(pieces):
                    added[boundary + rows :, at : at + len(piece)] += rank * math.log(layout.weight)
                    at += len(piece)
                visible = added
            out += plain_losses(ids, positions, visible, stride.targets)
        text += stride.targets
    return out


@pytest.mark.parametrize("source", ["found", "chance", "oracle"])
@pytest.mark.parametrize(
    "spelled",
    [
        "none", "prepend", "prepend,passages=2,marks=true", "end,refresh=16", "end,refresh=0,passages=2",
        "end,refresh=5,marks=false", "turn", "turn,passages=2", "beside", "beside,passages=2,refresh=3",
        "beside,passages=2,weight=1", "beside,marks=true", "beside,every=2",
        "end,refresh=16,every=3", "prepend,every=2",
    ],
)  # fmt: skip
def test_losses_are_those_of_one_plain_forward(spelled, source):
    model = tiny_loaded("llama")
    layout = Layout.parse(f"{spelled},source={source}")
    measured = Scorer(model, PROMPT, MARKS).score(window(), layout, SHAPE)
    assert measured.losses == pytest.approx(expected(layout, source), abs=2e-4)


def test_rows_are_those_that_each_layout_must_compute():
    model = tiny_loaded("llama")
    scorer = Scorer(model, PROMPT, MARKS)
    text, s = len(PROMPT) + 30, SHAPE.stride

    def encoded(spelled):
        return scorer.score(window(), Layout.parse(spelled), SHAPE).encoded

    assert encoded("none") == text + 3 * s - 1
    assert encoded("prepend") == sum(9 + text + s * j + s - 1 for j in range(3))
    # the text once (its last `refresh` tokens behind the segment only), a segment and a tail a stride
    assert encoded("end,refresh=0") == text + 3 * (9 + 3) + 3 * (s - 1) + 2 * s
    assert encoded("beside,refresh=4") == text - 4 + 3 * (9 + 4) + 3 * (s - 1) + 2 * s


@pytest.mark.parametrize("place", ["end", "turn", "beside"])
def test_passages_that_are_in_place_stay_there(place):
    """As in a session, whose segment is written anew only where retrieval brings others."""
    scorer, of = Scorer(tiny_loaded("llama"), PROMPT, MARKS), window()
    same = replace(of, strides=tuple(replace(stride, found=of.strides[0].found) for stride in of.strides))
    again = scorer.score(same, Layout.parse(f"{place},passages=2"), SHAPE)
    once = scorer.score(of, Layout.parse(f"{place},passages=2,every=3"), SHAPE)
    assert (again.losses, again.encoded) == (once.losses, once.encoded)


def test_an_adapter_changes_the_strides_and_brings_its_marks(tmp_path):
    save_adapter(tmp_path, trainable_token_indices=[262, 263], own=own_file("segment"))
    model = tiny_loaded("llama")
    adapter = load_adapter(tmp_path, model)
    scorer = Scorer(model, PROMPT, MARKS)
    layout = Layout.parse("end")
    plain, adapted = (scorer.score(window(), layout, SHAPE, a) for a in (None, adapter))
    assert plain.losses != pytest.approx(adapted.losses, abs=1e-2)
    assert plain.encoded - adapted.encoded == 3  # three marks of words a stride against two of the adapter's
    none = Layout.parse("none")
    assert scorer.score(window(), none, SHAPE, adapter).losses == scorer.score(window(), none, SHAPE).losses


def test_what_the_model_or_an_adapter_cannot_do_is_refused(tmp_path):
    save_adapter(tmp_path, own=own_file("segment"))
    model = tiny_loaded("llama")
    scorer, adapter = Scorer(model, PROMPT, MARKS), load_adapter(tmp_path, model)
    with pytest.raises(BadInput, match="prepending is the same without it"):
        scorer.check(Layout.parse("prepend"), SHAPE, adapter)
    with pytest.raises(BadInput, match="needs 1121 positions and the model has 1024"):
        scorer.check(Layout.parse("end,marks=false"), replace(SHAPE, window=1092), None)
    with pytest.raises(BadInput, match="no room between the marks"):
        scorer.check(Layout.parse("beside,marks=true"), replace(SHAPE, passage=3), None)
    for spelled in ("none", "prepend", "end,passages=2", "beside"):
        scorer.check(Layout.parse(spelled), SHAPE, None)


@pytest.mark.parametrize("wrong", [{"query": 31}, {"window": 7, "query": 7}, {"stride": 0}, {"passages": 0}])
def test_a_shape_that_cannot_be_is_refused(wrong):
    with pytest.raises(BadInput, match=r"numbers from 1 on|must have 8 at least"):
        replace(SHAPE, **wrong)


@given(
    place=st.sampled_from(["none", "prepend", "end", "turn", "beside"]),
    passages=st.integers(1, 64),
    refresh=st.integers(0, 99),
    source=st.sampled_from(["found", "chance", "oracle"]),
    marks=st.booleans(),
    every=st.integers(1, 9),
    adapter=st.sampled_from(["", "mine"]),
    weight=st.sampled_from([0.5, 1.0, 0.125]),
    window=st.sampled_from(["", "anchors:64", "anchors:64:0", "separators:5", "cascade:512"]),
)
def test_a_layout_is_read_as_it_is_spelled(**values):
    layout = Layout(**{**values, "window": values["window"] if values["place"] == "none" else ""})
    assert Layout.parse(str(layout)) == layout


@pytest.mark.parametrize(
    ("spelled", "message"),
    [
        ("middle", "'middle' is none of none, prepend, end, turn, beside"),
        ("end,depth=3", "'depth' is none of passages, refresh"),
        ("end,passages=0", "passages is a number from 1 on"),
        ("end,passages=many", "passages is a number"),
        ("end,refresh=-1", "refresh is a number"),
        ("end,marks=yes", "marks is true or false"),
        ("beside,weight=2", "weight is a number above 0 and at most 1"),
        ("beside,weight=half", "weight is a number above 0"),
        ("end,source=best", "source is one of found, chance, oracle"),
        ("none,window=anchors", "window is POLICY:TOKENS, of separators, cascade, anchors"),
        ("none,window=anchors:1", "window is POLICY:TOKENS"),
        ("none,window=anchors:8:x", "or anchors:TOKENS:RECENT"),
        ("none,window=cascade:8:8", "window is POLICY:TOKENS"),
        ("none,window=sinks:8", "window is POLICY:TOKENS"),
        ("beside,window=anchors:8", "goes with none only"),
        ("", "'' is none of"),
    ],
)
def test_what_is_no_layout_is_refused(spelled, message):
    with pytest.raises(BadInput, match=message):
        Layout.parse(spelled)
