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

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from longstride.errors import BadInput, ContextFull

Ids = tuple[int, ...]
MIN_SINK = 4


class Placement(StrEnum):
    """Where the segment stands."""

    BESIDE = "beside"
    END = "end"
    TURN = "turn"


@dataclass(frozen=True)
class Part:
    """A run of rows to compute together: consecutive rows and positions, one visibility.

    `visible`: earlier rows it sees as ranges, None for all. `piece`: the segment piece these rows belong to when
    they depend on nothing but the sink and the piece itself (`beside`), so their KV may be copied from a store.
    """

    row: int
    ids: Ids
    position: int
    visible: tuple[tuple[int, int], ...] | None = None
    piece: int | None = None

    @property
    def stop(self) -> int:
        """First row after this part."""
        return self.row + len(self.ids)

    def split(self, count: int) -> tuple["Part", "Part"]:
        """The first `count` rows, and the rest (which sees the first as well)."""
        visible = None if self.visible is None else (*self.visible, (self.row, self.row + count))
        first = Part(self.row, self.ids[:count], self.position, self.visible)
        return first, Part(self.row + count, self.ids[count:], self.position + count, visible)


class Context:
    """The ids of a sequence, where the segment stands, and which rows follow from that.

    `limit`: positions the model has. `reserved`: positions kept free for a segment, from the start. `sink`: first
    tokens that every passage sees (`beside`). No method touches KV; `rewrite` and its kin return how many rows of
    the cache stay valid.
    """

    def __init__(
        self, prompt: Sequence[int], *, placement: Placement, limit: int, reserved: int, refresh: int = 16
    ) -> None:
        least = 1 if placement is Placement.BESIDE else 0  # beside, the last token must come to see the passages
        if reserved < 0 or refresh < least:
            raise BadInput(f"reserved must be 0 or more and refresh {least} or more, not {reserved} and {refresh}")
        self.placement = placement
        self.limit = limit
        self.reserved = reserved
        self.refresh = refresh
        self.prompt = len(prompt)
        self.sink = max(len(prompt), MIN_SINK)
        self.text: list[int] = list(prompt)
        self.segment: tuple[Ids, ...] = ()
        self.boundary = len(prompt)  # meaningful while there is a segment
        self.turn: int | None = None  # where the current turn began in `text`
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
    def rows(self) -> int:
        """Rows of the whole context: text and segment."""
        return len(self.text) + self.segment_rows

    @property
    def plain_rows(self) -> int:
        """Leading rows that depend on no passage."""
        return self.boundary if self.segment else len(self.text)

    @property
    def room(self) -> int:
        """Text tokens that still fit beside a full segment."""
        return self.limit - self.reserved - len(self.text)

    def position(self, index: int) -> int:
        """Position of text token `index` (an index into `text`)."""
        if self.placement is Placement.BESIDE:
            return index if index < self.sink else index + self.reserved
        return index if index < self.boundary or not self.segment else index + self.segment_rows

    # --- edits ---

    def append(self, ids: Sequence[int]) -> None:
        """Add text tokens at the end. Raises `ContextFull` if they do not fit; nothing is changed then."""
        if len(ids) > self.room:
            raise ContextFull(
                f"{len(ids)} tokens do not fit: {len(self.text)} of {self.limit - self.reserved} are used "
                f"(context of {self.limit}, {self.reserved} of them reserved for retrieved passages)"
            )
        self.text += ids

    def begin_turn(self) -> None:
        """Mark the end of the text as the start of a turn (`turn` placement, and `end_turn`)."""
        self.turn = len(self.text)

    def end_turn(self, *, keep: bool) -> int:
        """Drop the segment, and the turn's own text unless `keep`; returns how many rows stay valid."""
        if self.turn is None:
            raise ValueError("no turn was begun")
        valid = min(self.plain_rows, len(self.text) if keep else self.turn)
        if not keep:
            del self.text[self.turn :]
        self.turn = None
        self.segment = ()
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
        self.segment = new
        self.boundary = boundary
        return min(plain, boundary) if new else plain

    def slide(self, recent: int) -> int:
        """Keep the prompt and the last `recent` tokens, positions counted anew; returns how many rows stay valid.

        What left is forgotten by the context (not by the stream, which stays retrievable). Not during a turn.
        """
        if self.turn is not None or self.segment:
            raise ValueError("a window slides between turns only")
        dropped = len(self.text) - self.prompt - recent
        if dropped <= 0:
            return len(self.text)
        del self.text[self.prompt : self.prompt + dropped]
        return self.prompt

    # --- rows ---

    def parts(self, start: int = 0) -> list[Part]:
        """The rows from `start` to the end, as parts in row order."""
        cut = self.plain_rows
        beside = self.placement is Placement.BESIDE
        # only what is due is copied: a decoded token must not cost work that grows with the context
        parts = self._text_parts(min(start, cut), cut, 0)
        row = cut
        for i, piece in enumerate(self.segment):
            if beside:
                parts.append(Part(row, piece, self.sink, ((0, self.sink),), i))
            else:
                parts.append(Part(row, piece, row))
            row += len(piece)
        shift = row - cut
        parts += self._text_parts(max(cut, min(start - shift, len(self.text))), len(self.text), shift)
        pending = [part for part in parts if part.stop > start]
        if pending and pending[0].row < start:
            pending[0] = pending[0].split(start - pending[0].row)[1]
        return pending

    def _text_parts(self, start: int, stop: int, shift: int) -> list[Part]:
        """Text tokens `start .. stop-1` standing `shift` rows later, split where positions jump."""
        cuts = [start, *([self.sink] if start < self.sink < stop else []), stop]
        return [Part(a + shift, tuple(self.text[a:b]), self.position(a)) for a, b in pairwise(cuts) if b > a]
