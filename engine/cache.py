"""`KVCache`: the keys and values of one sequence, one preallocated buffer a layer.

Contract: rows `0 .. length-1` are valid; everything past `length` is scratch. `truncate` only moves `length`, so
cutting a stale segment costs nothing. Buffers double until `limit` rows and never shrink below what is valid.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from longstride.errors import ContextFull


@dataclass(frozen=True)
class LayerShape:
    """One layer's KV: heads, and the sizes of a key and of a value vector."""

    heads: int
    key_size: int
    value_size: int

    @property
    def numbers(self) -> int:
        """Numbers stored for one token."""
        return self.heads * (self.key_size + self.value_size)


@dataclass(frozen=True)
class CacheLayout:
    """What the cache of a model looks like; learned by `ModelRunner` from one forward."""

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def row_bytes(self) -> int:
        """Bytes of KV for one token, all layers."""
        return sum(layer.numbers for layer in self.layers) * self.dtype.itemsize

    def describe(self) -> str:
        """The part of a model's identity that decides whether stored rows fit."""
        shapes = ",".join(f"{s.heads}x{s.key_size}+{s.value_size}" for s in self.layers)
        return f"{self.dtype}:{shapes}"


class KVCache:
    """KV rows of one sequence. Not thread-safe: one forward or copy at a time (the device thread)."""

    def __init__(self, layout: CacheLayout, limit: int, initial: int = 256) -> None:
        self.layout = layout
        self.limit = limit
        self.length = 0
        self.capacity = 0
        self.keys: list[torch.Tensor] = []  # a layer: [heads, capacity, key size]
        self.values: list[torch.Tensor] = []  # a layer: [heads, capacity, value size]
        self.addresses = np.empty(0, np.uintp)  # of each layer's keys and values, as long as nothing grows
        self._grow(min(initial, limit))

    @property
    def allocated_bytes(self) -> int:
        """Bytes held by the buffers."""
        return self.capacity * self.layout.row_bytes

    def bytes_for(self, rows: int) -> int:
        """Bytes that the buffers may take once `rows` rows were written (they grow by doubling)."""
        return max(self.capacity, min(self.limit, 2 * rows)) * self.layout.row_bytes

    def clear(self) -> None:
        """Forget all rows and give the buffers back."""
        self.length = self.capacity = 0
        self.keys, self.values, self.addresses = [], [], np.empty(0, np.uintp)

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows in all. Raises `ContextFull` past the limit, before anything is changed."""
        if rows > self.limit:
            raise ContextFull(f"the cache holds at most {self.limit} rows; {rows} were asked for")
        if rows > self.capacity:
            self._grow(min(self.limit, max(rows, 2 * self.capacity)))

    def _grow(self, capacity: int) -> None:
        old = (self.keys, self.values) if self.capacity else None
        if old is None:
            self.keys, self.values = [], []
        # Layer by layer, so that the peak is one layer's old buffer and not the whole cache twice; a layer's keys and
        # values in one, because the system maps large buffers by large pages, which are read faster.
        for i, shape in enumerate(self.layout.layers):
            size = capacity * shape.heads * shape.key_size
            buffer = torch.empty(capacity * shape.numbers, dtype=self.layout.dtype, device=self.layout.device)
            keys = buffer[:size].view(shape.heads, capacity, shape.key_size)
            values = buffer[size:].view(shape.heads, capacity, shape.value_size)
            if old is None:
                self.keys.append(keys)
                self.values.append(values)
                continue
            keys[:, : self.length] = self.keys[i][:, : self.length]
            values[:, : self.length] = self.values[i][:, : self.length]
            self.keys[i], self.values[i] = keys, values
        self.capacity = capacity
        buffers = zip(self.keys, self.values, strict=True)
        self.addresses = np.array([buffer.data_ptr() for pair in buffers for buffer in pair], np.uintp)

    def write(self, layer: int, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put `keys` and `values` [heads, n, size] at `row`; `length` does not move (see `extend`)."""
        stop = row + keys.shape[1]
        self.keys[layer][:, row:stop] = keys
        self.values[layer][:, row:stop] = values

    def extend(self, length: int) -> None:
        """Declare rows up to `length` valid, after they were written."""
        self.length = max(self.length, length)

    def truncate(self, length: int) -> None:
        """Forget rows from `length` on. O(1)."""
        self.length = min(self.length, length)

    def move(self, rows: Sequence[int], to: int) -> None:
        """Copy `rows` to rows from `to` on; rows past the length may be taken as well. `length` does not move."""
        if list(rows) == list(range(to, to + len(rows))):
            return
        index = torch.tensor(rows, device=self.layout.device)
        for keys, values in zip(self.keys, self.values, strict=True):
            keys[:, to : to + len(rows)] = keys[:, index]
            values[:, to : to + len(rows)] = values[:, index]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only `rows` of the valid ones, ascending; they close up. What stands before the first gap stays put."""
        first = next((i for i, row in enumerate(rows) if i != row), len(rows))
        self.move(rows[first:], first)
        self.truncate(len(rows))

    def gather(self, rows: Sequence[int]) -> torch.Tensor:
        """As `read_rows`, for rows that need not stand side by side."""
        index = torch.tensor(rows, dtype=torch.long, device=self.layout.device)
        return self._flat(len(rows), lambda buffer: buffer[:, index])

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Copy of rows `start .. stop-1` as one flat tensor: each layer's keys, then its values."""
        return self._flat(stop - start, lambda buffer: buffer[:, start:stop])

    def _flat(self, count: int, part: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`count` rows of each buffer, copied behind one another."""
        size = count * sum(shape.numbers for shape in self.layout.layers)
        flat, at = torch.empty(size, dtype=self.layout.dtype, device=self.layout.device), 0
        for keys, values in zip(self.keys, self.values, strict=True):
            for rows in (part(keys), part(values)):
                _copy(rows, flat[at : at + rows.numel()].view(rows.shape))
                at += rows.numel()
        return flat

    def write_rows(self, row: int, flat: torch.Tensor) -> int:
        """Put rows copied by `read_rows` at `row`, or several such copies of one size [copies, numbers] one behind the
        other; returns how many. `length` does not move."""
        flat = flat.view(-1, flat.shape[-1]).to(self.layout.device)
        copies, count = len(flat), flat.shape[1] // sum(shape.numbers for shape in self.layout.layers)
        rows = slice(row, row + copies * count)
        at = 0
        for shape, keys, values in zip(self.layout.layers, self.keys, self.values, strict=True):
            for buffer, size in ((keys, shape.key_size), (values, shape.value_size)):
                part = flat[:, at : at + count * shape.heads * size].view(copies, shape.heads, count, size)
                _copy(part.transpose(0, 1), buffer[:, rows].view(shape.heads, copies, count, size))
                at += count * shape.heads * size
        return copies * count

    def check_integrity(self) -> None:
        """Raise `AssertionError` if the structure contradicts itself; tests call this after every step."""
        if not 0 <= self.length <= self.capacity <= self.limit:
            raise AssertionError(f"length {self.length}, capacity {self.capacity}, limit {self.limit}")
        layers = self.layout.layers if self.capacity else ()
        for shape, keys, values in zip(layers, self.keys, self.values, strict=True):
            if keys.shape != (shape.heads, self.capacity, shape.key_size):
                raise AssertionError(f"keys {tuple(keys.shape)}")
            if values.shape != (shape.heads, self.capacity, shape.value_size):
                raise AssertionError(f"values {tuple(values.shape)}")


def _copy(part: torch.Tensor, to: torch.Tensor) -> None:
    """By one thread on the CPU: torch would wake its others for it, which then spin where others want to run."""
    if to.is_cpu:
        np.copyto(to.view(torch.uint8).numpy(), part.view(torch.uint8).numpy())
    else:
        to.copy_(part)
