"""The compiled layer and product (`native.h`): which weights and layers qualify, and how they are called.

They are built at installation where there is a compiler for them, once for each kind of processor; without them
everything runs in torch's operations.
"""

import ctypes
import importlib.util
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch

from longstride.engine.adapter import Adapter, Factors
from longstride.engine.attention import Slice
from longstride.engine.cache import LayerShape

MOST = 256  # the largest size of a head, the largest rank of an adapter; as in native.h
SMALLEST, LARGEST = 3e-4, 1000.0  # what the largest of bf16's weights may be that fp16 is to hold

log = logging.getLogger("longstride")
Pointer = ctypes.c_void_p
Span = tuple[int, int, Adapter]  # rows of a forward, from .. to, and what acts on them


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("index", "hidden", "heads", "kv_heads", "size", "inner")),
        *((name, ctypes.c_float) for name in ("epsilon_in", "epsilon_mlp", "scaling")),
        *((name, Pointer) for name in ("norm_in", "norm_mlp", "qkv", "out", "gate_up", "down")),
        *((name, Pointer) for name in ("qkv_bias", "out_bias", "gate_up_bias", "down_bias")),
    )


class _Slice(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("n", "row", "ranges", "capacity", "width")),
        *((name, Pointer) for name in ("range", "mask", "buffers")),
    )


class _LowRank(ctypes.Structure):
    _fields_ = (("rank", ctypes.c_int32), ("cells", ctypes.c_int32), ("down", Pointer), ("up", Pointer))


class _Span(ctypes.Structure):
    _fields_ = (("start", ctypes.c_int32), ("stop", ctypes.c_int32), ("low", Pointer))


@dataclass(frozen=True)
class Library:
    """One build of native.h. `dtype`: of the model and its cache; `number`: of what goes into a product; `width`: of
    two registers, in fp32; `rows`: of input that share a pass over the weights."""

    name: str
    dtype: torch.dtype
    number: torch.dtype
    width: int
    rows: int
    calls: Any

    @property
    def kept(self) -> torch.dtype:
        """What the model's weights are kept in."""
        return torch.float16 if self.dtype == torch.float32 or self.number == torch.float16 else self.dtype

    @property
    def pair(self) -> int:
        """Numbers of a cell."""
        return 2 if self.number == torch.bfloat16 else 1

    @property
    def block(self) -> int:
        """Numbers that are multiplied as a whole: cells, or those that share a scale."""
        return self.width if self.number == torch.float16 else self.pair

    @property
    def panel(self) -> int:
        """Outputs of a weight that stand side by side."""
        return 2 * self.width if self.number == torch.float16 else self.width

    def holds(self, weight: torch.Tensor) -> bool:
        """Whether a weight can be kept here: of fp32 without loss; of bf16 without one that bf16 would notice.

        Weights of bf16 are fp16 without loss too, but for those below 2^-14, which lose up to 2^-25; and 32 products
        with inputs below 2 must not overflow.
        """
        if self.dtype == torch.float32:
            return fits_half(weight)
        if self.number == torch.float16:
            most = largest(weight)
            return most == 0 or SMALLEST <= most < LARGEST
        return weight.shape[1] % self.pair == 0

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight [out, in] as panels of whole blocks [out / panel, in / pair, panel, pair], filled up with zeros.

        bf16 that is multiplied in fp32: each output of a panel's first half stands before one of its second, so that
        two instructions make numbers of both.
        """
        outputs, inputs = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -inputs % self.block, 0, -outputs % self.panel))
        panels = padded.view(-1, self.panel, padded.shape[1] // self.pair, self.pair).transpose(1, 2)
        if weight.dtype == torch.bfloat16 != self.number:
            panels = panels.reshape(*panels.shape[:2], 2, -1, self.pair).transpose(2, 3).flatten(2, 3)
        return panels.contiguous()


_AVX512 = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
# name, dtype, number, width, rows, what the processor must have
_BUILDS = (
    ("bf16", torch.bfloat16, torch.bfloat16, 32, 14, (*_AVX512, "avx512_bf16")),
    ("bf16_fp16", torch.bfloat16, torch.float16, 32, 14, (*_AVX512, "avx512_fp16")),
    ("bf16_fp32", torch.bfloat16, torch.float32, 32, 14, _AVX512),
    ("avx512", torch.float32, torch.float32, 32, 14, _AVX512),
    ("avx2", torch.float32, torch.float32, 16, 6, ("avx2",)),  # whatever has it has FMA and F16C
)


def _load(
    name: str, dtype: torch.dtype, number: torch.dtype, width: int, rows: int, needs: Sequence[str]
) -> Library | None:
    """A build, or None where it was not made or this processor lacks its instructions."""
    spec = importlib.util.find_spec(f"longstride.engine._native_{name}")
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if spec is None or spec.origin is None or not all(has.get(need) for need in needs):
        return None
    try:
        calls = ctypes.CDLL(spec.origin)  # torch has loaded the OpenMP that it shares with this
    except OSError as error:
        log.warning("the compiled layer cannot be loaded (%s); torch's operations take its place, slower", error)
        return None
    long, short = ctypes.c_long, ctypes.c_int
    calls.longstride_row.argtypes, calls.longstride_row.restype = [long], long
    calls.longstride_product.argtypes = [Pointer, Pointer, Pointer, Pointer, long, long, long, Pointer, short]
    calls.longstride_scratch.argtypes = [Pointer, long, Pointer, short, short]
    calls.longstride_scratch.restype = long
    calls.longstride_layers.argtypes = [
        Pointer, short, Pointer, long, Pointer, Pointer, Pointer, short, Pointer, short, Pointer, short
    ]  # fmt: skip
    return Library(name, dtype, number, width, rows, calls)


LIBRARIES = tuple(filter(None, (_load(*build) for build in _BUILDS)))
_choosing = threading.Lock()


def library(dtype: torch.dtype, weights: Sequence[torch.Tensor] = ()) -> Library | None:
    """The fastest build for a model of `dtype` on this CPU, of those that hold all these weights. A model has one:
    weights that one build packed mean nothing to another."""
    with _choosing:  # measurements beside each other would say little
        ranked = sorted((one for one in LIBRARIES if one.dtype == dtype), key=_seconds)
    return next((one for one in ranked if all(map(one.holds, weights))), None)


@cache
def _seconds(library: Library) -> float:
    """What a product takes whose weights stay in the caches. Which build is faster depends on the processor: bf16's
    instruction takes AMD's half the time that fp32 takes, and Intel's twice (measured: Zen 5, Emerald Rapids).

    On one thread: waiting for others would take longer than the product."""
    product, x = Packed(library, torch.zeros(512, 512), None), torch.zeros(56, 512)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        product(x, threads=1)
        times.append(time.perf_counter() - began)
    return min(times)


class Packed:
    """The product with a weight [out, in] that a library holds, in its panels: x [..., in] -> [..., out] in `out`,
    fp32 or the library's dtype."""

    def __init__(
        self, library: Library, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.dtype | None = None
    ) -> None:
        self.library = library
        self.outputs, self.inputs = weight.shape
        self.panels = library.pack(weight.to(library.kept))
        self._row = library.calls.longstride_row(self.inputs)
        self.bias = None if bias is None else bias.float().contiguous()
        self.out = library.dtype if out is None else out

    def __call__(self, x: torch.Tensor, threads: int | None = None) -> torch.Tensor:
        x = x.float().contiguous()
        rows, out = x.numel() // self.inputs, torch.empty(*x.shape[:-1], self.outputs)
        scratch = torch.empty(rows * self._row)
        self.library.calls.longstride_product(
            self.panels.data_ptr(), _address(self.bias), x.data_ptr(), out.data_ptr(), rows, self.inputs, self.outputs,
            scratch.data_ptr(), threads or torch.get_num_threads(),
        )  # fmt: skip
        return out.to(self.out)


