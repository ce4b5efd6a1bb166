"""`Context`: what the model sees, as spans of token ids. Pure Python; knows nothing of tensors.

Rows (the order in the cache): text up to the boundary, the segment, the rest of the text (the tail). All rows
before the boundary never saw a retrieved passage, so a rewrite truncates there and nothing else is ever invalid.
The three placements differ only in where the boundary lies, and in positions and visibility (docs/methods.md):

- `end` (FlashBack, arXiv 2405.04065): boundary `refresh` tokens before the end of the text (0 in the paper);
  positions follow rows; plain causal.
- `turn`: boundary where the current turn began; positions follow rows; plain causal.
- `beside`: boundary `refresh` tokens before the end; passages stand at positions right after the sink, a range
  reserved when the context starts, and see the sink and themselves only; the text follows that range.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from longstride.engine.window import Window
from longstride.errors import BadInput, ContextFull

Ids = tuple[int, ...]
MIN_SINK = 4


class Placement(StrEnum):
    """Where the segment stands."""

    BESIDE = "beside"
    END = "end"
    TURN = "turn"

    @property
    def refresh(self) -> int:
        """Text tokens fed again after a segment where nothing else is asked for; docs/evaluation has what fewer and
        more of them give."""
        return {Placement.BESIDE: 16, Placement.END: 64, Placement.TURN: 0}[self]


@dataclass(frozen=True)
class Part:
    """A run of rows to compute together: consecutive rows and positions, one visibility.

    `index`: the first one's place in the text, None in a segment. `visible`: earlier rows it sees as ranges, None for
    all (that the window leaves in view). `piece`: the segment piece these rows belong to when they depend on nothing
    but the sink and the piece itself (`beside`), so their KV may be copied from a store.
    """

    row: int
    ids: Ids
    position: int
    visible: tuple[tuple[int, int], ...] | None = None
    piece: int | None = None
    index: int | None = None

    @property
    def stop(self) -> int:
        """First row after this part."""
        return self.row + len(self.ids)

    def split(self, count: int) -> tuple["Part", "Part"]:
        """The first `count` rows, and the rest (which sees the first as well)."""
        visible = None if self.visible is None else (*self.visible, (self.row, self.row + count))
        first = Part(self.row, self.ids[:count], self.position, self.visible, index=self.index)
        index = None if self.index is None else self.index + count
        return first, Part(self.row + count, self.ids[count:], self.position + count, visible, index=index)


class Context:
    """The ids of a sequence, where the segment stands, and which rows follow from that.

    `limit`: positions the model has. `reserved`: positions kept free for a segment, from the start. `sink`: first
    tokens that every passage sees (`beside`). `refresh`: the placement's own where None. `weight`: of each further
    piece of a segment against the one before it, for the tail (`beside`). `window` decides which tokens' rows stay; all
    of them without one. No method touches KV; `rewrite` and its kin return how many rows of the cache stay valid.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        placement: Placement,
        limit: int,
        reserved: int,
        refresh: int | None = None,
        weight: float = 1.0,
        window: Window | None = None,
    ) -> None:
        if refresh is None:
            refresh = placement.refresh
        least = 1 if placement is Placement.BESIDE else 0  # beside, the last token must come to see the passages
        if reserved < 0 or refresh < least:
            raise BadInput(f"reserved must be 0 or more and refresh {least} or more, not {reserved} and {refresh}")
        self.placement = placement
        self.limit = limit
        self.reserved = reserved
        if not 0 < weight <= 1:
            raise BadInput(f"a passage's weight is above 0 and at most 1, not {weight}")
        self.refresh = refresh
        self.weight = weight
        self.prompt = len(prompt)
        self.sink = max(len(prompt), MIN_SINK)
        self.text: list[int] = list(prompt)
        self.segment: tuple[Ids, ...] = ()
        self.boundary = len(prompt)  # meaningful while there is a segment
        self.turn: int | None = None  # where the current turn began in `text`
        self.window = window
        self.kept: list[int] = []  # tokens that have rows, of those before `settled`; behind it every token has one
        self.settled = 0
        if window is not None:
            window.extend(self.text)
        if self.sink + reserved >= limit:
            raise BadInput(
                f"a prompt of {len(prompt)} tokens and {reserved} tokens reserved for passages leave no room in a "
                f"context of {limit}; shorten the passages or take a longer context"
            )

    # --- sizes ---

    @property
    def segment_rows(self) -> int:
        """Rows the segment takes."""
        return sum(len(piece) for piece in self.segment)

    @property
    def dropped(self) -> int:
        """Tokens whose rows are gone."""
        return self.settled - len(self.kept)

    @property
    def rows(self) -> int:
        """Rows of the whole context: text and segment."""
        return len(self.text) - self.dropped + self.segment_rows

    @property
    def plain_rows(self) -> int:
        """Leading rows that depend on no passage."""
        return (self.boundary if self.segment else len(self.text)) - self.dropped

    @property
    def free(self) -> int:
        """Rows that are left for text beside a full segment."""
        return self.limit - self.reserved - len(self.text)

    @property
    def room(self) -> int:
        """Text tokens that surely still fit beside a full segment."""
        return self.free if self.window is None else self.window.fitting(self.free)

    @property
    def adds(self) -> int | None:
        """The token that the window puts among those of the text, if it does."""
        return None if self.window is None else self.window.adds

    def without_added(self, start: int, stop: int | None = None) -> list[int]:
        """Tokens `start .. stop-1` but those that the window put among them."""
        adds = self.adds
        return self.text[start:stop] if adds is None else [i for i in self.text[start:stop] if i != adds]

    def placed(self, ids: Sequence[int], behind: int | None = None) -> Sequence[int]:
        """`ids` as they become part of the text, behind its first `behind` tokens (all): with what the window puts
        among them, but for a turn's."""
        if self.window is None or self.window.adds is None:
            return ids
        return self.window.placed(ids, self.text[self.prompt : behind])

    @property
    def discounts(self) -> list[float]:
        """What is added to the tail's attention logits at each row of the segment; empty where that is nothing."""
        if self.placement is not Placement.BESIDE or self.weight == 1 or len(self.segment) < 2:
            return []
        step = math.log(self.weight)
        return [rank * step for rank, piece in enumerate(self.segment) for _ in piece]

    def position(self, index: int) -> int:
        """Position of text token `index` (an index into `text`)."""
        if self.placement is Placement.BESIDE:
            return index if index < self.sink else index + self.reserved
        return index if index < self.boundary or not self.segment else index + self.segment_rows

    # --- edits ---

    def append(self, ids: Sequence[int]) -> None:
        """Add text tokens at the end, with what the window puts among them; a turn's as they are until it is kept.
        Raises `ContextFull` if they do not fit; nothing is changed then.

        Where a window decides what stays of them, they follow no segment but in a turn: its rows have seen what the
        window may now have out of view.
        """
        if self.window is not None and self.turn is None and self.segment:
            raise ValueError("a segment goes before a text goes on that a window decides on")
        if self.turn is None:
            ids = self.placed(ids)
        if len(ids) > self.free:
            raise ContextFull(
                f"{len(ids)} tokens do not fit: {len(self.text)} of {self.limit - self.reserved} are used "
                f"(context of {self.limit}, {self.reserved} of them reserved for retrieved passages)"
            )
        self.text += ids
        self._rule()

    def _rule(self) -> None:
        """Let the window decide on new text; what a turn adds stays open until it is kept."""
        if self.window is not None and self.turn is None:
            self.window.extend(self.text)

    def take_back(self, count: int) -> int:
        """Drop the last `count` text tokens, between turns; returns how many rows of the cache stay valid."""
        own = self.without_added(self.prompt)
        self.text[self.prompt :] = self.placed(own[: len(own) - count], self.prompt)
        if self.window is None or self.settled > len(self.text):
            return self._restart(len(self.text))
        self.window.restart()  # rows see nothing behind them, so those before stay as they are
        self.window.extend(self.text)
        return len(self.text) - self.dropped

    def _restart(self, valid: int) -> int:
        """After the text became another behind its first `valid` tokens; returns how many rows stay valid."""
        if self.window is None:
            return valid
        self.window.restart()
        self.window.extend(self.text)
        valid = min(valid, self.prompt)  # tokens behind may have seen others than they would now
        self.unfold()
        return valid

    def begin_turn(self) -> None:
        """Mark the end of the text as the start of a turn (`turn` placement, and `end_turn`)."""
        self.turn = len(self.text)

    def end_turn(self, *, keep: bool) -> int:
        """Drop the segment, and the turn's own text unless `keep`; returns how many rows stay valid."""
        if self.turn is None:
            raise ValueError("no turn was begun")
        # with a window, a turn's tokens saw more than they will as part of the stream
        whole = keep and self.window is None
        valid = min(self.plain_rows, (len(self.text) if whole else self.turn) - self.dropped)
        self.text[self.turn :] = self.placed(self.text[self.turn :], self.turn) if keep else ()
        self.turn = None
        self.segment = ()
        self._rule()
        return valid

    def rewrite(self, pieces: Sequence[Sequence[int]]) -> int:
        """Replace the segment by `pieces` (none: remove it) and move the boundary to where the placement has it.

        Returns how many rows of the cache stay valid. Raises `BadInput` if the pieces pass what was reserved.
        """
        new = tuple(tuple(piece) for piece in pieces if piece)
        if len(self.text) <= self.sink:
            new = ()  # the sink must be whole and a token left to see the segment
        size = max(map(len, new), default=0) if self.placement is Placement.BESIDE else sum(map(len, new))
        if size > self.reserved:
            raise BadInput(f"a segment of {size} tokens passes the {self.reserved} reserved for it")
        plain = self.plain_rows
        if self.placement is Placement.TURN:
            boundary = len(self.text) if self.turn is None else self.turn
        else:
            boundary = max(self.sink, len(self.text) - self.refresh)
        if self.window is not None:
            # rows from the boundary on are computed again, and what they saw before it may be gone
            boundary = max(boundary, self.settled if self.turn is None else self.turn)
        self.segment = new
        self.boundary = boundary
        return min(plain, boundary - self.dropped) if new else plain

    def slide(self, recent: int, lead: Sequence[int] = ()) -> int:
        """Keep the prompt, then `lead` and the last `recent` tokens, positions counted anew; returns how many rows stay
        valid.

        What left is forgotten by the context (not by the stream, which stays retrievable). Not during a turn.
        """
        if self.turn is not None or self.segment:
            raise ValueError("a window slides between turns only")
        own = self.without_added(self.prompt)
        dropped = len(own) - recent
        if dropped <= 0 and not lead:
            return len(self.text)
        self.text[self.prompt :] = self.placed([*lead, *own[max(0, dropped) :]], self.prompt)
        return self._restart(self.prompt)

    # --- rows that a window drops ---

    def settle(self, stop: int) -> list[int]:
        """Drop the rows that no token from `stop` on sees; all before it are computed. Returns the rows that stay, of
        those of the first `stop` tokens. Between turns only."""
        if self.window is None or self.turn is not None or self.segment:
            raise ValueError("rows are dropped by a window, between turns")
        alive = self.window.alive(stop)
        held = [*self.kept, *range(self.settled, stop)]
        rows = [row for row, token in enumerate(held) if alive[token]]
        self.kept, self.settled = [held[row] for row in rows], stop
        return rows

    def fold(self, stop: int) -> list[int]:
        """As `settle` would have it, for rows that come from elsewhere; returns their tokens."""
        self.unfold()
        self.settle(stop)
        return self.kept

    def unfold(self) -> None:
        """Every token has a row again, to be computed."""
        self.kept, self.settled = [], 0

    # --- rows ---

    def parts(self, start: int = 0) -> list[Part]:
        """The rows from `start` to the end, as parts in row order."""
        cut, dropped = self.plain_rows, self.dropped
        beside = self.placement is Placement.BESIDE
        # only what is due is copied: a decoded token must not cost work that grows with the context
        parts = self._text_parts(min(start, cut) + dropped, cut + dropped, -dropped)
        row = cut
        for i, piece in enumerate(self.segment):
            if beside:
                parts.append(Part(row, piece, self.sink, ((0, self.sink),), i))
            else:
                parts.append(Part(row, piece, row + dropped))
            row += len(piece)
        shift = row - cut - dropped
        parts += self._text_parts(max(cut + dropped, min(start - shift, len(self.text))), len(self.text), shift)
        pending = [part for part in parts if part.stop > start]
        if pending and pending[0].row < start:
            pending[0] = pending[0].split(start - pending[0].row)[1]
        return pending

    def _text_parts(self, start: int, stop: int, shift: int) -> list[Part]:
        """Text tokens `start .. stop-1` standing `shift` rows later, split where positions jump."""
        cuts = [start, *([self.sink] if start < self.sink < stop else []), stop]
        return [Part(a + shift, tuple(self.text[a:b]), self.position(a), index=a) for a, b in pairwise(cuts) if b > a]
