"""`MemoryPieces`: KV rows of passages encoded beside a sink, kept in memory up to a byte limit (least recent goes)."""

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch

from longstride.engine.identity import adapted, chain_id


class MemoryPieces:
    """A `PieceStore` in memory, shared by all sequences of one model (those of equal sinks and the same adapter share
    rows; no others can)."""

    def __init__(self, fingerprint: str, limit_bytes: int) -> None:
        self.fingerprint = fingerprint
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._lock = threading.Lock()  # the device thread and worker threads both look things up
        self._rows: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def key(self, sink: Sequence[int], piece: Sequence[int], position: int, adapter: str = "") -> bytes:
        """The rows' identity; `adapter` is the fingerprint of the one that acted on them."""
        fingerprint = adapted(self.fingerprint, adapter)
        parent = chain_id(fingerprint, b"", sink, range(len(sink)))
        return chain_id(fingerprint, parent, piece, range(position, position + len(piece)))

    def get(self, sink: Sequence[int], piece: Sequence[int], position: int, adapter: str = "") -> torch.Tensor | None:
        """Rows of `piece`, or None."""
        key = self.key(sink, piece, position, adapter)
        with self._lock:
            rows = self._rows.get(key)
            if rows is not None:
                self._rows.move_to_end(key)
            return rows

    def put(
        self, sink: Sequence[int], piece: Sequence[int], position: int, rows: torch.Tensor, adapter: str = ""
    ) -> None:
        """Keep `rows`, dropping the least recently used beyond the limit."""
        self.insert(self.key(sink, piece, position, adapter), rows)

    def insert(self, key: bytes, rows: torch.Tensor) -> None:
        """Keep rows under a key computed before (they came from a slower store)."""
        size = rows.numel() * rows.element_size()
        if size > self.limit_bytes:
            return
        with self._lock:
            old = self._rows.pop(key, None)
            self.bytes += size - (old.numel() * old.element_size() if old is not None else 0)
            self._rows[key] = rows
            while self.bytes > self.limit_bytes:
                _, dropped = self._rows.popitem(last=False)
                self.bytes -= dropped.numel() * dropped.element_size()

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows
