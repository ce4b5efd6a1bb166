"""`Sequence`: a context and its cache, kept in step. Offers the slices that are due; takes rows that are known.

The heart of the engine in one place: edit the context, truncate the cache to what stayed valid, compute what is
missing. Whether those rows are a chunk of text, a fresh segment or one decoded token makes no difference.
"""

import math
from collections.abc import Sequence as Ids
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from longstride.engine.adapter import Adapter
from longstride.engine.attention import Slice
from longstride.engine.cache import KVCache
from longstride.engine.context import Context, Part
from longstride.engine.draft import MOST_NODES, Node
from longstride.engine.runner import ModelRunner
from longstride.engine.window import Marks

DROP = 256  # rows out of view from which on it pays to close up, and a quarter of all: dropping copies what stays


class PieceStore(Protocol):
    """Rows of passages encoded before, by the fingerprint of the adapter that acted on them ("": none)."""

    def get(self, sink: Ids[int], piece: Ids[int], position: int, adapter: str) -> torch.Tensor | None:
        """Rows of `piece` standing at `position` and seeing `sink` and itself only, as `KVCache.read_rows` gave them,
        or None."""

    def put(self, sink: Ids[int], piece: Ids[int], position: int, rows: torch.Tensor, adapter: str) -> None:
        """Keep such rows."""


