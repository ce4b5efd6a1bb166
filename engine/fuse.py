"""Cheaper forwards through the same weights, built once at load.

A decode step on a CPU streams all weights through small products, and between them runs hundreds of operations that
take a few microseconds each. So a weight is laid out once in the blocks that oneDNN's kernels read (else they reorder
it at every call), the projections of one input become one product, and a layer of the widespread kind (RMS norms,
rotary positions, gated MLP: Llama, Mistral, Qwen2, SmolLM ...) runs as the bare operations without a module between
them. Every replaced layer is first compared with the original on random input; what differs stays as it was.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from longstride.engine import native
from longstride.engine.attention import attend
from longstride.engine.cache import LayerShape
from longstride.errors import ModelError

Linear = Callable[[torch.Tensor], torch.Tensor]
FREE_ROWS = 5  # where the layers are not compiled; a guess
PACK_ROWS = 32  # a hint to oneDNN: the rows of input to lay the weight out for
PARTS = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}


class Adapted:
    """Which rows of the forward under way have an adapter; shared by a model's products, set by its runner."""

    def __init__(self) -> None:
        self.rows = 0
        self.spans: Sequence[native.Span] = ()

    def add(self, name: str, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add the adapters' parts of the product `name` of `x` [..., in] to `out` [..., out]."""
        x, out = x.flatten(0, -2), out.view(-1, out.shape[-1])
        for start, stop, adapter in self.spans:
            factors = adapter.factors.get(name)
            if factors is not None:
                if len(x) != self.rows:
                    raise ModelError(
                        f"adapter {adapter.name}: {name} sees a part of the rows only, as experts do; "
                        "use an adapter that leaves it alone"
                    )
                out[start:stop].addmm_(x[start:stop] @ factors[0], factors[1])


class Product:
    """The product with the weights of one or several layers joined, one layer's outputs behind the other's, and on top
    the low-rank products of adapters on their rows. `sizes`: the layers' outputs by path; `name`: the first path;
    `out`: the dtype of the outputs, if another than the weights' is to be had.
    """

    def __init__(
        self,
        layers: dict[str, Any],
        adapted: Adapted,
        library: native.Library | None,
        out: torch.dtype | None = None,
    ) -> None:
        weights = [_weight(layer) for layer in layers.values()]
        self.name = next(iter(layers))
        self.inputs: int = weights[0].shape[1]
        self.sizes = {path: weight.shape[0] for path, weight in zip(layers, weights, strict=True)}
        self.run = _linear(library, weights, [layer.bias for layer in layers.values()], out)
        self.adapted = adapted

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = self.run(x)
        if self.adapted.spans:
            self.adapted.add(self.name, x, out)
        return out


def fuse(model: Any, adapted: Adapted) -> dict[str, Product]:
    """Make `model` (in evaluation, without adapters attached, its attention set to ours) cheaper in place.

    What it computes stays the same up to rounding. Unusual layers are left as they are. Returns the products that
    adapters can act on, by the paths of the layers they stand for.
    """
    signed, library = _Signed(), _library(model)
    products: dict[str, Product] = {}

    def replace(path: str, layers: nn.ModuleList, at: int) -> None:
        block = Block(layers[at], signed, f"{path}.{at}", adapted, library)
        if _agree(layers[at], block, model.dtype, model.device):
            layers[at] = block
            products.update({part: product for product in block.products for part in product.sizes})

    found = [
        (path, layers, at)
        for path, layers in model.named_modules()
        if isinstance(layers, nn.ModuleList)
        for at, layer in enumerate(layers)
        if _has_known_parts(layer)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # packing uses one core a weight
        for _ in pool.map(replace, *zip(*found, strict=True)) if found else ():
            pass
    for layers in {id(layers): layers for _, layers, _ in found}.values():
        _join(layers, model, adapted)
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        for name, child in module.named_children():
            if type(child) in (nn.Linear, Conv1D):
                # logits keep what their sums have: in bf16 near ones would be the same number
                wide = torch.float32 if child is head else None
                product = Product({f"{path}.{name}" if path else name: child}, adapted, library, wide)
                setattr(module, name, _Layer(product))
                if child is not head:  # it sees the rows whose logits are wanted only
                    products[product.name] = product
    return products


def _library(model: Any) -> native.Library | None:
    """What compiles `model`: in bf16 all of it, in fp32 each layer that it holds."""
    if model.device.type != "cpu":
        return None
    linear = [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]
    return native.library(model.dtype, [_weight(x) for x in linear] if model.dtype == torch.bfloat16 else ())


def rows_at_once(model: Any) -> int:
    """Rows of a forward that share a pass over the weights: their products are done while these are on their way."""
    return next((stack.native.library.rows for stack in model.modules() if isinstance(stack, Stack)), FREE_ROWS)


def _join(layers: nn.ModuleList, model: Any, adapted: Adapted) -> None:
    """Put a `Stack` in the place of consecutive layers that can be compiled."""
    compiled = [layer.compiled if isinstance(layer, Block) else None for layer in layers]
    if model.dtype != torch.float32 and None in compiled:
        return  # what compiled layers hand on is fp32, which the others would not take
    joined: list[nn.Module] = []
    for layer, own in zip(layers, compiled, strict=True):
        last = joined[-1] if joined else None
        if own is None:
            joined.append(layer)
        elif isinstance(last, Stack) and last.native.join(own):
            last.blocks.append(layer)
        else:
            joined.append(Stack(layer, own, adapted))
    del layers[:]
    layers.extend(joined)


class Stack(nn.Module):
    """Consecutive layers, hidden [1, T, h] -> [1, T, h]: one call of what is compiled, or one block after the other
    where that cannot be (large adapters, a probe)."""

    def __init__(self, block: nn.Module, compiled: native.Layer, adapted: Adapted) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])
        self.native = native.Layers(compiled)
        self.adapted = adapted

    def forward(
        self,
        hidden: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        plan: Any = (),
        shapes: dict[int, LayerShape] | None = None,
        **_extra: object,
    ) -> torch.Tensor:
        """As `Block` has it."""
        spans = self.adapted.spans
        if shapes is None and self.native.takes(spans):
            return self.native(hidden, position_embeddings, plan, spans)
        for block in self.blocks:
            hidden = block(hidden, position_embeddings=position_embeddings, plan=plan, shapes=shapes)
        return hidden


