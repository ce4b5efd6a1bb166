"""Window policies: what stays of a text that grows, and what each of its tokens sees.

All of them come down to two numbers a token: `since`, the first token it sees, and `until`, the first token that sees
it no longer. So token j sees token i when `since[j] <= i <= j < until[i]`, in every layer: one mask, whatever pieces
the text came in and whatever rows were already dropped from the cache. Positions stay as they were.
"""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FOREVER = 1 << 62
STEP = 64  # rows fall out of view in runs, so that what is left lies in few ranges

Numbers = npt.NDArray[np.int64]
Marks = npt.NDArray[np.bool_]


class Window(ABC):
    """Decides for a text, token by token, `since` and `until`. The first `sink` tokens stay.

    `name` and `settings` decide, with the ids, every row's value: they are part of a snapshot's identity.
    """

    name: str

    def __init__(self, sink: int) -> None:
        self.sink = sink
        self.since = array("q")
        self.until = array("q")

    @property
    @abstractmethod
    def settings(self) -> tuple[int, ...]:
        """Numbers that the policy depends on."""

    @property
    def ruled(self) -> int:
        """Tokens that were decided on. Those behind them (a turn's) see what the last of these leaves in view."""
        return len(self.until)

    @property
    def adds(self) -> int | None:
        """The token that the policy puts into a text, if it does."""
        return None

    def placed(self, ids: Sequence[int], before: Sequence[int] = ()) -> list[int]:  # noqa: ARG002
        """`ids` as they are read behind the text `before`, with what the policy puts among them. The same however a
        text is cut."""
        return list(ids)

    def fitting(self, rows: int) -> int:
        """Tokens of text that surely fit into so many rows, with what the policy puts among them."""
        return rows

    def describe(self) -> str:
        """Name and settings."""
        return ":".join([self.name, *map(str, (self.sink, *self.settings))])

    def restart(self) -> None:
        """Forget the text: another one follows."""
        self.since, self.until = array("q"), array("q")

    def extend(self, text: Sequence[int]) -> None:
        """Decide on the tokens of `text` behind those known."""
        for index in range(self.ruled, len(text)):
            self.since.append(0)
            self.until.append(FOREVER)
            if index >= self.sink:
                self.decide(index, text[index])

    @abstractmethod
    def decide(self, index: int, token: int) -> None:
        """Set `since` of token `index`, and `until` of it or of those before it."""

    # --- what follows ---

    def alive(self, at: int) -> Marks:
        """Which of the first `at` tokens a token `at` sees (one that is no anchor)."""
        return np.frombuffer(self.until, np.int64, at) > at if at else np.zeros(0, np.bool_)

    def whole_from(self) -> int:
        """First token behind which all are in view."""
        gone = np.flatnonzero(~self.alive(self.ruled))
        return int(gone[-1]) + 1 if len(gone) else 0

    def sight(self, columns: Numbers, first: int, count: int) -> Marks:
        """bool [count, len(columns) + count]: which rows the tokens `first ..` see of earlier rows and of themselves.

        `columns`: each earlier row's token, -1 for a row that all of them see.
        """
        ruled = self.ruled
        until = np.append(np.frombuffer(self.until, np.int64), FOREVER)
        since = np.append(np.frombuffer(self.since, np.int64), 0)
        tokens = np.arange(first, first + count)
        keys = np.append(columns, tokens)
        ends, begins = until[np.clip(keys, -1, ruled)], since[np.minimum(tokens, ruled)]
        seen: Marks = (keys <= tokens[:, None]) & (ends > np.minimum(tokens, ruled)[:, None])
        seen &= (keys >= begins[:, None]) | (keys < 0)
        return seen


