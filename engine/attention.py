"""The one attention function registered with transformers; it reads the step's plan.

A forward carries any number of slices as one row of tokens: the model's linear layers see them all at once, this
function splits them again, writes each slice's keys and values into its own cache and attends there. What a slice
sees is data (`visible`, `mask`), so chunked prefill, batching over sessions, passages beside the text, draft trees
and anchors are one mechanism.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional
from transformers import AttentionInterface

from longstride.engine.adapter import Adapter
from longstride.engine.cache import KVCache, LayerShape
from longstride.errors import ModelError

IMPLEMENTATION = "longstride"
Range = tuple[int, int]
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]
SPLIT_ROWS = 256  # a half of the keys shorter than this is not worth a merge
WIDE = 16 * 4096  # (new tokens x keys) up to which one kernel call under a wide mask beats two calls and a merge


@dataclass(eq=False)
class Slice:
    """New tokens of one cache in a forward.

    `row`: where their KV goes. `visible`: which earlier rows they see, as ascending ranges; None means all of
    `0 .. row-1`. `mask`: [n, m] over the last m of the rows that are visible and the new ones: who sees whom (bool), or
    what is added to the logits (float, -inf for unseen); None means causal among the new ones. `logits`: for how many
    of the last tokens logits are wanted. `drafted`: how many of the last tokens may be wrong; their rows are written,
    and not valid until they are kept. `adapter`: what acts on these rows besides the model. Slices of one cache may
    share a forward if they are in row order.
    """

    cache: KVCache
    ids: Sequence[int]
    positions: Sequence[int]
    row: int
    visible: tuple[Range, ...] | None = None
    mask: torch.Tensor | None = None
    logits: int = 0
    drafted: int = 0
    adapter: Adapter | None = None
    _bias: torch.Tensor | None = field(default=None, repr=False)

    @property
    def stop(self) -> int:
        """First row after this slice."""
        return self.row + len(self.ids)

    def bias(self, dtype: torch.dtype, device: torch.device, rows: int = 0, group: int = 1) -> torch.Tensor | None:
        """Additive mask of the new tokens over the last keys [group * n, m], or over all `rows` keys where that is
        few; None for a single token. Made once for all layers; `group` times the same, one below the other.
        """
        n = len(self.ids)
        if n == 1 and self.mask is None:
            return None
        m = n if self.mask is None else self.mask.shape[1]
        width = rows if m < rows and n > 1 and n * rows <= WIDE else m  # a single row's keys are better split
        if self._bias is None or self._bias.shape != (group * n, width):
            among = torch.ones(n, n, dtype=torch.bool).tril() if self.mask is None else self.mask
            bias = torch.zeros(n, width, dtype=dtype)
            if among.dtype == torch.bool:
                bias[:, width - m :].masked_fill_(~among, -math.inf)
            else:
                bias[:, width - m :] = among
            self._bias = bias.repeat(group, 1).to(device)
        return self._bias


def _visible_rows(buffer: torch.Tensor, piece: Slice) -> torch.Tensor:
    """The rows [heads, seen + n, size] that a slice sees, its own last; a view when they are contiguous."""
    if piece.visible is None:
        return buffer[:, : piece.stop]
    parts = [buffer[:, start:stop] for start, stop in piece.visible]
    return torch.cat([*parts, buffer[:, piece.row : piece.stop]], dim=1)


# Kernels: query [heads, n, d]; keys and values [kv heads, seen + n, d], the new tokens' own rows last; bias [n, m] is
# added over the last m keys, everything before them is visible. Query heads of one KV head are packed as rows.


def _matmul_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Two matmuls with a softmax in fp32 between them: meant for CPUs with bf16 instructions.

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
            scores.view(kv_heads, group, size, rows)[..., rows - bias.shape[1] :] += bias[start : start + size].float()
        weights = torch.softmax(scores, dim=-1).to(values.dtype)
        out[:, :, start : start + block] = (weights @ values).view(kv_heads, group, size, -1)
    return out.reshape(heads, n, -1)


def _flash_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """torch's CPU flash kernel, apart over what was there before (no mask) and over the new tokens (a small one).

    The mask [group * n, m] is packed as the query's rows are; a wide one covers all keys, which leaves one call. A
    single row is split over the keys as well, because there are fewer KV heads than it takes to keep all cores busy.
    Parts are merged by their log-sum-exp, which is exact (Milakov and Gimelshein 2018, arXiv 1805.02867).
    """
    heads, n, size = query.shape
    kv_heads, rows, _ = keys.shape
    seen = rows if bias is None else rows - bias.shape[1]
    packed = query.reshape(1, kv_heads, -1, size)
    outs: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> None:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=mask, scale=scaling
        )
        outs.append(out)
        sums.append(lse)

    half = seen // 2
    if n == 1 and half >= SPLIT_ROWS:
        # two halves as a batch of two: views of the same buffers
        attend(
            packed.expand(2, -1, -1, -1),
            torch.unflatten(keys[:, : 2 * half], 1, (2, half)).transpose(0, 1),
            torch.unflatten(values[:, : 2 * half], 1, (2, half)).transpose(0, 1),
            None,
        )
        if seen > 2 * half:
            attend(packed, keys[None, :, 2 * half : seen], values[None, :, 2 * half : seen], None)
    elif seen:
        attend(packed, keys[None, :, :seen], values[None, :, :seen], None)
    if bias is not None:
        attend(packed, keys[None, :, seen:], values[None, :, seen:], bias)
    if len(outs) == 1 and outs[0].shape[0] == 1:
        return outs[0].reshape(heads, n, -1)
    weights = torch.softmax(torch.cat(sums) if len(sums) > 1 else sums[0], dim=0)
    parts = torch.cat(outs) if len(outs) > 1 else outs[0]
    return (parts * weights[..., None]).sum(0).reshape(heads, n, -1)


def _sdpa_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """torch's dispatcher, for other devices and shapes."""
    heads, n, size = query.shape
    kv_heads, rows, _ = keys.shape
    if bias is None:
        packed = query.reshape(1, kv_heads, -1, size)
        out = functional.scaled_dot_product_attention(packed, keys[None], values[None], scale=scaling)
        return out.reshape(heads, n, -1)
    mask = functional.pad(bias, (rows - bias.shape[1], 0))
    return functional.scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=mask, scale=scaling, enable_gqa=heads != kv_heads
    )[0]


