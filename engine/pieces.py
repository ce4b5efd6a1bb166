"""`MemoryPieces`: KV rows of passages encoded beside a sink, kept in memory up to a byte limit (least recent goes)."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from longstride.engine.identity import chain_id

OnPut = Callable[[bytes, Sequence[int], int, torch.Tensor], None]


class MemoryPieces:
    """A `PieceStore` in memory, shared by all sequences of one model (equal sinks share rows; nothing else can).

    `on_put(id, piece, position, rows)` is told of each fresh passage, so that a slower store can keep it too.
    """

    def __init__(self, fingerprint: str, limit_bytes: int, on_put: OnPut | None = None) -> None:
        self.fingerprint = fingerprint
        self.limit_bytes = limit_bytes
        self.on_put = on_put
        self.bytes = 0
        self._rows: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def key(self, sink: Sequence[int], piece: Sequence[int], position: int) -> bytes:
        """The rows' identity."""
        parent = chain_id(self.fingerprint, b"", sink, range(len(sink)))
        return chain_id(self.fingerprint, parent, piece, range(position, position + len(piece)))

    def get(self, sink: Sequence[int], piece: Sequence[int], position: int) -> torch.Tensor | None:
        """Rows of `piece`, or None."""
        key = self.key(sink, piece, position)
        rows = self._rows.get(key)
        if rows is not None:
            self._rows.move_to_end(key)
        return rows

    def put(self, sink: Sequence[int], piece: Sequence[int], position: int, rows: torch.Tensor) -> None:
        """Keep `rows`, dropping the least recently used beyond the limit."""
        key = self.key(sink, piece, position)
        self.insert(key, rows)
        if self.on_put is not None:
            self.on_put(key, piece, position, rows)

    def insert(self, key: bytes, rows: torch.Tensor) -> None:
        """Keep rows under a key computed before (they came from a slower store)."""
        size = rows.numel() * rows.element_size()
        if size > self.limit_bytes:
            return
        old = self._rows.pop(key, None)
        self.bytes += size - (old.numel() * old.element_size() if old is not None else 0)
        self._rows[key] = rows
        while self.bytes > self.limit_bytes:
            _, dropped = self._rows.popitem(last=False)
            self.bytes -= dropped.numel() * dropped.element_size()

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows
