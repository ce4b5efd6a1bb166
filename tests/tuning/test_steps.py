"""What a step of training sees: who teaches it, which spans of anchors it draws, which windows end with a question."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from longstride.tuning.layouts import Layout, Scorer
from longstride.tuning.recipe import ASKS, spread
from longstride.tuning.trees import tree
from tests.lora import tiny_loaded
from tests.tiny import ByteTokenizer
from tests.tuning.test_layouts import PROMPT, SHAPE, window
from tests.tuning.test_training import ANSWER, OWN, SMALL, run, sample


@pytest.mark.parametrize(
    ("spelled", "teacher"),
    [("end,passages=2", "beside,passages=2"), ("turn", "beside")],
)
def test_the_teacher_is_the_base_that_has_the_same_in_view(tmp_path, spelled, teacher):
    one, layout, of = run(tmp_path, spelled=spelled, acts="everywhere", distil=1.0), Layout.parse(spelled), window()
    for parameter in one.parameters.values():
        torch.nn.init.normal_(parameter)  # an adapter that changes everything: the teacher must not have it
    grown = tree(of, one.steps.taught(sample(layout, of, OWN)), SHAPE)
    targets = torch.tensor([target for branch in grown.branches for target in branch.targets])
    ours = functional.cross_entropy(one.losses.teacher(grown), targets, reduction="none").tolist()
    theirs = Scorer(tiny_loaded("llama"), PROMPT).score(of, Layout.parse(teacher), SHAPE).losses
    assert ours == pytest.approx(theirs, abs=2e-4)


def test_nothing_teaches_where_the_base_sees_no_more_or_no_share_is_asked_for(tmp_path):
    of = window()
    for name, spelled, changes in (("a", "none", {"acts": "everywhere"}), ("b", "end", {"distil": 0.0})):
        one = run(tmp_path / name, spelled=spelled, **changes)
        assert one.steps.taught(sample(one.recipe.layout, of)) is None


def test_anchors_are_trained_with_shorter_spans_and_with_recent_tokens_too():
    drawn = spread(Layout.parse("none,window=anchors:12:5"))
    assert sorted(one.window for one in drawn) == sorted(
        f"anchors:{span}{recent}" for span in (12, 6, 3) for recent in ("", ":5")
    )
    assert spread(Layout.parse("none,window=separators:9")) == [Layout.parse("none,window=separators:9")]
    assert spread(Layout.parse("end")) == [Layout.parse("end")]


def test_a_share_of_the_windows_ends_with_a_question(tmp_path):
    long = replace(SMALL, window=80)
    plain, asked = (run(tmp_path, steps=40, shape=long, turns=turns) for turns in (0.0, 0.5))
    turns = [[*ByteTokenizer().encode(f"\n\n{ask}"), *ANSWER] for ask in ASKS]
    ends = 0
    for step in range(40):
        (before, _), (after, sample) = plain.steps(step), asked.steps(step)
        assert after.strides == before.strides
        assert sample.prompt == PROMPT
        if after.text != before.text:
            ends += 1
            turn = next(turn for turn in turns if after.text[-len(turn) :] == turn)
            assert after.text[: -len(turn)] == before.text[len(turn) :]  # no gap between the text and the question
    assert 10 <= ends <= 30
