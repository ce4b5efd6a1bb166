"""N-grams of what a model writes: it answers questions about texts, and what it found likely at each token is counted.

Smoothed as a language model is (MacKay and Peto 1995): a pair's counts lean on those of its last token.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from longstride.engine.context import Context, Placement
from longstride.engine.model import Model
from longstride.engine.ngrams import NONE, ONE, Ints, NGrams
from longstride.engine.sequence import Sequence as Cached
from longstride.errors import BadInput
from longstride.scheduler.settings import SYSTEM
from longstride.tuning.kept import Kept
from longstride.tuning.texts import Text
from longstride.tuning.turns import NAME, NAMED, WHOLE

ANSWER = 128  # tokens of an answer at most
LIKELY = 6  # tokens counted at each place, and kept of those that may follow
LENGTHS = (0, 0, 60, 120, 240)  # tokens of text before a question; behind none, its subject is all that is known
UNSEEN = (
    "Tell me about {}.",
    "Write a short story about {}.",
    "What is {}, and why does it matter?",
    "How does {} work?",
    "Write a poem about {}.",
    "Give me some advice about {}.",
    "Write a letter to a friend about {}.",
    "Explain {} to a child.",
    "How can I learn more about {}?",
    "List the advantages and disadvantages of {}.",
)
SEEN = (
    *WHOLE,
    *NAMED,
    "Explain the text in simple words.",
    "List the main points of the text.",
    "When and where did this happen?",
    "Why is {} important?",
    "How is {} described?",
    "Write a summary of the text in five sentences.",
)
WORD = re.compile(r"\b[a-z]{6,}\b")
TOGETHER = 16  # answers written at the same time
PART = 64  # answers that are kept together
BACK = (2.0, 4.0)  # observations that what follows a token, a pair is taken to have had before any was counted
FEWEST = 1.0  # a pair seen less often says no more than its last token
TEXTS = 3.0  # observations that the texts themselves count for, after a token or a pair, at most
OFTEN = 8  # a token or a pair that the texts hold less often than so is not counted in them
LEAST = 1 / 128  # chance below which nothing is kept

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """`ids`: the last token before an answer, then the answer. `likely`, `chances`: what the model would have written
    in the place of each but the first."""

    ids: list[int]
    likely: list[list[int]]
    chances: list[list[float]]


class Answers:
    """Questions about texts, drawn by `seed` and number, and the model's greedy answers.

    Raises `BadInput` for a model that has too few positions for them.
    """

    def __init__(self, model: Model, documents: Sequence[Text], seed: int, kept: Kept) -> None:
        self.model, self.documents, self.seed, self.kept = model, documents, seed, kept
        self.frame = model.tokenizer.frame(SYSTEM)
        rows, positions = len(self.frame.prompt) + max(LENGTHS) + 2 * ANSWER, model.runner.max_positions
        if rows > positions:
            raise BadInput(f"a text, a question and its answer take {rows} positions; this model has {positions}")
        self._weights = [min(len(document.body), 1 << 15) for document in documents]
        self._identity = {
            "fingerprint": model.fingerprint, "seed": seed, "texts": [document.sha256 for document in documents],
            "asked": [SEEN, UNSEEN, LENGTHS], "answer": ANSWER, "likely": LIKELY,
        }  # fmt: skip
        self._banned = torch.tensor(sorted(model.tokenizer.special - model.tokenizer.eos), dtype=torch.long)

    def take(self, tokens: int, tell: Callable[[int], None]) -> list[Answer]:
        """Answers of so many tokens in all; `tell` hears of their number as they are written."""
        taken: list[Answer] = []
        count = part = 0
        while count < tokens:
            new = self._part(part)
            taken += new
            count += sum(len(answer.likely) for answer in new)
            tell(count)
            part += 1
        return taken

    def _part(self, number: int) -> list[Answer]:
        identity, label = {**self._identity, "part": number}, f"answers-{number}"
        found = self.kept.get(identity, label, lambda part: [Answer(*answer) for answer in part])
        if found is None:
            found = list(self._written([self.prompt(n) for n in range(number * PART, (number + 1) * PART)]))
            self.kept.put(identity, label, [[a.ids, a.likely, a.chances] for a in found])
        return found

    def prompt(self, number: int) -> list[int]:
        """The model's input for a question."""
        rng = random.Random(f"{self.seed} {number}")  # noqa: S311 - draws texts, not secrets
        tokenizer = self.model.tokenizer
        body = rng.choices(self.documents, self._weights)[0].body
        at = rng.randrange(max(1, len(body) - 2000))
        cut = body[at : at + 2000]
        excerpt = cut.partition(" ")[2] or cut
        ids = tokenizer.encode(excerpt)[: rng.choice(LENGTHS)]
        near = tokenizer.decode(ids) or excerpt
        subjects = sorted({*rng.choice((NAME, WORD)).findall(near)} or {*near.split()}) or ["the text"]
        question = rng.choice(SEEN if ids else UNSEEN).format(rng.choice(subjects))
        asked = f"\n\n{question}" if ids else question
        return [*self.frame.prompt, *ids, *tokenizer.encode(asked)[:ANSWER], *self.frame.answer]

    def _written(self, prompts: list[list[int]]) -> Iterator[Answer]:
        """An answer to each, some at a time."""
        runner, ends = self.model.runner, self.model.tokenizer.eos
        waiting = prompts[::-1]
        live: list[tuple[Cached, Answer]] = []
        while waiting or live:
            while waiting and len(live) < TOGETHER:
                prompt = waiting.pop()
                limit = len(prompt) + ANSWER
                context = Context(prompt, placement=Placement.END, limit=limit, reserved=0)
                live.append((Cached(runner, context, max_rows=limit), Answer([prompt[-1]], [], [])))
            slices = [sequence.take(len(sequence.context.text)) for sequence, _ in live]
            rows = iter(runner.forward([piece for due in slices for piece in due]))
            going = []
            for due, (sequence, answer) in zip(slices, live, strict=True):
                logits = [next(rows) for _ in due][-1][-1].float().cpu()
                sequence.accept(due)
                top = torch.softmax(logits.index_fill(0, self._banned, -torch.inf), 0).topk(LIKELY)
                answer.likely.append(top.indices.tolist())
                answer.chances.append([round(chance, 4) for chance in top.values.tolist()])
                token = answer.likely[-1][0]
                if token in ends or len(answer.likely) == ANSWER:
                    yield answer
                    continue
                answer.ids.append(token)
                sequence.context.append([token])
                going.append((sequence, answer))
            live = going


