"""`View`: which part of its stream a session's context shows, and making room when that is full."""

from array import array
from collections.abc import Sequence as Ids

from longstride.engine.sequence import Sequence

LEAD = 128  # tokens at most that stand in place of what left the window (`rollup`)


class View:
    """The prompt, `lead` (notes on what left, possibly none), then the stream from token `start` on.

    `headroom`: tokens that reading leaves free, for a turn. `leads`: whether notes will need room.
    """

    def __init__(self, sequence: Sequence, stream: "array[int]", headroom: int, *, leads: bool) -> None:
        self.sequence = sequence
        self.stream = stream
        self.headroom = headroom
        self.most_lead = min(LEAD, sequence.context.room // 8) if leads else 0
        self.start = 0
        self.lead: list[int] = []

    @property
    def recent(self) -> int:
        """Stream tokens kept when the window slides: half of what fits."""
        return (self._whole - self.headroom) // 2

    @property
    def _whole(self) -> int:
        """Tokens of text that fit behind the prompt and a lead."""
        context = self.sequence.context
        rows = context.limit - context.reserved - context.prompt - self.most_lead
        return rows if context.window is None else context.window.fitting(rows)

    @property
    def most_room(self) -> int:
        """Tokens that fit behind the prompt and a window that has just slid."""
        return self._whole - self.recent

    @property
    def ahead(self) -> int:
        """Tokens that can be read before the window must slide, 1 at least; the window does not slide for one of them
        that comes alone."""
        context = self.sequence.context
        return max(1, context.room - self.headroom - (context.adds is not None))

    @property
    def whole_from(self) -> int:
        """From this stream token on all are in view; what lies before can be retrieved."""
        context = self.sequence.context
        if context.window is None:
            return self.start
        before = context.without_added(context.prompt, max(context.prompt, context.window.whole_from()))
        return self.start + max(0, len(before) - len(self.lead))

    def show(self, start: int, lead: Ids[int]) -> None:
        """Fill an empty context with the stream from `start` on, or what fits of it behind `lead`."""
        context = self.sequence.context
        self.lead = list(lead)[: self.most_lead]
        fits = len(context.placed([*self.lead, *self.stream[start:]])) <= context.free
        self.start = start if fits else len(self.stream) - self.recent
        context.append([*self.lead, *self.stream[self.start :]])

    def slid(self, needed: int) -> int | None:
        """Where the view must begin for `needed` tokens to fit behind it; None if it need not slide, or cannot."""
        start = len(self.stream) - min(self.recent, len(self.stream) - self.start)
        return None if needed <= self.sequence.context.room or start == self.start else start

    def slide(self, start: int, lead: Ids[int]) -> None:
        """Show the stream from `start` on, behind `lead`."""
        self.lead = list(lead)[: self.most_lead]
        self.sequence.slide(len(self.stream) - start, self.lead)
        self.start = start
