"""`MemoryPieces`: KV rows of passages encoded beside a sink, kept in memory up to a byte limit (least recent goes)."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from longstride.engine.identity import chain_id

OnPut = Callable[[bytes, Sequence[int], int, torch.Tensor], None]


class MemoryPieces:
    """A `PieceStore` in memory, shared by all sequences of one model (equal sinks share rows; nothing else can)."""

    def __init__(self, fingerprint: str, limit_bytes: int) -> None:
        self.fingerprint = fingerprint
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._lock = threading.Lock()  # the device thread and worker threads both look things up
        self._rows: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def key(self, sink: Sequence[int], piece: Sequence[int], position: int) -> bytes:
        """The rows' identity."""
        parent = chain_id(self.fingerprint, b"", sink, range(len(sink)))
        return chain_id(self.fingerprint, parent, piece, range(position, position + len(piece)))

    def get(self, sink: Sequence[int], piece: Sequence[int], position: int) -> torch.Tensor | None:
        """Rows of `piece`, or None."""
        key = self.key(sink, piece, position)
        with self._lock:
            rows = self._rows.get(key)
            if rows is not None:
                self._rows.move_to_end(key)
            return rows

    def put(self, sink: Sequence[int], piece: Sequence[int], position: int, rows: torch.Tensor) -> None:
        """Keep `rows`, dropping the least recently used beyond the limit."""
        self.insert(self.key(sink, piece, position), rows)

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


class SessionPieces:
    """One sequence's view of the shared pieces; `on_put(id, piece, position, rows)` is told of each that it encoded, so
    that a slower store can keep it as well and knows whose it is."""

    def __init__(self, shared: MemoryPieces, on_put: OnPut) -> None:
        self.shared = shared
        self.on_put = on_put

    def get(self, sink: Sequence[int], piece: Sequence[int], position: int) -> torch.Tensor | None:
        """Rows of `piece`, or None."""
        return self.shared.get(sink, piece, position)

    def put(self, sink: Sequence[int], piece: Sequence[int], position: int, rows: torch.Tensor) -> None:
        """Keep `rows`."""
        self.shared.put(sink, piece, position, rows)
        self.on_put(self.shared.key(sink, piece, position), piece, position, rows)