@dataclass(frozen=True)
class Counts:
    """How often `token` [n] was seen after `key` [n] (a token, or a pair); no (key, token) twice, in their order."""

    key: Ints
    token: Ints
    often: Floats

    @classmethod
    def summed(cls, key: Ints, token: Ints, often: Floats) -> "Counts":
        """From observations in any order."""
        order = np.lexsort((token, key))
        key, token, often = key[order], token[order], often[order]
        first = np.flatnonzero(_new(key) | _new(token))
        return cls(key[first], token[first], np.add.reduceat(often, first) if len(first) else often)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts.summed(
            *(np.concatenate([getattr(self, n), getattr(other, n)]) for n in ("key", "token", "often"))
        )

    @property
    def totals(self) -> Floats:
        """How often each row's key was seen."""
        _, row, count = np.unique(self.key, return_inverse=True, return_counts=True)
        found: Floats = np.bincount(row, self.often, len(count)).astype(np.float64)[row]
        return found

    def where(self, kept: npt.NDArray[np.bool_]) -> "Counts":
        """Some of the rows."""
        return Counts(self.key[kept], self.token[kept], self.often[kept])

    def times(self, factor: "Floats | float") -> "Counts":
        """Counted otherwise."""
        return Counts(self.key, self.token, self.often * factor)

    def likeliest(self) -> "Counts":
        """Of chances: for each key the `LIKELY` greatest, in their order, that are worth keeping."""
        order = np.lexsort((-self.often, self.key))
        found = Counts(self.key[order], self.token[order], self.often[order])
        return found.where((_rank(found.key) < LIKELY) & (found.often >= LEAST))


def _new(values: Ints) -> npt.NDArray[np.bool_]:
    """Where a value differs from the one before it."""
    return np.concatenate([[True], values[1:] != values[:-1]])[: len(values)]


def _rank(key: Ints) -> Ints:
    """The how-manieth of its key each row is; keys in order."""
    starts = np.flatnonzero(_new(key))
    ranks: Ints = np.arange(len(key)) - starts[np.cumsum(_new(key)) - 1]
    return ranks


def observations(before: Ints, last: Ints, token: Ints, often: Floats, size: int) -> tuple[Counts, Counts]:
    """What followed single tokens, and what followed pairs (`before` NONE: there is no pair)."""
    whole = before != NONE
    pairs = ((before + 1) * size + last)[whole]
    return Counts.summed(last, token, often), Counts.summed(pairs, token[whole], often[whole])


def counted(answers: Iterable[Answer], texts: Iterable[Sequence[int]], vocabulary: str, size: int) -> NGrams:
    """What tends to follow one and two tokens, by what was likely in `answers` and, little, by the ids of `texts`."""
    flat: list[tuple[int, int, int, float]] = [
        (before, last, token, chance)
        for answer in answers
        for before, last, tokens, chances in zip(
            [NONE, *answer.ids], answer.ids, answer.likely, answer.chances, strict=False
        )
        for token, chance in zip(tokens, chances, strict=True)
    ]
    columns = np.array(flat, np.float64).reshape(-1, 4).T
    before, last, token = columns[:3].astype(np.int64)
    single, pairs = observations(before, last, token, columns[3], size)
    ids = np.concatenate([np.array([NONE]), *(np.array([*text, NONE]) for text in texts)])
    before, last, token = ids[:-2], ids[1:-1], ids[2:]
    whole = (last != NONE) & (token != NONE)
    told = observations(before[whole], last[whole], token[whole], np.ones(int(whole.sum())), size)
    single, pairs = (
        own + new.times(np.minimum(1.0, TEXTS / new.totals)).where(new.totals >= OFTEN)
        for own, new in zip((single, pairs), told, strict=True)
    )
    return smoothed(single, pairs, vocabulary, size)


def smoothed(single: Counts, pairs: Counts, vocabulary: str, size: int) -> NGrams:
    """Chances from counts: each pair's lean on those after its last token, the less the more often it was seen."""
    ones = single.times(1 / (single.totals + BACK[0])).likeliest()
    totals = pairs.totals
    pairs = pairs.where(totals >= FEWEST)
    keys, first = np.unique(pairs.key, return_index=True)
    totals = totals[totals >= FEWEST][first] + BACK[1]
    # what each pair leans on: the chances after its last token, as further observations
    start, stop = (np.searchsorted(ones.key, keys % size, side) for side in ("left", "right"))
    owner = np.repeat(np.arange(len(keys)), stop - start)
    at = start[owner] + _rank(owner)
    leant = Counts(keys[owner], ones.token[at], BACK[1] * ones.often[at])
    both = pairs + leant
    both = both.times(1 / totals[np.searchsorted(keys, both.key)]).likeliest()
    # keys of single tokens are below those of pairs
    key, token, chance = (np.concatenate([getattr(ones, n), getattr(both, n)]) for n in ("key", "token", "often"))
    kept, row = np.unique(key, return_inverse=True)
    tokens, chances = np.zeros((len(kept), LIKELY), np.int64), np.zeros((len(kept), LIKELY), np.uint8)
    tokens[row, _rank(key)], chances[row, _rank(key)] = token, np.rint(ONE * np.minimum(chance, 1.0))
    return NGrams(kept, tokens, chances, vocabulary=vocabulary, size=size)