class Block(nn.Module):
    """One layer: hidden [1, T, h] -> [1, T, h], as transformers' decoder layers are called."""

    def __init__(
        self, layer: Any, signed: "_Signed", path: str, adapted: Adapted, library: native.Library | None
    ) -> None:
        super().__init__()
        self.signed = signed
        self.adapted = adapted
        attention, mlp = layer.self_attn, layer.mlp

        def product(*names: str) -> Product:
            return Product({f"{path}.{name}": layer.get_submodule(name) for name in names}, adapted, library)

        self.index: int = attention.layer_idx
        self.head_size: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.qkv = product("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.out = product("self_attn.o_proj")
        self.gate_up = product("mlp.gate_proj", "mlp.up_proj")
        self.down = product("mlp.down_proj")
        self.products = (self.qkv, self.out, self.gate_up, self.down)
        self.heads: int = attention.q_proj.out_features // self.head_size
        self.kv_heads: int = attention.k_proj.out_features // self.head_size
        self.activation: Callable[[torch.Tensor], torch.Tensor] = mlp.act_fn.forward
        self.norm_in = _norm(layer.input_layernorm)
        self.norm_mlp = _norm(layer.post_attention_layernorm)
        self.compiled = self._compiled(layer)

    def _compiled(self, layer: Any) -> native.Layer | None:
        """The same layer compiled, if it is of the kind that is."""
        norms = [_rms(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        runs = {product.name: product.run for product in self.products}
        shape = LayerShape(self.kv_heads, self.head_size, self.head_size)
        if not _is_silu(self.activation):
            return None
        return native.layer(self.index, shape, self.heads, self.scaling, norms, runs)

    def forward(
        self,
        hidden: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        plan: Any = (),
        shapes: dict[int, LayerShape] | None = None,
        **_extra: object,
    ) -> torch.Tensor:
        """See the class. `position_embeddings`: cosines and sines [1, T, head size]."""
        cos, sin = position_embeddings
        x = hidden[0]
        heads = self.qkv(self.norm_in(x)).view(x.shape[0], -1, self.head_size).transpose(0, 1)
        rotated, value = torch.split(heads, [self.heads + self.kv_heads, self.kv_heads])
        # x1 cos - x2 sin, x2 cos + x1 sin, for the halves x1 and x2
        rotated = torch.addcmul(rotated * cos, rotated.roll(self.head_size // 2, -1), self.signed(sin))
        query, key = torch.split(rotated, [self.heads, self.kv_heads])
        seen = attend(self.index, query, key, value, self.scaling, plan, shapes)
        x = x + self.out(seen.transpose(0, 1).flatten(1))
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, -1)
        return (x + self.down(self.activation(gate) * up))[None]


class _Signed:
    """Sines with the first half negated, made once a forward: all layers get the same tensor."""

    def __init__(self) -> None:
        self._held = (torch.empty(0), torch.empty(0))  # sines, and the same signed; one object, so threads see a pair

    def __call__(self, sin: torch.Tensor) -> torch.Tensor:
        held = self._held
        if held[0] is not sin:
            first, second = sin.chunk(2, -1)
            held = self._held = (sin, torch.cat((-first, second), -1))
        return held[1]


def _is_silu(activation: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    probe = torch.linspace(-20, 20, 101)  # by what it does: every family has a class of its own for it
    return torch.equal(activation(probe), functional.silu(probe))


def _has_known_parts(layer: nn.Module) -> bool:
    """Whether a layer consists of just what `Block` computes."""
    for path, names in PARTS.items():
        part = layer.get_submodule(path) if hasattr(layer, "self_attn") and hasattr(layer, "mlp") else None
        if part is None or {name for name, _ in part.named_children()} != names:
            return False
    linear = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    return all(type(m) is nn.Linear for m in linear) and hasattr(layer.self_attn, "head_dim")


@torch.inference_mode()
def _agree(layer: Any, block: Block, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether both give the same for a few random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens, size = 5, block.head_size
    hidden = torch.randn(1, tokens, layer.self_attn.q_proj.in_features, generator=generator).to(device, dtype)
    angles = torch.arange(tokens)[:, None] / torch.arange(1, size // 2 + 1)
    angles = torch.cat((angles, angles), -1)[None]
    turn = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    extra: dict[str, Any] = {"attention_mask": None, "shapes": {}}
    expected = layer(hidden, position_embeddings=turn, **extra)
    found = block(hidden, position_embeddings=turn, **extra)
    expected = expected[0] if isinstance(expected, tuple) else expected
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    return expected.shape == found.shape and torch.allclose(
        found - hidden, expected - hidden, atol=tolerance * float((expected - hidden).abs().max()), rtol=tolerance
    )


def _packs(weight: torch.Tensor) -> bool:
    """Whether packing pays: measured for fp32 on an x86 CPU with AVX2."""
    avx = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    there = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and avx and there


def _weight(layer: Any) -> torch.Tensor:
    """A layer's weight [out, in]; GPT-2's kind keeps it the other way round."""
    weight: torch.Tensor = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def _linear(
    library: native.Library | None,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    out: torch.dtype | None = None,
) -> Linear:
    """The product with several layers' weights joined, one layer's outputs behind the other's; a compiled one's in
    `out`."""
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    bias = None
    if any(part is not None for part in biases):
        pairs = zip(weights, biases, strict=True)
        bias = torch.cat([own.new_zeros(len(own)) if part is None else part.detach() for own, part in pairs])
    if library is not None and library.dtype == weight.dtype and library.holds(weight):
        return native.Packed(library, weight, bias, out)
    if not _packs(weight):
        return lambda x: functional.linear(x, weight, bias)
    weight = weight.contiguous()
    if "fbgemm" in torch.backends.quantized.supported_engines and native.fits_half(weight):
        # fp16 weights, fp32 inputs and sums: half the bytes to stream for a decode step
        half = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        half_product = torch.ops.quantized.linear_dynamic_fp16.default
        return lambda x: half_product(x, half)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: product(x, packed, bias, "none", [], "")


class _Layer(nn.Module):
    """Stands for a linear layer outside the blocks (the language-model head, layers of other families)."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self.product = product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same product."""
        return self.product(x)


def _rms(layer: Any) -> tuple[torch.Tensor, float]:
    """The weight and the epsilon of an RMS norm."""
    return layer.weight.detach(), getattr(layer, "variance_epsilon", 1e-6)


def _norm(layer: Any) -> Linear:
    """RMS norm [T, h]. In fp32 as five small operations: torch's own takes three times as long for one row."""
    weight, epsilon = _rms(layer)
    if weight.dtype != torch.float32:
        return lambda x: functional.rms_norm(x, weight.shape, weight, epsilon)
    offset = weight.new_tensor([[epsilon]])

    def norm(x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * torch.addcmul(offset, length, length, value=1 / x.shape[-1]).rsqrt_()).mul_(weight)

    return norm
