"""`PassageIndex`: BM25 over passages that can be added one by one, with the scores of a full rebuild at any time.

bm25s computes scores when it builds, with the statistics of that moment, so its index cannot grow. Here postings keep
term frequencies instead (a big sorted part, and a fresh tail merged into it in the background) and the score is taken
at query time with the statistics of now. Tokens and formula are bm25s' own (`lucene`, k1 1.5, b 0.75); a test holds
the scores to a fresh bm25s index over the same passages.
"""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import bm25s
import numpy as np
from numpy.typing import NDArray

K1, B = 1.5, 0.75
MERGE_AT = 20_000  # postings in the tail; below this a merge costs more than it saves
MANY = 256  # passages that are sorted at once and pass the tail by

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


def terms_of(texts: Sequence[str]) -> list[list[str]]:
    """The terms of each text: lower-cased words without English stop words."""
    if not texts:
        return []
    tokens: list[list[str]] = bm25s.tokenize(list(texts), stopwords="english", return_ids=False, show_progress=False)
    return tokens


@dataclass(frozen=True)
class _Merged:
    """Postings sorted by term: term t has entries `starts[t] .. starts[t+1]-1`."""

    starts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    passages: Ints = field(default_factory=lambda: np.zeros(0, np.int32))
    counts: Floats = field(default_factory=lambda: np.zeros(0, np.float32))

    def plus(self, vocabulary: int, terms: Ints, passages: Ints, counts: Floats) -> "_Merged":
        """With more postings, of passages behind all that are here, in the order of passages."""
        order = np.argsort(terms, kind="stable")
        more = np.zeros(vocabulary + 1, np.int64)
        np.cumsum(np.bincount(terms, minlength=vocabulary), out=more[1:])
        big = np.concatenate([self.starts, np.full(vocabulary + 1 - len(self.starts), self.starts[-1])])
        # an old posting moves by the new postings of smaller terms; a new one stands behind its term's old ones
        from_old = np.arange(len(self.passages)) + np.repeat(more[:-1], np.diff(big))
        from_new = np.arange(len(terms)) + big[1:][terms[order]]
        total = len(from_old) + len(terms)
        merged = _Merged(big + more, np.empty(total, np.int32), np.empty(total, np.float32))
        merged.passages[from_old], merged.passages[from_new] = self.passages, passages[order]
        merged.counts[from_old], merged.counts[from_new] = self.counts, counts[order]
        return merged


