"""`History` against a search by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longstride.engine import history as module
from longstride.engine.history import CHAIN, GAP, LEVELS, PLACES, WINDOW, History


@pytest.fixture(autouse=True, scope="module")
def _small_tables():
    """Tables that begin small, so that a hundred ids make them grow several times."""
    before, module.SMALL = module.SMALL, 2
    yield
    module.SMALL = before


few = st.lists(st.integers(0, 3), max_size=120)


def common(ids, end, tail):
    """How many ids up to place `end` (not included) are the last of `tail`."""
    length = 0
    while length < min(end, len(tail), WINDOW) and ids[end - 1 - length] == tail[-1 - length]:
        length += 1
    return length


@given(ids=few, cuts=st.lists(st.integers(0, 120), max_size=6), tail=st.lists(st.integers(0, 4), max_size=40))
def test_matches_are_true_and_as_long_as_promised(ids, cuts, tail):
    history = History()
    edges = sorted({0, *(min(cut, len(ids)) for cut in cuts), len(ids)})
    for a, b in itertools.pairwise(edges):
        history.extend(ids[a:b])
    assert history.ids.tolist() == ids
    places, lengths = history.matches(tail)
    assert len(set(places.tolist())) == len(places)
    for place, length in zip(places.tolist(), lengths.tolist(), strict=True):
        assert length == common(ids, place, tail) >= 1
    order = list(zip((-lengths).tolist(), (-places).tolist(), strict=True))
    assert order == sorted(order)
    by_hand = {place: common(ids, place, tail) for place in range(1, len(ids))}
    longest = max(by_hand.values(), default=0)
    # of occurrences that share a chain key the latest are looked at, so the key itself is always found
    for level in LEVELS:
        if longest >= level and level <= len(tail):
            latest = [p for p, n in by_hand.items() if n >= level][-CHAIN:]
            for p in latest:  # told of, unless there are longer and later ones enough
                assert p in places or (len(places) == PLACES and (-by_hand[p], -p) > order[-1])


@given(ids=few, tail=few)
def test_growing_by_ones_equals_all_at_once(ids, tail):
    one = History()
    for id_ in ids:
        one.extend([id_])
    for ours, theirs in zip(one.matches(tail), History(ids).matches(tail), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_tables_made_anew_find_what_was_there_before():
    history = History([7, 8, 9, 1])
    history.extend(range(100, 400))
    places, lengths = history.matches([7, 8, 9])
    assert (places[0], lengths[0]) == (3, 3)


def test_a_continuation_ends_where_its_text_ends():
    history = History([1, 2, 3, GAP, 1, 2])
    places, _ = history.matches([1, 2])
    assert places.tolist() == [2]  # nothing follows the occurrence at the end
    assert history.continuations(places, 4, live=False).tolist() == [[3, GAP, GAP, GAP]]


def test_a_text_that_repeats_itself_goes_on_repeating():
    history = History([9, 1, 2, 3, 1, 2, 3, 1])
    places, lengths = history.matches([1, 2, 3, 1])
    assert (places[0], lengths[0]) == (5, 4)
    assert history.continuations(places[:1], 8, live=True).tolist() == [[2, 3, 1, 2, 3, 1, 2, 3]]
    assert history.continuations(places[:1], 8, live=False).tolist() == [[2, 3, 1, *[GAP] * 5]]


@pytest.mark.parametrize("chunk", [512, 100_000])
def test_a_token_takes_less_than_a_hundred_bytes(chunk):
    history = History()
    ids = np.random.default_rng(0).zipf(1.3, 200_000) % 40_000
    for at in range(0, len(ids), chunk):
        history.extend(ids[at : at + chunk])
        if history.size > 2 << module.SMALL:  # the smallest tables are larger than what they hold
            assert history.bytes < 100 * history.size
