"""The one attention function registered with transformers; it reads the step's plan.

A forward carries any number of slices as one row of tokens: the model's linear layers see them all at once, this
function splits them again, writes each slice's keys and values into its own cache and attends there. What a slice
sees is data (`visible`, `mask`), so chunked prefill, batching over sessions, passages beside the text, draft trees
and anchors are one mechanism.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from longstride.engine.cache import KVCache, LayerShape
from longstride.errors import ModelError

IMPLEMENTATION = "longstride"
Range = tuple[int, int]


@dataclass(eq=False)
class Slice:
    """New tokens of one cache in a forward.

    `row`: where their KV goes. `visible`: which earlier rows they see, as ascending ranges; None means all of
    `0 .. row-1`. `mask`: bool [n, n], who sees whom among themselves; None means causal. `logits`: for how many
    of the last tokens logits are wanted. Slices of one cache may share a forward if they are in row order.
    """

    cache: KVCache
    ids: Sequence[int]
    positions: Sequence[int]
    row: int
    visible: tuple[Range, ...] | None = None
    mask: torch.Tensor | None = None
    logits: int = 0
    _bias: torch.Tensor | None = field(default=None, repr=False)

    @property
    def stop(self) -> int:
        """First row after this slice."""
        return self.row + len(self.ids)

    def bias(self, seen: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """Additive mask [n, seen + n], or None when everything is visible; made once for all layers."""
        n = len(self.ids)
        if n == 1 and self.mask is None:
            return None
        if self._bias is None:
            among = torch.ones(n, n, dtype=torch.bool).tril() if self.mask is None else self.mask
            bias = torch.zeros(n, seen + n, dtype=dtype)
            bias[:, seen:].masked_fill_(~among, -math.inf)
            self._bias = bias.to(device)
        return self._bias


def _visible_rows(buffer: torch.Tensor, piece: Slice) -> torch.Tensor:
    """The rows [heads, seen + n, size] that a slice sees, its own last; a view when they are contiguous."""
    if piece.visible is None:
        return buffer[:, : piece.stop]
    parts = [buffer[:, start:stop] for start, stop in piece.visible]
    return torch.cat([*parts, buffer[:, piece.row : piece.stop]], dim=1)


def _matmul_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Packed-heads attention: the query heads of a KV head become rows of one matmul, softmax in fp32.

    query [heads, n, d], keys and values [kv heads, rows, d]. On CPU in bf16 this is several times faster than sdpa.
    Query rows are taken in blocks so that the scores stay small.
    """
    heads, n, _ = query.shape
    kv_heads, rows, _ = keys.shape
    group = heads // kv_heads
    packed = query.reshape(kv_heads, group, n, -1)
    out = torch.empty(kv_heads, group, n, values.shape[-1], dtype=query.dtype, device=query.device)
    block = max(1, 4_000_000 // (heads * rows))
    for start in range(0, n, block):
        part = packed[:, :, start : start + block]
        size = part.shape[2]
        scores = (part.reshape(kv_heads, group * size, -1) @ keys.transpose(1, 2)).float() * scaling
        if bias is not None:
            scores.view(kv_heads, group, size, rows).add_(bias[start : start + size].float())
        weights = torch.softmax(scores, dim=-1).to(values.dtype)
        out[:, :, start : start + block] = (weights @ values).view(kv_heads, group, size, -1)
    return out.reshape(heads, n, -1)


def _sdpa_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """The same by torch's kernel; without a mask the grouped heads are packed as rows, which every kernel takes."""
    heads, n, size = query.shape
    kv_heads = keys.shape[0]
    if bias is None:
        packed = query.reshape(1, kv_heads, -1, size)
        out = functional.scaled_dot_product_attention(packed, keys[None], values[None], scale=scaling)
        return out.reshape(heads, n, -1)
    return functional.scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=bias, scale=scaling, enable_gqa=heads != kv_heads
    )[0]


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    scaling: float | None = None,
    plan: Sequence[Slice] = (),
    shapes: dict[int, LayerShape] | None = None,
    **extra: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, heads, T, d], key and value [1, kv heads, T, d].

    With `shapes` it only records the layer's shape (the runner's probe). Raises `ModelError` for attention this
    engine cannot truncate or does not compute.
    """
    layer = module.layer_idx
    if not isinstance(layer, int):
        raise ModelError("an attention layer has no index; this architecture is not supported")
    for name in ("sliding_window", "softcap", "s_aux"):
        if extra.get(name) is not None:
            raise ModelError(
                f"layer {layer} uses {name}, which Longstride does not support; use a full-attention model"
            )
    if shapes is not None:
        shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2), None
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    # sdpa's CPU kernel is the slow part in bf16 and the fast one in fp32 (measured; see docs/methods.md)
    kernel = _matmul_attention if query.device.type == "cpu" and query.dtype == torch.bfloat16 else _sdpa_attention
    outs: list[torch.Tensor] = []
    at = 0
    for piece in plan:
        n = len(piece.ids)
        piece.cache.write(layer, piece.row, key[0, :, at : at + n], value[0, :, at : at + n])
        keys = _visible_rows(piece.cache.keys[layer], piece)
        values = _visible_rows(piece.cache.values[layer], piece)
        bias = piece.bias(keys.shape[1] - n, query.dtype, query.device)
        outs.append(kernel(query[0, :, at : at + n], keys, values, bias, scale))
        at += n
    return torch.cat(outs, dim=1).transpose(0, 1)[None], None


def _no_mask(*_args: object, **_kwargs: object) -> None:
    """transformers asks for a mask per forward; the plan carries its own."""


AttentionInterface.register(IMPLEMENTATION, attention)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