class PassageIndex:
    """Postings of passages numbered 0, 1, ... in the order of adding. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._adding = threading.Lock()
        self._merging = threading.Lock()
        self._vocabulary: dict[str, int] = {}
        self._merged = _Merged()
        # the tail, in order of adding, and where each term occurs in it
        self._terms: list[int] = []
        self._passages: list[int] = []
        self._counts: list[int] = []
        self._where: dict[int, list[int]] = {}
        self._lengths = np.zeros(1024, np.float32)
        self.size = 0
        self.total_length = 0

    def add(self, texts: Sequence[str]) -> None:
        """Add passages. Cost: that of the new ones, and for many at once that of moving the old postings."""
        with self._adding:
            if len(texts) >= MANY:
                self._add_many(texts)
                return
            new = terms_of(texts)
            with self._lock:
                self._make_room(len(new))
                for terms in new:
                    self._lengths[self.size] = len(terms)
                    for term, count in Counter(terms).items():
                        id_ = self._vocabulary.setdefault(term, len(self._vocabulary))
                        self._where.setdefault(id_, []).append(len(self._terms))
                        self._terms.append(id_)
                        self._passages.append(self.size)
                        self._counts.append(count)
                    self.size += 1
                    self.total_length += len(terms)

    def _add_many(self, texts: Sequence[str]) -> None:
        tokens = bm25s.tokenize(list(texts), stopwords="english", show_progress=False)
        lengths = np.fromiter(map(len, tokens.ids), np.int64, len(texts))
        flat = np.fromiter(chain.from_iterable(tokens.ids), np.int64, int(lengths.sum()))
        self.merge()
        with self._lock:
            ids = np.fromiter(
                (self._vocabulary.setdefault(term, len(self._vocabulary)) for term in tokens.vocab),
                np.int64,
                len(tokens.vocab),
            )
            vocabulary, base = len(self._vocabulary), self.size
        order = np.fromiter(tokens.vocab.values(), np.int64, len(tokens.vocab))
        to_global = np.empty_like(ids)
        to_global[order] = ids
        passages = np.repeat(np.arange(len(texts)), lengths)
        keys, counts = np.unique(passages * vocabulary + to_global[flat], return_counts=True)
        with self._merging:
            merged = self._merged.plus(
                vocabulary,
                (keys % vocabulary).astype(np.int32),
                (keys // vocabulary + base).astype(np.int32),
                counts.astype(np.float32),
            )
            with self._lock:
                self._make_room(len(texts))
                self._lengths[base : base + len(texts)] = lengths
                self._merged = merged
                self.size += len(texts)
                self.total_length += int(lengths.sum())

    @property
    def count(self) -> int:
        """Passages that are searched: all."""
        return self.size

    def _make_room(self, passages: int) -> None:
        while self.size + passages > len(self._lengths):
            self._lengths = np.concatenate([self._lengths, np.zeros_like(self._lengths)])

    @property
    def merge_due(self) -> bool:
        """Whether the tail has outgrown a quarter of the big part (so merging stays linear in all)."""
        return len(self._terms) > max(MERGE_AT, len(self._merged.passages) // 4)

    def merge(self) -> None:
        """Move the tail into the big part; searches and additions go on meanwhile."""
        with self._merging:
            with self._lock:
                old, size, vocabulary = self._merged, len(self._terms), len(self._vocabulary)
                terms = np.array(self._terms, np.int32)
                passages = np.array(self._passages, np.int32)
                counts = np.array(self._counts, np.float32)
            merged = old.plus(vocabulary, terms, passages, counts)
            with self._lock:
                self._merged = merged
                del self._terms[:size], self._passages[:size], self._counts[:size]
                self._where = {}
                for at, term in enumerate(self._terms):
                    self._where.setdefault(term, []).append(at)

    def dump(self) -> dict[str, NDArray[Any]]:
        """Everything, as plain arrays. Nothing may be added meanwhile."""
        self.merge()
        with self._lock:
            words = "\n".join(self._vocabulary).encode()
            return {
                "words": np.frombuffer(words, np.uint8),
                "starts": self._merged.starts,
                "passages": self._merged.passages,
                "counts": self._merged.counts,
                "lengths": self._lengths[: self.size],
            }

    @classmethod
    def load(cls, arrays: Mapping[str, NDArray[Any]]) -> "PassageIndex":
        """The inverse of `dump`."""
        index = cls()
        words = arrays["words"].tobytes().decode()
        index._vocabulary = {word: i for i, word in enumerate(words.split("\n"))} if words else {}
        index._merged = _Merged(arrays["starts"], arrays["passages"], arrays["counts"])
        index.size = len(arrays["lengths"])
        index.total_length = int(arrays["lengths"].sum(dtype=np.float64))
        index._make_room(0)
        index._lengths[: index.size] = arrays["lengths"]
        return index

    def postings(self, term: str) -> tuple[Ints, Floats, Floats]:
        """(passages, term counts, passage lengths) of a term."""
        with self._lock:
            id_ = self._vocabulary.get(term, -1)
            merged, lengths = self._merged, self._lengths
            tail = self._where.get(id_, [])
            passages = np.array([self._passages[i] for i in tail], np.int32)
            counts = np.array([self._counts[i] for i in tail], np.float32)
        if 0 <= id_ < len(merged.starts) - 1:
            span = slice(merged.starts[id_], merged.starts[id_ + 1])
            if tail:
                passages = np.concatenate([merged.passages[span], passages])
                counts = np.concatenate([merged.counts[span], counts])
            else:
                passages, counts = merged.passages[span], merged.counts[span]
        return passages, counts, lengths[passages]

    def select(self, mask: Mask | None = None) -> "Selection":
        """The passages that are here now; with a mask those of the first `len(mask)` that it names."""
        with self._lock:
            if mask is None or (len(mask) == self.size and mask.all()):
                return Selection(self, self.size, self.size, self.total_length)
            length = int(self._lengths[: len(mask)][mask].sum(dtype=np.float64))
            return Selection(self, len(mask), int(np.count_nonzero(mask)), length, mask)


@dataclass(frozen=True)
class Selection:
    """Some of an index's passages, scored as if it held no others, whatever is added to it. Copies nothing of it.

    `size`: passages that have a number here; `count`: those selected, all when there is no mask.
    """

    index: PassageIndex
    size: int
    count: int
    total_length: int
    mask: Mask | None = None

    def postings(self, term: str) -> tuple[Ints, Floats, Floats]:
        """(passages, term counts, passage lengths) of a term."""
        passages, counts, lengths = self.index.postings(term)
        chosen: slice | NDArray[np.intp] = slice(int(np.searchsorted(passages, self.size)))
        if self.mask is not None:
            chosen = np.flatnonzero(self.mask[passages[chosen]])
        return passages[chosen], counts[chosen], lengths[chosen]


def scores(indexes: Sequence[PassageIndex | Selection], query: str) -> list[Floats]:
    """Scores of all passages of each index, as of one index over all of them together; 0 for what is not selected.

    What may grow meanwhile is given as a selection.
    Robertson et al.'s BM25 in Lucene's form: sum over query terms of
    ln(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 (1 - b + b length / average length)).
    """
    out = [np.zeros(index.size, np.float32) for index in indexes]
    total = sum(index.count for index in indexes)
    length = sum(index.total_length for index in indexes)
    if not total or not length:
        return out
    average = length / total
    for term, repeated in Counter(terms_of([query])[0]).items():
        found = [index.postings(term) for index in indexes]
        df = sum(len(passages) for passages, _, _ in found)
        if not df:
            continue
        idf = np.float32(repeated * np.log(1 + (total - df + 0.5) / (df + 0.5)))
        for (passages, counts, lengths), into in zip(found, out, strict=True):
            # a term's passages are ascending and differ, so a plain indexed addition counts each once
            into[passages] += idf * (counts / (counts + (K1 * (1 - B) + K1 * B / average * lengths)))
    return out