@dataclass(frozen=True)
class Layer:
    """A layer of the compiled kind, made by `layer`. `names`: of its products; `held`: what `own` points to."""

    library: Library
    own: _Layer
    names: Sequence[str]
    held: object


class Layers:
    """Consecutive layers of one shape, run in one call; `Block` has what each computes in torch's operations."""

    def __init__(self, layer: Layer) -> None:
        self.library = layer.library
        self._layers = [layer]
        self._scratch = torch.empty(0)
        self._adapters: WeakKeyDictionary[Adapter, tuple[Any, object]] = WeakKeyDictionary()
        self._taken: WeakKeyDictionary[Adapter, bool] = WeakKeyDictionary()
        self._own: Any = (_Layer * 1)(layer.own)

    def join(self, layer: Layer) -> bool:
        """Put a layer behind the others, if it is the next and of their shape."""
        last = self._layers[-1].own
        shape = ("hidden", "heads", "kv_heads", "size", "inner")
        if layer.library is not self.library or layer.own.index != last.index + 1:
            return False
        if any(getattr(layer.own, x) != getattr(last, x) for x in shape):
            return False
        self._layers.append(layer)
        self._own = (_Layer * len(self._layers))(*(layer.own for layer in self._layers))
        return True

    def takes(self, spans: Sequence[Span]) -> bool:
        """Whether these adapters can act here."""
        return all(self._takes(adapter) for _, _, adapter in spans)

    def _takes(self, adapter: Adapter) -> bool:
        if adapter not in self._taken:
            factors = adapter.factors.values()
            most = LARGEST if self.library.number == torch.float16 else math.inf
            held = all(largest(factor) < most for pair in factors for factor in pair)
            self._taken[adapter] = held and all(down.shape[1] <= MOST for down, _ in factors)
        return self._taken[adapter]

    def __call__(
        self,
        hidden: torch.Tensor,
        turn: tuple[torch.Tensor, torch.Tensor],
        plan: Sequence[Slice],
        spans: Sequence[Span],
    ) -> torch.Tensor:
        """hidden [1, T, h] of all slices, turn: cosines and sines [1, T, head size] -> the same as hidden, in fp32."""
        hidden = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        rows, threads, calls = hidden.shape[1], torch.get_num_threads(), self.library.calls
        cosines, sines = (part.float().contiguous() for part in turn)
        slices, _held = _slices(plan)
        adapted = (_Span * len(spans))(*(_Span(start, stop, self._low(adapter)) for start, stop, adapter in spans))
        own, at, count = ctypes.addressof(self._own), ctypes.addressof(slices), len(slices)
        needed = calls.longstride_scratch(own, rows, at, count, threads)
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed)
        calls.longstride_layers(
            own, len(self._layers), hidden.data_ptr(), rows, cosines.data_ptr(), sines.data_ptr(), at, count,
            ctypes.addressof(adapted), len(adapted), self._scratch.data_ptr(), threads,
        )  # fmt: skip
        return hidden

    def _low(self, adapter: Adapter) -> int:
        """The address of an adapter's factors as these layers take them."""
        if adapter not in self._adapters:
            names = [name for layer in self._layers for name in layer.names]
            packed = [self._packed(adapter.factors.get(name)) for name in names]
            low = (_LowRank * len(names))(
                *(_LowRank(rank, cells, _address(down), _address(up)) for rank, cells, down, up in packed)
            )
            self._adapters[adapter] = low, packed
        return ctypes.addressof(self._adapters[adapter][0])

    def _packed(self, factors: Factors | None) -> tuple[int, int, torch.Tensor | None, torch.Tensor | None]:
        """Rank in whole panels, cells of a column of the second factor, and both factors in panels."""
        if factors is None:
            return 0, 0, None, None
        down, up = (factor.T.to(self.library.number) for factor in factors)
        rank, library = len(down), self.library
        cells = (rank + -rank % library.block) // library.pair
        return rank + -rank % library.panel, cells, library.pack(down), library.pack(up)


