"""`StoredPieces`: passages' rows, in memory and in the database, as one session sees them."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch

from longstride.engine.identity import adapted, pack_ids
from longstride.scheduler.core import Core
from longstride.scheduler.snapshot import from_bytes, to_bytes
from longstride.storage.blocks import Block

log = logging.getLogger("longstride")


def _report(stored: "Future[int]") -> None:
    error = stored.exception()
    if error is not None:
        log.warning("a passage's rows could not be stored and will be computed again: %s", error)


class StoredPieces:
    """A `PieceStore` over the rows in memory, which all sessions share; what this one encodes is stored as well, so
    that no later process encodes it again. `owner`: the session's number, whose text the rows hold."""

    def __init__(self, core: Core, owner: Callable[[], int]) -> None:
        self.core = core
        self.owner = owner

    def get(self, sink: Sequence[int], piece: Sequence[int], position: int, adapter: str) -> torch.Tensor | None:
        """Rows of `piece` in memory, or None."""
        return self.core.pieces.get(sink, piece, position, adapter)

    def put(self, sink: Sequence[int], piece: Sequence[int], position: int, rows: torch.Tensor, adapter: str) -> None:
        """Keep freshly encoded rows (on the device thread)."""
        core = self.core
        core.pieces.put(sink, piece, position, rows, adapter)
        key = core.pieces.key(sink, piece, position, adapter)
        packed = pack_ids(piece), pack_ids(range(position, position + len(piece)))
        block = Block(key, adapted(core.model.fingerprint, adapter), *packed, to_bytes(rows))
        owner = self.owner()
        stored = core.sessions.database.submit(lambda tables: core.blocks.put(tables, [block], owner))
        stored.add_done_callback(_report)

    def fetch(self, sink: Sequence[int], piece: Sequence[int], position: int, adapter: str) -> None:
        """Bring rows from the database into memory, if they were encoded in an earlier process."""
        core, model = self.core, self.core.model
        key = core.pieces.key(sink, piece, position, adapter)
        if key in core.pieces:
            return
        packed = pack_ids(piece), pack_ids(range(position, position + len(piece)))
        size = len(piece) * model.runner.layout.row_bytes
        data, _why = core.blocks.get(key, adapted(model.fingerprint, adapter), *packed, size)
        if data is not None:
            core.pieces.insert(key, from_bytes([data], model.runner.dtype)[0])