class Sequence:
    """One sequence of token ids with its KV. Not thread-safe; `run` and `take` belong on the device thread.

    `adapter` acts on all rows, on those from the boundary on while there is a segment, or on the text before a turn
    (`Adapter.acts`).
    `draft`: nodes to be verified in the forward that computes the last row due. `company`: how many other texts got a
    token of the last forward, and how many rows of others were in it (kept by whoever batches). Counters since the
    start: `computed` rows that were due and went through the model, `copied` rows taken from the store.
    """

    def __init__(
        self,
        runner: ModelRunner,
        context: Context,
        *,
        max_rows: int,
        store: PieceStore | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self.context = context
        self.cache = KVCache(runner.layout, max_rows)
        self.store = store
        self.adapter = adapter
        self.computed = 0
        self.copied = 0
        self.draft: Ids[Node] = ()
        self.company = (0, 0)
        self._known = 0  # rows valid once the slices handed out are computed

    @property
    def piece_adapter(self) -> str:
        """Fingerprint of the adapter that passages' rows are computed with."""
        return "" if self.adapter is None or not self.adapter.changes_passages else self.adapter.fingerprint

    @property
    def pending(self) -> int:
        """Rows of the context that are not in the cache yet."""
        return self.context.rows - self.cache.length

    def rewrite(self, pieces: Ids[Ids[int]]) -> None:
        """Put `pieces` in place of the segment and cut the cache to the boundary."""
        self.cache.truncate(self.context.rewrite(pieces))

    def end_turn(self, *, keep: bool) -> None:
        """Leave the turn (see `Context.end_turn`) and cut the cache accordingly."""
        self.draft = ()
        self.cache.truncate(self.context.end_turn(keep=keep))

    def slide(self, recent: int, lead: Ids[int] = ()) -> None:
        """Slide the window (see `Context.slide`) and cut the cache accordingly."""
        self.cache.truncate(self.context.slide(recent, lead))

    def take_back(self, count: int) -> None:
        """Drop the last text tokens (see `Context.take_back`) and cut the cache accordingly."""
        self.cache.truncate(self.context.take_back(count))

    def clear(self) -> None:
        """Forget all rows and give their memory back; they are due again."""
        self.cache.clear()
        self.context.unfold()

    def settle(self, *, worth: bool = False) -> None:
        """Drop rows that the window has out of view for all further tokens (`worth`: if they are many), not in a turn.

        Left to the owner, who may have to store them first: a restart computes the last tokens again, which see them.
        """
        context = self.context
        if context.window is None or context.turn is not None or context.segment:
            return
        stop = self.cache.length + context.dropped
        gone = int((~context.window.alive(stop)).sum()) - context.dropped
        if not worth or gone >= max(DROP, self.cache.length // 4):
            self.cache.keep(context.settle(stop))

    def take(self, budget: int, logits: int = 1, drafts: int = MOST_NODES) -> list[Slice]:
        """The next slices to compute, at most `budget` tokens; the last carries `logits` when it is the last due, and
        as much of the draft as the budget and `drafts` have room for, with logits of all its rows.

        Rows found in the store are copied here and cost nothing of the budget. Empty: nothing is due.
        """
        slices: list[Slice] = []
        end = self.context.rows
        # for the draft too: a buffer that grows in the forward would leave behind the rows that are copied here
        self.cache.reserve(min(self.cache.limit, end + len(self.draft)))
        left = budget
        known = self.cache.length
        for part in self._parts(self.cache.length):
            if part.piece is not None and self._copy(part):
                known = part.stop
                if not slices:
                    self.cache.extend(known)
                continue
            if left <= 0:
                break
            due = part if len(part.ids) <= left else part.split(left)[0]
            slices.append(self._slice(due))
            known = due.stop
            left -= len(due.ids)
            if due is not part:
                break
        if slices and known == end:
            last = slices[-1]
            last.logits = min(logits, len(last.ids))
            drafted = self.draft[: max(0, min(left, drafts))]  # parents stand before children: what is left is a tree
            ruled = self.context.window is not None and self.context.turn is None  # text that a window decides on
            if drafted and last.mask is None and not ruled:
                slices[-1] = self._with_draft(last, drafted)
            self.draft = ()
        self._known = known
        return [self._discounted(piece) for piece in slices]

    def _parts(self, start: int) -> list[Part]:
        """The context's, none reaching over the place where the adapter begins or ends to act."""
        parts, turn = self.context.parts(start), self.context.turn
        if self.adapter is None or self.adapter.acts != "text" or turn is None:
            return parts
        cut: list[Part] = []
        for part in parts:
            before = 0 if part.index is None else turn - part.index
            cut += part.split(before) if 0 < before < len(part.ids) else [part]
        return cut

    def _acting(self, part: Part) -> Adapter | None:
        """The adapter where it acts on a part. No part reaches over the boundary, nor over the sink's end."""
        context, adapter = self.context, self.adapter
        if adapter is None or adapter.acts == "everywhere":
            return adapter
        if adapter.acts == "segment":
            return None if part.row < context.plain_rows else adapter
        read = len(context.text) if context.turn is None else context.turn
        return adapter if part.index is not None and context.sink <= part.index < read else None

    def _discounted(self, piece: Slice) -> Slice:
        """`piece` with what the context takes off the segment's pieces, if it stands behind them."""
        context = self.context
        first, discounts = context.plain_rows, context.discounts
        known = piece.mask is not None and piece.mask.is_floating_point()
        if known or not discounts or piece.row < first + len(discounts):
            return piece
        n = len(piece.ids)
        among = torch.ones(n, n, dtype=torch.bool).tril() if piece.mask is None else piece.mask
        behind = piece.row - first + n  # rows from the segment on
        width = max(behind, among.shape[1])
        weights = torch.zeros(n, width)
        weights[:, width - behind : width - behind + len(discounts)] = torch.tensor(discounts)
        weights[:, width - among.shape[1] :].masked_fill_(~among, -math.inf)
        return replace(piece, mask=weights)

    def _slice(self, part: Part) -> Slice:
        positions = range(part.position, part.position + len(part.ids))
        visible, mask = self._sight(part)
        # a draft stands on the same side of whatever decides as the row that it continues
        return Slice(self.cache, part.ids, positions, part.row, visible, mask, adapter=self._acting(part))

    def _sight(self, part: Part) -> tuple[tuple[tuple[int, int], ...] | None, torch.Tensor | None]:
        """What a part sees, as `Slice` has it: `visible` and `mask`."""
        context = self.context
        window = context.window
        if window is None or part.visible is not None:
            return part.visible, None
        # a segment sees what a turn sees
        index = max(window.ruled, context.boundary) if part.index is None else part.index
        if index >= window.ruled <= context.settled:
            return None, None  # nothing out of view is left: a decoded token must not cost work that grows
        plain = min(part.row, context.plain_rows)
        columns = [*context.kept, *range(context.settled, plain + context.dropped)]
        columns += [-1] * min(part.row - plain, context.segment_rows)
        columns += range(part.index - (part.row - len(columns)), part.index) if part.index is not None else ()
        n = len(part.ids)
        seen = window.sight(np.array(columns, np.int64), index, n)
        used: Marks = np.logical_or.reduce(seen)
        ranges = _ranges(used[: part.row])
        seen = seen[:, used]
        discounts = context.discounts
        if discounts and part.row >= plain + len(discounts):
            added = np.zeros(len(used), np.float32)
            added[plain : plain + len(discounts)] = discounts
            weights = np.where(seen, added[used], np.float32(-np.inf))
            return None if ranges == ((0, part.row),) else ranges, torch.from_numpy(weights)
        # from the first row on that some see and some do not
        partly = min([*np.flatnonzero(~seen.all(0))[:1].tolist(), seen.shape[1] - n])
        seen = seen[:, partly:]
        causal = seen.shape[1] == n and bool((seen == np.tri(n, dtype=np.bool_)).all())
        return (
            None if ranges == ((0, part.row),) else ranges,
            None if causal else torch.from_numpy(np.ascontiguousarray(seen)),
        )

    def _with_draft(self, last: Slice, nodes: Ids[Node]) -> Slice:
        """`last` with a draft's rows behind it: each sees all before the draft, its ancestors and itself."""
        due, text = len(last.ids), len(self.context.text)
        mask = None  # a single branch is causal
        if any(node.parent_row != row - 1 for row, node in enumerate(nodes)):
            seen = np.tri(due + len(nodes), dtype=np.bool_)
            for row, node in enumerate(nodes, due):  # what its parent sees, and itself
                seen[row, :row] = False
                before = due + node.parent_row + 1
                seen[row, :before] = seen[before - 1, :before]
            mask = torch.from_numpy(seen)
        return replace(
            last,
            ids=[*last.ids, *(node.token for node in nodes)],
            positions=[*last.positions, *(self.context.position(text + node.depth - 1) for node in nodes)],
            mask=mask,
            logits=last.logits + len(nodes),
            drafted=len(nodes),
        )

    def keep(self, path: Ids[Node]) -> None:
        """Make a verified path of the draft part of the text, with the rows it has; right after `accept`."""
        start = self.context.rows
        self.context.append([node.token for node in path])
        self.cache.move([start + node.row for node in path], start)
        self.cache.extend(start + len(path))

    def _copy(self, part: Part) -> bool:
        """Copy a passage's rows from the store into the cache, if it has them."""
        if self.store is None:
            return False
        context = self.context
        rows = self.store.get(context.text[: context.sink], part.ids, part.position, self.piece_adapter)
        if rows is None:
            return False
        self.cache.write_rows(part.row, rows)
        self.copied += len(part.ids)
        return True

    def accept(self, slices: Ids[Slice]) -> None:
        """After a forward over `take`'s slices: count them, keep freshly encoded passages in the store.

        Rows copied behind the last computed one become valid here too; those of a draft wait for `keep`.
        """
        self.computed += sum(len(piece.ids) - piece.drafted for piece in slices)
        self.cache.extend(self._known)
        if self.store is None:
            return
        context = self.context
        first = context.plain_rows
        if not slices or slices[0].row >= first + context.segment_rows:
            return
        # a passage is whole when its last row was computed, in however many forwards
        ends = {piece.stop - piece.drafted for piece in slices}
        for part in context.parts(first):
            if part.piece is not None and part.stop in ends:
                rows = self.cache.read_rows(part.row, part.stop)
                self.store.put(context.text[: context.sink], part.ids, part.position, rows, self.piece_adapter)

    def run(self, runner: ModelRunner, budget: int = 512, logits: int = 1) -> torch.Tensor | None:
        """Compute everything due, alone and at once (tests, examples, benchmarks); last rows' logits or None."""
        out: torch.Tensor | None = None
        while self.pending:
            self.settle(worth=True)  # before and not after a forward: its draft's rows may still be kept
            slices = self.take(budget, logits)
            if not slices:
                break
            out = runner.forward(slices)[-1]
            self.accept(slices)
        return out


def _ranges(used: Marks) -> tuple[tuple[int, int], ...]:
    """The runs of true values, as (start, stop)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], used, [False]]).astype(np.int8)))
    return tuple((int(start), int(stop)) for start, stop in edges.reshape(-1, 2))