class Separators(Window):
    """The first tokens, all punctuation and the last `recent` tokens stay: SepLLM's idea (arXiv 2412.12094), untrained.

    Forgets the words between punctuation once they are `recent` tokens back; what punctuation took in from them stays.
    """

    name = "separators"

    def __init__(self, sink: int, recent: int, separators: frozenset[int]) -> None:
        super().__init__(sink)
        self.recent = recent
        self.separators = separators

    @property
    def settings(self) -> tuple[int, ...]:
        return (self.recent,)

    def decide(self, index: int, token: int) -> None:
        if token not in self.separators:
            self.until[index] = (index // STEP + 1) * STEP + self.recent


class Cascade(Window):
    """The last `recent` tokens stay, every second of the 2 `recent` before them, every fourth of the 4 `recent` before
    those, and so on: the sub-caches of Cascading KV (arXiv 2406.17808), by position instead of by attention.

    Forgets evenly, half as densely each time it is twice as far back.
    """

    name = "cascade"

    def __init__(self, sink: int, recent: int) -> None:
        super().__init__(sink)
        self.recent = recent

    @property
    def settings(self) -> tuple[int, ...]:
        return (self.recent,)

    def decide(self, index: int, token: int) -> None:  # noqa: ARG002 - the place decides
        number = index - self.sink
        level = (number & -number).bit_length() - 1 if number else 62  # how often it divides by two
        if level < 32:
            self.until[index] = (index // STEP + 1) * STEP + self.recent * ((1 << (level + 1)) - 1)


class Anchors(Window):
    """Anchor-based attention (AnLLM, arXiv 2402.07616, AnSAN mask): a span ends with its anchor, which sees its span
    and nothing else; other tokens see the anchors before, their own span so far and the last `recent` tokens (0 is the
    paper's mask). Of a span that is closed, and `recent` tokens back, one row is left.

    The anchor is the first of `ends` in the second half of the `longest` tokens that a span may have, else the last
    of these: one a sentence, as the paper has it, leaves more rows the shorter sentences are.

    Forgets all that the anchors did not take in. Meant for models that were tuned for it.
    """

    name = "anchors"

    def __init__(self, sink: int, longest: int, ends: frozenset[int], recent: int = 0) -> None:
        super().__init__(sink)
        self.longest = longest
        self.ends = ends
        self.recent = recent
        self._open = sink  # first token of the span that is not closed

    @property
    def settings(self) -> tuple[int, ...]:
        return (self.longest, self.recent)

    def restart(self) -> None:
        super().restart()
        self._open = self.sink

    def decide(self, index: int, token: int) -> None:
        if self.closes(index + 1 - self._open, token):
            self.since[index] = self._open
            for member in range(self._open, index):
                self.until[member] = index + 1 + self.recent
            self._open = index + 1

    def closes(self, length: int, token: int) -> bool:
        """Whether `token` closes a span of so many tokens with it."""
        return length >= self.longest or (token in self.ends and 2 * length > self.longest)


class AddedAnchors(Anchors):
    """`Anchors` that are put into the text behind each span instead of being its last token (AnLLM-AC): each is the
    token `adds`, which means nothing else and takes a position of its own. A span has at most `longest` tokens with it.

    Forgets as they do.
    """

    name = "anchors-added"

    def __init__(self, sink: int, longest: int, ends: frozenset[int], token: int, recent: int = 0) -> None:
        super().__init__(sink, longest, ends, recent)
        self._token = token

    @property
    def settings(self) -> tuple[int, ...]:
        return (*super().settings, self._token)

    @property
    def adds(self) -> int:
        return self._token

    def closes(self, length: int, token: int) -> bool:  # noqa: ARG002 - wherever it stands
        return token == self._token

    def placed(self, ids: Sequence[int], before: Sequence[int] = ()) -> list[int]:
        length = next((n for n in range(min(len(before), self.longest)) if before[-1 - n] == self._token), None)
        if length is None:
            length = min(len(before), self.longest)
        out: list[int] = []
        for token in ids:
            if length + 1 >= self.longest:  # full, and not before the next token comes: it may be a turn's
                out.append(self._token)
                length = 0
            out.append(token)
            length += 1
            if super().closes(length + 1, token) and length + 1 < self.longest:
                out.append(self._token)
                length = 0
        return out

    def fitting(self, rows: int) -> int:
        half = max(1, self.longest // 2)  # text tokens that a span has at least
        return (rows - 1) * half // (half + 1)


NAMES = frozenset(policy.name for policy in (Separators, Cascade, Anchors, AddedAnchors))
