"""Splitting: every word in a passage, no passage too long, the same whether text comes at once or in drips."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longstride.scheduler.passages import StreamSplitter, split_text
from tests.tiny import ByteTokenizer

TOKENIZER = ByteTokenizer()
limits = st.integers(4, 40)  # a character may have 4 bytes, and none can be cut
words = st.sampled_from(["whale", "sea", "Ahab.", "Really?!", "(so.)", "3.14", "e.g.", "\n\n", "x" * 50])
any_text = st.one_of(
    st.text(max_size=300),
    st.text("ab .!?\n\t\"')—🐋", max_size=400),
    st.lists(words, max_size=60).map(" ".join),
)


def tokens(text):
    return len(TOKENIZER.encode(text))


@settings(deadline=None, max_examples=300)
@given(any_text, limits)
def test_passages_are_in_order_and_short_and_leave_nothing_out(text, limit):
    spans = split_text(text, TOKENIZER, limit)
    covered = set()
    for start, stop in spans:
        assert 0 <= start < stop <= len(text)
        assert tokens(text[start:stop]) <= limit
        assert text[start:stop] == text[start:stop].strip()
        covered.update(range(start, stop))
    assert all(one[1] <= two[0] for one, two in pairwise(spans))
    assert covered >= {i for i, character in enumerate(text) if not character.isspace()}


@settings(deadline=None, max_examples=300)
@given(st.data(), st.integers(8, 40))
def test_a_word_that_fits_is_never_cut(data, limit):
    words = data.draw(st.lists(st.text("abc", min_size=1, max_size=limit), max_size=40))
    text = " ".join(words)
    for start, stop in split_text(text, TOKENIZER, limit):
        assert start == 0 or text[start - 1] == " "
        assert stop == len(text) or text[stop] == " "


@pytest.mark.parametrize("size", [17, 100, 1000])
def test_a_word_that_cannot_fit_is_cut_and_its_neighbours_are_not(size):
    text = "before " + "x" * size + " after"
    spans = split_text(text, TOKENIZER, 16)
    assert "".join(text[a:b] for a, b in spans).replace(" ", "") == text.replace(" ", "")
    pieces = " ".join(text[a:b] for a, b in spans).split()
    assert pieces[0] == "before"
    assert pieces[-1] == "after"


def test_passages_end_at_sentence_ends():
    text = 'The whale rose. "Thar she blows!" he cried. Was it so? It was.\nA new line'
    assert [text[a:b] for a, b in split_text(text, TOKENIZER, 24)] == [
        "The whale rose.", '"Thar she blows!"', "he cried. Was it so?", "It was.\nA new line",
    ]  # fmt: skip
    assert [text[a:b] for a, b in split_text(text, TOKENIZER, 200)] == [text]


@pytest.mark.parametrize("text", ["", " ", "\n\n\t "])
def test_a_blank_text_has_no_passages(text):
    assert split_text(text, TOKENIZER, 16) == []


def test_a_long_text_without_any_space_is_split_soon():
    text = "鯨" * 20_000
    spans = split_text(text, TOKENIZER, 64)
    assert "".join(text[a:b] for a, b in spans) == text
    assert max(tokens(text[a:b]) for a, b in spans) <= 64


# --- a growing stream ---

streams = st.lists(st.sampled_from([*TOKENIZER.encode('abc .!?\n")'), 0xF0, 0x9F, 257]), max_size=300)


@settings(deadline=None, max_examples=200)
@given(streams, st.integers(1, 40), st.data())
def test_a_stream_is_split_the_same_however_it_arrives(stream, limit, data):
    at_once = StreamSplitter(TOKENIZER, limit).take(stream)
    splitter = StreamSplitter(TOKENIZER, limit)
    spans = []
    seen = 0
    while seen < len(stream):
        seen += data.draw(st.integers(1, len(stream) - seen))
        spans += splitter.take(stream[:seen])
    assert spans == at_once
    start = 0
    for span in spans:
        assert span[0] == start
        assert limit // 2 < span[1] - span[0] <= limit
        start = span[1]
    assert splitter.start == start
    assert len(stream) - start < limit


@settings(deadline=None)
@given(streams, st.integers(1, 40), st.data())
def test_a_resumed_stream_is_split_as_an_unbroken_one(stream, limit, data):
    unbroken = StreamSplitter(TOKENIZER, limit).take(stream)
    first = StreamSplitter(TOKENIZER, limit)
    spans = first.take(stream[: data.draw(st.integers(0, len(stream)))])
    resumed = StreamSplitter(TOKENIZER, limit, start=first.start)
    assert spans + resumed.take(stream) == unbroken


def test_a_stream_passage_ends_after_the_last_sentence_end_of_its_second_half():
    stream = TOKENIZER.encode("One. Two and three. Four. five six seven eight nine ten eleven twelve")
    spans = StreamSplitter(TOKENIZER, 28).take(stream)
    assert [TOKENIZER.decode(stream[a:b]) for a, b in spans] == [
        "One. Two and three. Four.", " five six seven eight nine t",
    ]  # fmt: skip
