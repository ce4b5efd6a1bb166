"""The compiled layer and product (`native.c`): which weights and layers qualify, and how they are called.

It is built at installation where there is a compiler for it; without it everything runs in torch's operations.
"""

import ctypes
import importlib.util
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from longstride.engine.attention import Slice
from longstride.engine.cache import LayerShape

PANEL = 16  # outputs side by side
MOST_SIZE = 256  # of a head

log = logging.getLogger("longstride")
Pointer = ctypes.c_void_p


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("hidden", "heads", "kv_heads", "size", "inner")),
        *((name, ctypes.c_float) for name in ("epsilon_in", "epsilon_mlp", "scaling")),
        *((name, Pointer) for name in ("norm_in", "norm_mlp", "qkv", "out", "gate_up", "down")),
        *((name, Pointer) for name in ("qkv_bias", "out_bias", "gate_up_bias", "down_bias")),
    )


class _Slice(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("n", "row", "ranges", "capacity", "width")),
        *((name, Pointer) for name in ("range", "mask", "keys", "values")),
    )


def _load() -> Any:
    """The library, or None where it was not built or this processor lacks its instructions."""
    spec = importlib.util.find_spec("longstride.engine._native")
    if spec is None or spec.origin is None or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return None
    try:
        library = ctypes.CDLL(spec.origin)  # torch has loaded the OpenMP that it shares with this
    except OSError as error:
        log.warning("the compiled layer cannot be loaded (%s); torch's operations take its place, slower", error)
        return None
    long, number = ctypes.c_long, ctypes.c_int
    library.longstride_product.argtypes = [Pointer, Pointer, Pointer, Pointer, long, long, long, number]
    library.longstride_scratch.argtypes = [Pointer, long, Pointer, number, number]
    library.longstride_scratch.restype = long
    library.longstride_layer.argtypes = [Pointer, Pointer, long, Pointer, Pointer, Pointer, number, Pointer, number]
    return library


LIBRARY = _load()


def takes(weight: torch.Tensor) -> bool:
    """Whether a weight [out, in] on the CPU that fp16 holds can be multiplied here."""
    return LIBRARY is not None and weight.shape[0] % PANEL == 0


class Half:
    """The product with a weight kept in fp16: x [..., in] in fp32 -> [..., out]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.outputs, self.inputs = weight.shape
        panels = weight.half().view(-1, PANEL, self.inputs)
        self.panels = panels.transpose(1, 2).contiguous()
        self.bias = None if bias is None else bias.float().contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.outputs)
        rows, bias = x.numel() // self.inputs, _address(self.bias)
        LIBRARY.longstride_product(
            self.panels.data_ptr(), bias, x.data_ptr(), out.data_ptr(), rows, self.inputs, self.outputs,
            torch.get_num_threads(),
        )  # fmt: skip
        return out


class Step:
    """The slices of the forward under way as the compiled layer takes them; shared by a model's layers."""

    def __init__(self) -> None:
        self.slices: Any = None
        self._plan: Sequence[Slice] = ()
        self._held: list[Any] = []  # what the slices point to
        self._scratch = torch.empty(0)

    def begin(self, plan: Sequence[Slice]) -> None:
        """At a forward's first layer."""
        self._plan, self._held = plan, []
        self.slices = (_Slice * len(plan))()
        for own, piece in zip(self.slices, plan, strict=True):
            visible = ((0, piece.row),) if piece.visible is None else piece.visible
            ranges = (ctypes.c_int32 * (2 * len(visible)))(*(row for pair in visible for row in pair))
            mask = _added(piece.mask)
            own.n, own.row, own.ranges = len(piece.ids), piece.row, len(visible)
            own.capacity, own.width = piece.cache.keys[0].shape[1], 0 if mask is None else mask.shape[1]
            own.range, own.mask = ctypes.addressof(ranges), _address(mask)
            self._held += [ranges, mask]

    def layer(self, index: int) -> None:
        """Point to the caches' buffers of a layer."""
        for own, piece in zip(self.slices, self._plan, strict=True):
            own.keys, own.values = piece.cache.keys[index].data_ptr(), piece.cache.values[index].data_ptr()

    def scratch(self, numbers: int) -> int:
        """The address of memory for so many floats."""
        if self._scratch.numel() < numbers:
            self._scratch = torch.empty(numbers)
        return self._scratch.data_ptr()


class NativeLayer:
    """A layer whose products are all `Half`; `Block` has what it computes in torch's operations. Made by `layer`."""

    def __init__(self, step: Step, index: int, own: _Layer, held: object) -> None:
        self.step = step
        self.index = index
        self._own = own
        self._held = held  # what it points to

    def __call__(
        self, hidden: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, plan: Sequence[Slice]
    ) -> torch.Tensor:
        """hidden [1, T, h] of all slices, cosines and sines [1, T, head size] -> the same as hidden; in place but for
        the first layer."""
        step, own, rows = self.step, ctypes.addressof(self._own), hidden.shape[1]
        threads = torch.get_num_threads()
        cosines, sines = cosines.contiguous(), sines.contiguous()
        if self.index == 0:
            step.begin(plan)
            hidden = hidden.clone(memory_format=torch.contiguous_format)
        step.layer(self.index)
        slices, count = ctypes.addressof(step.slices), len(step.slices)
        scratch = step.scratch(LIBRARY.longstride_scratch(own, rows, slices, count, threads))
        LIBRARY.longstride_layer(
            own, hidden.data_ptr(), rows, cosines.data_ptr(), sines.data_ptr(), slices, count, scratch, threads
        )
        return hidden


def layer(
    step: Step,
    index: int,
    shape: LayerShape,
    heads: int,
    scaling: float,
    norms: Sequence[tuple[torch.Tensor, float]],
    products: Sequence[object],
) -> NativeLayer | None:
    """A layer compiled, or None for one that is not of this kind. `norms`: before attention and before the MLP, weight
    and epsilon; `products`: query, key and value; output; gate and up; down."""
    halves = [product for product in products if isinstance(product, Half)]
    (norm_in, epsilon_in), (norm_mlp, epsilon_mlp) = norms
    if len(halves) < len(products) or halves[-1].inputs % PANEL or shape.key_size % 8 or shape.key_size > MOST_SIZE:
        return None
    own = _Layer(
        halves[0].inputs, heads, shape.heads, shape.key_size, halves[-1].inputs, epsilon_in, epsilon_mlp, scaling,
        norm_in.data_ptr(), norm_mlp.data_ptr(), *(half.panels.data_ptr() for half in halves),
        *(_address(half.bias) for half in halves),
    )  # fmt: skip
    return NativeLayer(step, index, own, (norms, halves))


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _added(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A slice's mask as what is added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.float().contiguous()
    return torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)
