"""Where a text is measured or trained on: windows of it, the targets in them, and what is retrieved for each stride.

As a session would have it: the query is the last tokens of text before the targets; passages come from given documents
and from the text's own past, never from the window itself, the targets or what follows them.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from longstride.engine.tokenizer import Tokenizer
from longstride.errors import BadInput
from longstride.scheduler.index import PassageIndex, Selection, scores
from longstride.scheduler.passages import StreamSplitter, split_text
from longstride.tuning.texts import Text

Ids = list[int]
LEAST_WINDOW = 8
KNOWN = 16  # best passages that no chance passage may be one of
LEAST_PAST = 512  # tokens before a window, where a text is long enough, so that it has a past to retrieve from


@dataclass(frozen=True)
class Shape:
    """Sizes in tokens: `window` of text before the first target, `strides` of `stride` targets in it, `query` length,
    `passage` length at most; `passages` a stride at most."""

    window: int = 368
    strides: int = 8
    stride: int = 16
    query: int = 32
    passage: int = 128
    passages: int = 4

    def __post_init__(self) -> None:
        if min(self.window, self.strides, self.stride, self.query, self.passage, self.passages) < 1:
            raise BadInput("window, strides, stride, query, passage and passages are numbers from 1 on")
        if self.query > self.window or self.window < LEAST_WINDOW:
            raise BadInput(
                f"a window of {self.window} tokens must have {LEAST_WINDOW} at least, and the query's {self.query}; "
                "take a longer window or a shorter query"
            )

    @property
    def span(self) -> int:
        """Tokens of text that a window takes with all its targets."""
        return self.window + self.strides * self.stride


@dataclass(frozen=True)
class Stride:
    """`targets` and the passages for them, best first: `found` by the query, `chance` at random, `oracle` by the
    targets themselves (what retrieval could bring at best; no system can have it)."""

    targets: Ids
    found: tuple[Ids, ...]
    chance: tuple[Ids, ...]
    oracle: tuple[Ids, ...]


@dataclass(frozen=True)
class Window:
    """`text` tokens, then the strides' targets, one behind the other. `words`: words that begin in the targets."""

    document: str
    start: int
    text: Ids
    strides: tuple[Stride, ...]
    words: int


class Corpus:
    """Documents to retrieve from, in passages; searched together with each text's own past."""

    def __init__(
        self,
        texts: Sequence[Text],
        tokenizer: Tokenizer,
        passage: int,
        progress: Callable[[int], None] = lambda _texts: None,
    ) -> None:
        self.tokenizer = tokenizer
        self.passage = passage
        self.bodies: list[str] = []
        self.owners: list[int] = []  # each passage's text, by its number in `known`
        self.known: dict[str, int] = {}  # texts by their content
        self.index = PassageIndex()
        for text in texts:
            spans = split_text(text.body, tokenizer, passage)
            self.bodies += [text.body[a:b] for a, b in spans]
            self.owners += [self.known.setdefault(text.sha256, len(self.known))] * len(spans)
            progress(1)
        if self.bodies:
            self.index.add(self.bodies)

    def ids(self, number: int) -> Ids:
        """A passage's token ids."""
        return self.tokenizer.encode(self.bodies[number])[: self.passage]

    def without(self, text: Text) -> Selection:
        """All passages but those of one text: one that is in the corpus itself must not be found from behind the
        window."""
        mask = np.array(self.owners, np.int64) != self.known.get(text.sha256, -1)
        return self.index.select(mask)


