"""`Snapshot`: the durable KV of a sequence, up to the boundary, as a chain of content-addressed blocks."""

import asyncio
from collections import deque
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice

import numpy as np
import torch

from longstride.engine.identity import adapted, chain_id, pack_ids
from longstride.engine.model import Model
from longstride.engine.sequence import Sequence
from longstride.engine.window import Marks
from longstride.errors import StorageError
from longstride.scheduler.device import Device, ended
from longstride.storage.blocks import Block, Blocks

BATCH = 8  # blocks that a thread reads and checks at a time
LOADS = 2  # threads that do so, while a third writes what they found into the cache


def to_bytes(rows: torch.Tensor) -> memoryview:
    """A flat tensor's bytes, whatever its dtype; not copied where it is on the CPU."""
    return rows.cpu().contiguous().view(torch.uint8).numpy().data


def from_bytes(copies: list[bytes], dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `to_bytes`, of several of one size: [copies, numbers]."""
    # numpy's: torch would wake all its threads for it, which then spin where others read
    return torch.from_numpy(np.stack([np.frombuffer(data, np.uint8) for data in copies])).view(dtype)


@dataclass(frozen=True)
class Rows:
    """A block as it should be stored: `id` names it, `chain` the whole run of text it is of, and `tokens` are those of
    that run that have rows, with their `ids` and `positions`."""

    id: bytes
    chain: bytes
    tokens: Ids[int]
    ids: bytes
    positions: bytes


class Snapshot:
    """Which blocks of a sequence exist, which are new, and bringing them back.

    With a window a block holds only those of its tokens that are still in view where the last whole block ends. It is
    stored again, smaller, when more of them have left.
    """

    def __init__(self, model: Model, blocks: Blocks, device: Device, sequence: Sequence, block_tokens: int) -> None:
        self.model = model
        self.blocks = blocks
        self.device = device
        self.sequence = sequence
        self.block_tokens = block_tokens
        adapter, window = sequence.adapter, sequence.context.window
        # one that acts on the segment leaves these rows the model's own, whoever reads them
        changed = adapter.fingerprint if adapter is not None and adapter.changes_text else ""
        self.fingerprint = adapted(model.fingerprint, changed, "" if window is None else window.describe())
        self._known: list[Rows] = []  # blocks that were handed out or restored
        self._stale: list[bytes] = []

    def reset(self) -> None:
        """The window slid: positions and ids are others now, and so are all blocks."""
        self._stale += [rows.id for rows in self._known]
        self._known = []

    @property
    def ids(self) -> list[bytes]:
        """The blocks that would bring this sequence back."""
        return [rows.id for rows in self._known]

    def take_stale(self) -> list[bytes]:
        """Blocks that this session will not need again, since the last call: of windows that slid, or larger than they
        need be."""
        stale, self._stale = self._stale, []
        return stale

    def _describe(self, whole: int, known: Ids[Rows] = ()) -> list[Rows]:
        """The first `whole` blocks; `known` ones of the same text save work."""
        context, size = self.sequence.context, self.block_tokens
        alive = None if context.window is None else context.window.alive(whole * size)
        out: list[Rows] = []
        for index in range(whole):
            tokens = self._tokens(index, alive)
            if index < len(known) and len(tokens) == len(known[index].tokens):
                out.append(known[index])
                continue
            span = range(index * size, (index + 1) * size)
            chain = known[index].chain if index < len(known) else self._id(out[-1].chain if out else b"", span)
            out.append(self._rows(chain, tokens))
        return out

    def _tokens(self, index: int, alive: Marks | None) -> Ids[int]:
        """Those of block `index` that have rows."""
        span = range(index * self.block_tokens, (index + 1) * self.block_tokens)
        return span if alive is None else [i for i in span if alive[i]]

    def _rows(self, chain: bytes, tokens: Ids[int]) -> Rows:
        ids, positions = self._contents(tokens)
        id_ = chain if len(tokens) == self.block_tokens else self._id(chain, tokens)
        return Rows(id_, chain, tokens, pack_ids(ids), pack_ids(positions))

    def _id(self, parent: bytes, tokens: Ids[int]) -> bytes:
        return chain_id(self.fingerprint, parent, *self._contents(tokens))

    def _contents(self, tokens: Ids[int]) -> tuple[list[int], list[int]]:
        context = self.sequence.context
        return [context.text[i] for i in tokens], [context.position(i) for i in tokens]

    async def new_blocks(self) -> list[Block]:
        """Full blocks of plain rows that were not handed out before (or larger), copied off the device. Rows that only
        these still needed are dropped there."""
        context, cache = self.sequence.context, self.sequence.cache
        whole = (min(cache.length, context.plain_rows) + context.dropped) // self.block_tokens
        before = self._known
        # what is in view where a block ends depends on nothing behind; and a turn may have dropped rows that were in
        # view there already
        if whole <= len(before) or whole * self.block_tokens < context.settled:
            return []
        self._known = self._describe(whole, before)
        held = [*context.kept, *range(context.settled, whole * self.block_tokens)]
        fresh: list[Rows] = []
        for index, rows in enumerate(self._known):
            if index >= len(before) or rows is not before[index]:
                if index < len(before):
                    self._stale.append(before[index].id)
                if rows.tokens:
                    fresh.append(rows)
        row_of = {token: row for row, token in enumerate(held)} if context.dropped else None

        def copy() -> list[memoryview]:
            copied = [to_bytes(self._copy(rows.tokens, row_of)) for rows in fresh]
            self.sequence.settle(worth=True)
            return copied

        copied = await self.device.call(copy) if fresh else []
        return [
            Block(rows.id, self.fingerprint, rows.ids, rows.positions, data)
            for rows, data in zip(fresh, copied, strict=True)
        ]

    def _copy(self, tokens: Ids[int], row_of: dict[int, int] | None) -> torch.Tensor:
        """Rows of `tokens`."""
        cache = self.sequence.cache
        rows = tokens if row_of is None else [row_of[token] for token in tokens]
        if rows[-1] - rows[0] == len(rows) - 1:
            return cache.read_rows(rows[0], rows[-1] + 1)
        return cache.gather(rows)

    async def restore(self, session_id: int) -> tuple[int, list[str]]:
        """Bring back the leading blocks of the context's text that are stored and sound.

        Verified blocks go into the cache behind its length, while the next ones are read; they become valid together
        at the end. Returns (tokens restored, what was wrong with blocks that could not be used; a block that is merely
        missing is not a problem).
        """
        cache, context, size = self.sequence.cache, self.sequence.context, self.block_tokens
        problems: list[str] = []
        while True:
            plan = await asyncio.to_thread(self._plan)
            found, problem = await self._fill(plan)
            problems += [problem] if problem else []
            if context.window is None or found == len(plan):
                break
            cache.clear()  # rows before a bad block may be too few for the tokens behind: plan again without it
        found_ids = {rows.id for rows in plan[:found]}
        self._stale += [rows.id for rows in self._known if rows.id not in found_ids]
        self._known = plan[:found]
        if context.window is not None:
            context.fold(found * size)
        cache.extend(sum(len(rows.tokens) for rows in self._known))
        if found:
            ids = [rows.id for rows in self._known if rows.tokens]
            try:
                await self.blocks.database.awrite(lambda tables: self.blocks.touch(tables, ids, session_id))
            except StorageError as error:
                problems.append(f"the blocks could not be marked as used: {error}")
        return found * size, problems

    def _plan(self) -> list[Rows]:
        """The blocks to bring back. With a window, as many as are stored as they must be at their own end: what
        is in view there has to be there whole."""
        context = self.sequence.context
        whole = len(context.text) // self.block_tokens
        if context.window is None:
            return self._describe(whole)
        known = self._describe(whole)
        for count in range(whole, 0, -1):
            alive = context.window.alive(count * self.block_tokens)
            last = self._rows(known[count - 1].chain, self._tokens(count - 1, alive))
            if last.tokens and not self.blocks.has([last.id]):
                continue
            plan = self._describe(count, known)
            ids = [rows.id for rows in plan if rows.tokens]
            if len(self.blocks.has(ids)) == len(set(ids)):
                return plan
        return []

    async def _fill(self, plan: list[Rows]) -> tuple[int, str]:
        """Put the blocks of `plan` into the cache behind its length, up to the first that cannot be used; returns how
        many, and what is wrong with the next."""
        restored = row = 0
        starts = iter(range(0, len(plan), BATCH))
        loading: deque[asyncio.Task[tuple[list[bytes], str]]] = deque()
        problem = ""
        try:
            while True:
                for first in islice(starts, LOADS - len(loading)):
                    loading.append(asyncio.create_task(asyncio.to_thread(self._load, plan, first)))
                if not loading:
                    return restored, problem
                found, problem = await asyncio.shield(loading[0])
                loading.popleft()
                if found:
                    await self.device.call(partial(self._write, row, found, sum(len(rows.tokens) for rows in plan)))
                    row += sum(len(rows.tokens) for rows in plan[restored : restored + len(found)])
                restored += len(found)
                if len(found) < BATCH:
                    return restored, problem
        except BaseException:
            self.sequence.clear()
            raise
        finally:
            for task in loading:  # a thread that reads cannot be called off
                await ended(task)
                task.exception()  # whatever it is, an earlier one was raised or ended the reading

    def _write(self, row: int, found: list[bytes], rows: int) -> None:
        """Put blocks from row `row` on into the cache, which will hold `rows`."""
        cache = self.sequence.cache
        cache.reserve(rows)
        for _, alike in groupby(filter(None, found), key=len):  # many at once: each operation costs more than its copy
            row += cache.write_rows(row, from_bytes(list(alike), self.model.runner.dtype))

    # --- on the device or not (see `Residency`) ---

    @property
    def held_bytes(self) -> int:
        """Bytes of KV on the device."""
        return self.sequence.cache.allocated_bytes

    def bytes_for(self, rows: int) -> int:
        """Bytes of KV that `rows` rows may take."""
        return self.sequence.cache.bytes_for(rows)

    def suspend(self) -> None:
        """Let go of the KV on the device; what was stored of it stays."""
        self.sequence.clear()

    async def wake(self, session_id: int) -> list[str]:
        """Bring the KV back if it was suspended: stored blocks are read, the rest is computed with the next forward.

        Returns what was wrong with blocks, as `restore` does.
        """
        if self.held_bytes:
            return []
        return (await self.restore(session_id))[1]

    def _load(self, plan: list[Rows], first: int) -> tuple[list[bytes], str]:
        """The next `BATCH` blocks of `plan` from block `first` on, up to the first that cannot be used; and what is
        wrong with it."""
        found: list[bytes] = []
        for index in range(first, min(first + BATCH, len(plan))):
            rows = plan[index]
            size = len(rows.tokens) * self.model.runner.layout.row_bytes
            data, why = (
                self.blocks.get(rows.id, self.fingerprint, rows.ids, rows.positions, size) if size else (b"", "")
            )
            if data is None:
                if why == "missing":
                    return found, ""
                self.blocks.database.write(partial(self.blocks.drop, ids=[rows.id]))
                return found, f"{why}; the text from token {index * self.block_tokens} on is computed again"
            found.append(data)
        return found, ""
