"""`Snapshot`: the durable KV of a sequence, up to the boundary, as a chain of content-addressed blocks."""

import asyncio
import warnings
from functools import partial

import torch

from longstride.engine.identity import adapted, chain_id, pack_ids
from longstride.engine.model import Model
from longstride.engine.sequence import Sequence
from longstride.errors import StorageError
from longstride.scheduler.device import Device
from longstride.storage.blocks import Block, Blocks

BATCH = 8  # blocks read while those before are written into the cache


def to_bytes(rows: torch.Tensor) -> bytes:
    """A flat tensor's bytes, whatever its dtype."""
    return rows.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def from_bytes(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `to_bytes`; shares the bytes, so it is only read from."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(data, dtype=dtype)


class Snapshot:
    """Which blocks of a sequence exist, which are new, and bringing them back."""

    def __init__(self, model: Model, blocks: Blocks, device: Device, sequence: Sequence, block_tokens: int) -> None:
        self.model = model
        self.blocks = blocks
        self.device = device
        self.sequence = sequence
        self.block_tokens = block_tokens
        adapter = sequence.adapter
        # one that acts on the segment leaves these rows the model's own, whoever reads them
        everywhere = adapter.fingerprint if adapter is not None and adapter.everywhere else ""
        self.fingerprint = adapted(model.fingerprint, everywhere)
        self._chain: list[bytes] = []  # ids of the blocks that were handed out or restored
        self._stale: list[bytes] = []

    def reset(self) -> None:
        """The window slid: positions and ids are others now, and so are all blocks."""
        self._stale += self._chain
        self._chain = []

    def take_stale(self) -> list[bytes]:
        """Blocks of windows that slid since the last call: no context of this session will need them again."""
        stale, self._stale = self._stale, []
        return stale

    def _describe(self, index: int, chain: list[bytes]) -> tuple[bytes, list[int], list[int]]:
        """(id, token ids, positions) of block `index`, given the ids of those before it."""
        context = self.sequence.context
        span = range(index * self.block_tokens, (index + 1) * self.block_tokens)
        ids = [context.text[i] for i in span]
        positions = [context.position(i) for i in span]
        parent = chain[index - 1] if index else b""
        return chain_id(self.fingerprint, parent, ids, positions), ids, positions

    async def new_blocks(self) -> list[Block]:
        """Full blocks of plain rows that were not handed out before, copied off the device."""
        sequence = self.sequence
        whole = min(sequence.cache.length, sequence.context.plain_rows) // self.block_tokens
        first = len(self._chain)
        if whole <= first:
            return []
        described = []
        for index in range(first, whole):
            block = self._describe(index, self._chain)
            described.append(block)
            self._chain.append(block[0])

        def copy() -> list[bytes]:
            size = self.block_tokens
            return [to_bytes(sequence.cache.read_rows(i * size, (i + 1) * size)) for i in range(first, whole)]

        rows = await self.device.call(copy)
        return [
            Block(id_, self.fingerprint, pack_ids(ids), pack_ids(positions), block)
            for (id_, ids, positions), block in zip(described, rows, strict=True)
        ]

    async def restore(self, session_id: int) -> tuple[int, list[str]]:
        """Bring back the leading blocks of the context's text that are stored and sound.

        Verified blocks go into the cache behind its length, while the next ones are read; they become valid together
        at the end. Returns (rows restored, what was wrong with blocks that could not be used; a block that is merely
        missing is not a problem).
        """
        chain: list[bytes] = []
        problems: list[str] = []
        cache, size = self.sequence.cache, self.block_tokens
        whole = self.sequence.context.plain_rows // size
        restored = 0
        loading = asyncio.create_task(asyncio.to_thread(self._load, chain, whole))
        try:
            while True:
                found, problems = await loading
                first, restored = restored, restored + len(found)
                ended = len(found) < BATCH or restored == whole
                if not ended:
                    loading = asyncio.create_task(asyncio.to_thread(self._load, chain, whole))
                if found:
                    await self.device.call(partial(self._write, first, found, whole))
                if ended:
                    break
        except BaseException:
            loading.cancel()
            cache.clear()
            raise
        self._chain = chain
        cache.extend(restored * size)
        if restored:
            try:
                await self.blocks.database.awrite(lambda tables: self.blocks.touch(tables, chain, session_id))
            except StorageError as error:
                problems.append(f"the blocks could not be marked as used: {error}")
        return restored * size, problems

    def _write(self, first: int, found: list[bytes], whole: int) -> None:
        """Put blocks from block `first` on into the cache, which will hold `whole`."""
        cache, size = self.sequence.cache, self.block_tokens
        cache.reserve(whole * size)
        for index, data in enumerate(found, first):
            cache.write_rows(index * size, from_bytes(data, self.model.runner.dtype))

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
        self.sequence.cache.clear()

    async def wake(self, session_id: int) -> list[str]:
        """Bring the KV back if it was suspended: stored blocks are read, the rest is computed with the next forward.

        Returns what was wrong with blocks, as `restore` does.
        """
        if self.held_bytes:
            return []
        return (await self.restore(session_id))[1]

    def _load(self, chain: list[bytes], whole: int) -> tuple[list[bytes], list[str]]:
        """Rows of the next `BATCH` of `whole` blocks behind `chain`, which grows by their ids, up to the first that
        cannot be used; and what is wrong with it."""
        found: list[bytes] = []
        size = self.block_tokens * self.model.runner.layout.row_bytes
        for index in range(len(chain), min(len(chain) + BATCH, whole)):
            id_, ids, positions = self._describe(index, chain)
            data, why = self.blocks.get(id_, self.fingerprint, pack_ids(ids), pack_ids(positions), size)
            if data is None:
                if why == "missing":
                    return found, []
                self.blocks.database.write(partial(self.blocks.drop, ids=[id_]))
                return found, [f"{why}; the text from token {index * self.block_tokens} on is computed again"]
            found.append(data)
            chain.append(id_)
        return found, []