class Past:
    """One text's own passages, of which those that end before a window can be retrieved for it."""

    def __init__(self, text: Text, corpus: Corpus) -> None:
        self.corpus = corpus
        self.text = text
        self.ids = corpus.tokenizer.encode(text.body)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Token spans of its passages."""
        return StreamSplitter(self.corpus.tokenizer, self.corpus.passage).take(self.ids)

    @cached_property
    def index(self) -> PassageIndex:
        """Over its passages; made when the first window of this text is."""
        index = PassageIndex()
        if self.spans:
            index.add([self.corpus.tokenizer.decode(self.ids[a:b]) for a, b in self.spans])
        return index

    def window(self, start: int, shape: Shape, seed: int, *, oracle: bool = True) -> Window:
        """The window that begins at token `start`, with what is retrieved for each of its strides."""
        rng = random.Random(f"{seed} {self.text.name} {start}")  # noqa: S311 - the same passages again, not secret ones
        first = start + shape.window
        strides = []
        for at in range(first, start + shape.span, shape.stride):
            targets = self.ids[at : at + shape.stride]
            query = self.ids[at - shape.query : at]
            known = self._search(query, start, max(KNOWN, shape.passages))
            # not one that was found: that would be no chance passage where a text repeats itself
            chance = self._chance(start, known, shape.passages, rng)
            best = self._search([*query, *targets], start, shape.passages) if oracle else []
            hits = known[: shape.passages], chance, best
            strides.append(Stride(targets, *(tuple(map(self._passage, one)) for one in hits)))
        decode = self.corpus.tokenizer.decode
        words = len(decode(self.ids[start : start + shape.span]).split()) - len(decode(self.ids[start:first]).split())
        return Window(f"{self.text.name} {self.text.sha256[:8]}", start, self.ids[start:first], tuple(strides), words)

    def _past(self, start: int) -> int:
        """How many passages end at or before `start`."""
        return sum(1 for _, stop in self.spans if stop <= start)

    def _search(self, query: Ids, start: int, count: int) -> list[tuple[int, int]]:
        """(0 corpus or 1 past, number) of the best passages with a score above 0, best first."""
        mask = np.ones(self._past(start), np.bool_)
        selections = [self.corpus.without(self.text), self.index.select(mask)]
        hits = [
            (-float(values[i]), s, int(i))
            for s, values in enumerate(scores(selections, self.corpus.tokenizer.decode(query)))
            for i in np.flatnonzero(values > 0)
        ]
        return [(s, i) for _, s, i in sorted(hits)[:count]]

    def _chance(
        self, start: int, known: list[tuple[int, int]], count: int, rng: random.Random
    ) -> list[tuple[int, int]]:
        """`count` passages that were not found, in an order of chance: of the past; where that has too few, of the
        corpus; where that has too few as well, the worst of those found that are not shown."""
        found = set(known)
        drawn = [(1, i) for i in range(self._past(start)) if (1, i) not in found]
        rng.shuffle(drawn)
        if len(drawn) < count:
            own = self.corpus.known.get(self.text.sha256, -1)
            numbers = rng.sample(range(self.corpus.index.size), min(4 * KNOWN, self.corpus.index.size))
            drawn += [(0, i) for i in numbers if (0, i) not in found and self.corpus.owners[i] != own]
        return [*drawn, *reversed(known[count:])][:count]

    def _passage(self, hit: tuple[int, int]) -> Ids:
        source, number = hit
        if source == 0:
            return self.corpus.ids(number)
        return self.ids[slice(*self.spans[number])]


class Places:
    """Where windows can begin: in each text behind some past, none overlapping another."""

    def __init__(self, texts: Sequence[Text], corpus: Corpus, shape: Shape) -> None:
        self.shape = shape
        self.pasts: list[Past] = []
        self.starts: list[list[int]] = []
        for text in texts:
            if len(text.body.encode()) < shape.span:
                continue  # a token has one byte at least
            past = Past(text, corpus)
            least = min(LEAST_PAST, len(past.ids) - shape.span)
            if least >= 0:
                self.pasts.append(past)
                self.starts.append(list(range(least, len(past.ids) - shape.span + 1, shape.span)))
        if not self.pasts:
            raise BadInput(
                f"no text has the {shape.span} tokens that a window of {shape.window} with {shape.strides} strides of "
                f"{shape.stride} needs; take longer texts, or a shorter window or fewer strides"
            )

    def shuffled(self, seed: int) -> list[tuple[Past, int]]:
        """All places. Texts take turns, so that any beginning of this list has many of them."""
        rng = random.Random(seed)  # noqa: S311
        order = list(range(len(self.pasts)))
        rng.shuffle(order)
        drawn = [rng.sample(self.starts[i], len(self.starts[i])) for i in order]
        return [
            (self.pasts[i], starts[turn])
            for turn in range(max(map(len, drawn)))
            for i, starts in zip(order, drawn, strict=True)
            if turn < len(starts)
        ]


def windows(texts: Sequence[Text], corpus: Corpus, shape: Shape, targets: int, seed: int) -> list[Window]:
    """Windows with `targets` targets in all (rounded up to whole windows). Raises `BadInput` when no text is long
    enough."""
    wanted = -(-targets // (shape.strides * shape.stride))
    return [past.window(start, shape, seed) for past, start in Places(texts, corpus, shape).shuffled(seed)[:wanted]]
