"""Windows of a text, and what is retrieved for them: never from the window, the targets or what follows."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longstride.errors import BadInput
from longstride.tuning.strides import KNOWN, Corpus, Past, Places, Shape, windows
from longstride.tuning.texts import Text
from tests.tiny import ByteTokenizer

SHAPE = Shape(window=48, strides=3, stride=8, query=16, passage=24, passages=2)
WORDS = ("anchor", "barrel", "candle", "dagger", "engine", "falcon", "garden", "hammer", "island", "jacket")


def text(seed: int, length: int = 1400) -> Text:
    rng = random.Random(seed)
    body = " ".join(rng.choice(WORDS) + rng.choice(("", ".")) for _ in range(length // 8))
    return Text(f"text {seed}", body)


def corpus(*texts: Text) -> Corpus:
    return Corpus(texts, ByteTokenizer(), SHAPE.passage)


def test_a_window_is_the_text_and_its_targets_follow_one_another():
    past = Past(text(0), corpus())
    window = past.window(600, SHAPE, seed=0)
    ids = [*window.text, *(target for stride in window.strides for target in stride.targets)]
    assert ids == past.ids[600 : 600 + SHAPE.span]
    assert [len(stride.targets) for stride in window.strides] == [8, 8, 8]
    spelled = ByteTokenizer().decode(ids)
    assert window.words == sum(1 for i in range(48, len(ids)) if spelled[i] != " " and spelled[i - 1] == " ")


@pytest.mark.parametrize("start", [0, 30, 512, 900])
def test_passages_come_from_before_the_window_only(start):
    """The text behind the window is full of a word of its own: it is asked for there, and never found."""
    before, behind = text(1).body[:start], "zebra zenith " * 60
    past = Past(Text("mixed", before + behind), corpus())
    window = past.window(start, SHAPE, seed=0)
    earlier = ByteTokenizer().decode(past.ids[:start])
    for stride in window.strides:
        for passage in (*stride.found, *stride.chance, *stride.oracle):
            assert ByteTokenizer().decode(passage) in earlier
        assert not stride.found  # nothing before the window has these words


def test_the_best_passage_is_found_and_its_ids_are_those_of_the_text():
    sentence = "the lighthouse keeper counts seven gulls. "
    body = text(2).body[:700] + sentence + text(3).body[:400] + sentence * 4
    past = Past(Text("said again", body), corpus())
    start = len(body) - SHAPE.span - 1
    best = past.window(start, SHAPE, seed=0).strides[0].found[0]
    assert any(word in ByteTokenizer().decode(best) for word in ("lighthouse", "keeper", "gulls", "counts"))


def test_a_text_in_the_corpus_is_not_found_from_behind_its_window():
    behind = "Quartz lanterns hum under violet arches while copper beetles sleep near mossy walls. "
    own = Text("own", text(4).body[:700] + behind)
    other = Text(
        "other", "rare quartz. rare lanterns. rare violet. rare arches. rare copper. rare beetles. rare mossy."
    )
    start = len(own.body) - SHAPE.span
    window = Past(own, corpus(own, other)).window(start, SHAPE, seed=0)
    found = [ByteTokenizer().decode(p) for s in window.strides for p in (*s.found, *s.chance, *s.oracle)]
    assert any(one in other.body for one in found)
    assert all(one in other.body or one in own.body[:start] for one in found)


def test_chance_passages_are_others_than_those_found():
    past = Past(text(5), corpus())
    for stride in past.window(900, SHAPE, seed=3).strides:
        assert len(stride.chance) == SHAPE.passages
        assert not {tuple(p) for p in stride.found} & {tuple(p) for p in stride.chance}


def test_a_short_past_takes_chance_passages_from_other_texts():
    other = text(6)
    past = Past(text(7, 200), corpus(other))
    for stride in past.window(0, SHAPE, seed=0).strides:
        assert stride.chance
        assert all(ByteTokenizer().decode(passage) in other.body for passage in stride.chance)


def test_where_all_of_a_short_past_was_found_the_worst_of_it_are_the_chance_passages():
    past = Past(text(5), corpus())
    start = 200
    assert 2 < past._past(start) < KNOWN
    for stride in past.window(start, SHAPE, seed=3).strides:
        assert len(stride.chance) == min(SHAPE.passages, past._past(start) - len(stride.found))
        assert not {tuple(p) for p in stride.found} & {tuple(p) for p in stride.chance}


def test_the_oracle_asks_with_the_targets():
    past = Past(text(8), corpus())
    window = past.window(900, SHAPE, seed=0)
    assert [s.oracle for s in window.strides] != [s.found for s in window.strides]
    assert all(not s.oracle for s in past.window(900, SHAPE, seed=0, oracle=False).strides)


@given(count=st.integers(1, 6), targets=st.integers(1, 400), seed=st.integers(0, 9))
def test_windows_are_whole_do_not_overlap_and_are_the_same_again(count, targets, seed):
    texts = [text(i, 900 + 200 * i) for i in range(count)]
    library = corpus()
    drawn = windows(texts, library, SHAPE, targets, seed)
    possible = sum(map(len, Places(texts, library, SHAPE).starts))
    assert len(drawn) == min(possible, -(-targets // 24))
    taken: dict[str, list[int]] = {}
    for window in drawn:
        assert all(abs(window.start - other) >= SHAPE.span for other in taken.setdefault(window.document, []))
        taken[window.document].append(window.start)
    assert len(taken) == min(count, len(drawn))  # texts take turns
    assert drawn == windows(texts, library, SHAPE, targets, seed)


def test_another_seed_draws_other_windows():
    texts = [text(i) for i in range(3)]
    assert windows(texts, corpus(), SHAPE, 72, 0) != windows(texts, corpus(), SHAPE, 72, 1)


def test_texts_that_are_too_short_are_passed_over_and_none_is_an_error():
    long, short = text(9), Text("short", "too short")
    assert {w.document for w in windows([short, long], corpus(), SHAPE, 48, 0)} == {f"{long.name} {long.sha256[:8]}"}
    with pytest.raises(BadInput, match="no text has the 72 tokens"):
        windows([short], corpus(), SHAPE, 48, 0)