def _slices(plan: Sequence[Slice]) -> tuple[Any, object]:
    """The slices of a forward as compiled layers take them, and what they point to."""
    slices, held = (_Slice * len(plan))(), []
    for own, piece in zip(slices, plan, strict=True):
        visible = ((0, piece.row),) if piece.visible is None else piece.visible
        ranges = (ctypes.c_int32 * (2 * len(visible)))(*(row for pair in visible for row in pair))
        mask = _added(piece.mask)
        own.n, own.row, own.ranges, own.range = len(piece.ids), piece.row, len(visible), ctypes.addressof(ranges)
        own.mask, own.width = _address(mask), 0 if mask is None else mask.shape[1]
        own.capacity, own.buffers = piece.cache.capacity, piece.cache.addresses.ctypes.data
        held.append((ranges, mask))
    return slices, held


def layer(
    index: int,
    shape: LayerShape,
    heads: int,
    scaling: float,
    norms: Sequence[tuple[torch.Tensor, float]],
    products: Mapping[str, object],
) -> Layer | None:
    """A layer compiled, or None for one that is not of this kind. `norms`: before attention and before the MLP, weight
    and epsilon; `products`: query, key and value; output; gate and up; down; by their names."""
    packed = [product for product in products.values() if isinstance(product, Packed)]
    if len(packed) < len(products) or shape.key_size % 8 or shape.key_size > MOST:
        return None
    library, hidden, inner = packed[0].library, packed[0].inputs, packed[-1].inputs
    if hidden % library.width or inner % library.width or any(one.library is not library for one in packed):
        return None
    weights = [weight.float().contiguous() for weight, _ in norms]
    # in one buffer, because the system maps large ones by large pages, which are read faster
    panels = torch.split(torch.cat([one.panels.flatten() for one in packed]), [one.panels.numel() for one in packed])
    for one, part in zip(packed, panels, strict=True):
        one.panels = part.view(one.panels.shape)
    own = _Layer(
        index, hidden, heads, shape.heads, shape.key_size, inner, *(epsilon for _, epsilon in norms), scaling,
        *(weight.data_ptr() for weight in weights), *(one.panels.data_ptr() for one in packed),
        *(_address(one.bias) for one in packed),
    )  # fmt: skip
    return Layer(library, own, list(products), (weights, packed))


def fits_half(weight: torch.Tensor) -> bool:
    """Whether fp16 holds these weights without loss, as it does for checkpoints stored in fp16 or bf16.

    The smallest of bf16 are rounded, by less than what fp32 rounds in any product with the largest.
    """
    return largest(weight.half().float().sub_(weight)) <= 1e-7 * largest(weight)


def largest(weight: torch.Tensor) -> float:
    """The largest of these numbers, whatever its sign."""
    low, high = torch.aminmax(weight)
    return max(-float(low), float(high))


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _added(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A slice's mask as what is added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.float().contiguous()
    return torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)
