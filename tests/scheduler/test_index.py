"""BM25 that grows: the scores of a full rebuild by bm25s, at any time."""

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longstride.scheduler.index import PassageIndex, scores, terms_of

words = st.sampled_from(
    [
        "whale",
        "ship",
        "sea",
        "captain",
        "harpoon",
        "storm",
        "the",
        "a",
        "of",
        "night",
        "watch",
        "mate",
        "deck",
        "boat",
        "line",
        "sail",
    ]
)
passages = st.lists(st.lists(words, min_size=1, max_size=12).map(" ".join), min_size=1, max_size=30)


def rebuilt(texts, query):
    """Scores of a fresh bm25s index."""
    corpus = terms_of(texts)
    terms = [term for term in terms_of([query])[0] if any(term in text for text in corpus)]
    if not terms:
        return np.zeros(len(texts), np.float32)
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index(corpus, show_progress=False)
    return index.get_scores(terms)


@settings(deadline=None, max_examples=150)
@given(passages, passages, st.lists(words, min_size=1, max_size=6).map(" ".join), st.data())
def test_scores_equal_a_full_rebuild_at_any_time(first, second, query, data):
    """Two indexes searched together, merged or not, score as one bm25s index over all passages."""
    one, two = PassageIndex(), PassageIndex()
    for index, texts in ((one, first), (two, second)):
        for text in texts:
            index.add([text])
            if data.draw(st.booleans()):
                index.merge()
    ours = np.concatenate(scores([one, two], query))
    if any(terms_of(first + second)):
        np.testing.assert_allclose(ours, rebuilt(first + second, query), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(passages, passages, st.lists(words, min_size=1, max_size=6).map(" ".join), st.booleans())
def test_many_at_once_and_a_stored_index_score_the_same(first, second, query, merge):
    index = PassageIndex()
    index.add(first)
    if merge:
        index.merge()
    index._add_many(second)
    expected = rebuilt(first + second, query) if any(terms_of(first + second)) else np.zeros(len(first + second))
    np.testing.assert_allclose(scores([index], query)[0], expected, rtol=1e-5, atol=1e-6)
    again = PassageIndex.load(index.dump())
    again.add(["whale at the end"])
    index.add(["whale at the end"])
    np.testing.assert_array_equal(scores([again], query)[0], scores([index], query)[0])


def test_adding_during_a_merge_loses_nothing(monkeypatch):
    index = PassageIndex()
    index.add([f"whale number{i}" for i in range(50)])
    real = np.argsort

    def argsort_while_adding(*args, **kwargs):
        index.add(["late whale"])
        return real(*args, **kwargs)

    monkeypatch.setattr(np, "argsort", argsort_while_adding)
    index.merge()
    monkeypatch.undo()
    texts = [f"whale number{i}" for i in range(50)] + ["late whale"]
    np.testing.assert_allclose(scores([index], "late whale")[0], rebuilt(texts, "late whale"), rtol=1e-5)


@pytest.mark.parametrize("query", ["", "the of and", "zeppelin", "!?"])
def test_a_query_without_known_words_finds_nothing(query):
    index = PassageIndex()
    assert scores([index], query)[0].size == 0
    index.add(["the whale", ""])
    assert not scores([index], query)[0].any()