def _kernel(query: torch.Tensor, value: torch.Tensor) -> Kernel:
    """The kernel for this device and dtype (docs/methods.md says why)."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return _matmul_attention
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        return _flash_attention
    return _sdpa_attention


def attend(
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    plan: Sequence[Slice],
    shapes: dict[int, LayerShape] | None = None,
) -> torch.Tensor:
    """One layer's attention over all slices of a forward: query [heads, T, d], key and value [kv heads, T, d] ->
    [heads, T, d]. With `shapes` there is no plan: the layer's shape is recorded and the T tokens see each other.
    """
    if shapes is not None:
        shapes[layer] = LayerShape(key.shape[0], key.shape[2], value.shape[2])
        return functional.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=scaling, enable_gqa=True
        )[0]
    kernel = _kernel(query, value)
    outs: list[torch.Tensor] = []
    at = 0
    for piece in plan:
        n = len(piece.ids)
        piece.cache.write(layer, piece.row, key[:, at : at + n], value[:, at : at + n])
        keys = _visible_rows(piece.cache.keys[layer], piece)
        values = _visible_rows(piece.cache.values[layer], piece)
        shape = (keys.shape[1], query.shape[0] // keys.shape[0]) if kernel is _flash_attention else (0, 1)
        bias = piece.bias(query.dtype, query.device, *shape)
        outs.append(kernel(query[:, at : at + n], keys, values, bias, scaling))
        at += n
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


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

    Raises `ModelError` for attention this engine cannot truncate or does not compute.
    """
    layer = module.layer_idx
    if not isinstance(layer, int):
        raise ModelError("an attention layer has no index; this architecture is not supported")
    for name in ("sliding_window", "softcap", "s_aux"):
        if extra.get(name) is not None:
            raise ModelError(
                f"layer {layer} uses {name}, which Longstride does not support; use a full-attention model"
            )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = attend(layer, query[0], key[0], value[0], scale, plan, shapes)
    return out.transpose(0, 1)[None], None


# no masks are registered for it: the plan carries its own, and transformers then makes none
AttentionInterface.register(IMPLEMENTATION, attention)
