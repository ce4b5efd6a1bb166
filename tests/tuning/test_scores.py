"""Answers against gold answers: cases worked out by hand, and what holds for any text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longstride.tuning import scores

WORDS = st.lists(st.sampled_from(["anchor", "bell", "cable", "deck", "1945"]), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Nobel Prize!", "nobel prize"),
        ("An anchor, a bell & the deck.", "anchor bell deck"),
        ("theatre another", "theatre another"),
        ("U.S.A.", "usa"),
        ("\n", ""),
    ],
)
def test_normalised_as_squad_does(text, plain):
    assert scores.normalised(text) == plain


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "f1"),
    [
        ("The Nobel Prize.", ["Nobel Prize"], 1.0, 1.0),
        ("\n\n Nobel Prize\nShe won it in 1903.", ["Nobel Prize"], 1.0, 1.0),  # the first line counts
        ("It was the Nobel Prize", ["Nobel Prize"], 0.0, 2 * 2 / (4 + 2)),
        ("bell bell bell", ["bell"], 0.0, 2 * 1 / (3 + 1)),  # a word counts as often as it is in both
        ("1745", ["1746", "1745"], 1.0, 1.0),  # the best of the gold answers
        ("cable", ["anchor"], 0.0, 0.0),
        ("", ["anchor"], 0.0, 0.0),
        ("the", ["anchor"], 0.0, 0.0),
    ],
)
def test_exact_and_f1_by_hand(answer, gold, exact, f1):
    assert scores.exact(answer, gold) == exact
    assert scores.f1(answer, gold) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("text", "gold", "inside"),
    [
        ("She won the Nobel Prize, twice.", ["nobel prize"], 1.0),
        ("in 17451", ["1745"], 0.0),  # whole words
        ("nothing", ["the"], 0.0),  # a gold answer without words is in no text
        ("one", ["two", "one"], 1.0),
    ],
)
def test_contained_by_hand(text, gold, inside):
    assert scores.contained(text, gold) == inside


@pytest.mark.parametrize(
    ("answer", "gold", "f"),
    [
        ("the cat sat on the mat", ["the cat is on the mat"], 2 * 5 / 12),
        ("mat the on", ["on the mat"], 2 * 1 / 6),  # in order
        ("Anchor! BELL", ["anchor bell"], 1.0),
        ("a\nb\nc", ["a b c"], 1.0),  # all lines
        ("", ["anchor"], 0.0),
    ],
)
def test_rouge_l_by_hand(answer, gold, f):
    assert scores.rouge_l(answer, gold) == pytest.approx(f)


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("(C)", ["(C) They were late"], 1.0),
        ("C. They were late", ["(C) They were late"], 1.0),
        ("C", ["(C) They were late"], 1.0),
        ("The answer is C.", ["(C) They were late"], 1.0),
        ("A man (C) came", ["(C) They were late"], 1.0),  # brackets before a bare letter: "A" is a word here
        ("B) Not (C)", ["(B) Not this one"], 0.0),
        ("They were late", ["(C) They were late"], 0.0),
        ("(D)", ["(C) They were late"], 0.0),
        ("The answer is a dog", ["(A) A dog"], 0.0),
        ("The Answer is C because they were late", ["(C) They were late"], 1.0),
        ("C\nBecause they were late", ["(C) They were late"], 1.0),
        ("True.", ["True [fact: False]"], 1.0),
        ("The statement is false, not true", ["True [fact: False]"], 0.0),
        ("This is true", ["True [fact: False]"], 1.0),
        ("", ["True [fact: False]"], 0.0),
    ],
)
def test_exam_by_hand(answer, gold, right):
    assert scores.exam(answer, gold) == right


def test_yes_and_no_are_in_no_text_in_so_many_words():
    assert scores.is_opposite(["yes"])
    assert scores.is_opposite(["True [fact: False]"])
    assert not scores.is_opposite(["Yesterday", "north"])


@given(WORDS, WORDS)
def test_scores_keep_their_order_and_range(said, wanted):
    answer, gold = " ".join(said), [" ".join(wanted)]
    exact, f1, rouge = scores.exact(answer, gold), scores.f1(answer, gold), scores.rouge_l(answer, gold)
    assert 0.0 <= exact <= rouge <= f1 + 1e-9  # a common subsequence is a part of the common words
    assert f1 <= 1.0
    assert (f1 == 1.0) == (sorted(said) == sorted(wanted))
    assert scores.f1(gold[0], [answer]) == pytest.approx(f1)  # neither side is the special one
    assert scores.f1(answer, [*gold, answer]) == 1.0
    assert exact <= scores.contained(answer, gold)


@given(st.text(max_size=60))
def test_an_answer_is_its_own_gold_answer(text):
    line = scores.first_line(text)
    assert scores.exact(text, [line]) == 1.0
    assert scores.f1(text, [line]) == 1.0
    assert scores.normalised(scores.normalised(text)) == scores.normalised(text)
