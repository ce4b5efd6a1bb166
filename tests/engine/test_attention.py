"""Every attention kernel against the definition."""

import math

import pytest
import torch

from longstride.engine import attention


def by_definition(query, keys, values, bias, scaling):
    """softmax(q k / scale + mask) v, head by head, in fp64."""
    heads, n, _ = query.shape
    group = heads // keys.shape[0]
    out = []
    for head in range(heads):
        scores = query[head].double() @ keys[head // group].double().T * scaling
        if bias is not None:
            scores[:, -n:] += bias.double()
        out.append(torch.softmax(scores, -1) @ values[head // group].double())
    return torch.stack(out)


@pytest.mark.parametrize("kernel", [attention._matmul_attention, attention._flash_attention, attention._sdpa_attention])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (8, 1)])
@pytest.mark.parametrize(("seen", "n"), [(0, 1), (7, 1), (1023, 1), (1024, 1), (0, 33), (700, 5), (64, 144)])
def test_kernels_equal_the_definition(kernel, heads, kv_heads, seen, n):
    torch.manual_seed(1)
    query = torch.randn(heads, n, 32)
    buffer_k, buffer_v = torch.randn(2, kv_heads, 2048, 32)
    keys, values = buffer_k[:, : seen + n], buffer_v[:, : seen + n]  # views with the buffer's strides
    bias = torch.zeros(n, n).masked_fill_(~torch.ones(n, n).tril().bool(), -math.inf) if n > 1 else None
    packed = bias if bias is None or kernel is not attention._flash_attention else bias.repeat(heads // kv_heads, 1)
    ours = kernel(query, keys, values, packed, 0.2)
    torch.testing.assert_close(ours.double(), by_definition(query, keys, values, bias, 0.2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wide", [0, attention.WIDE])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4)])
def test_a_tree_is_masked_alike_in_one_call_and_in_two(monkeypatch, wide, heads, kv_heads):
    """Rows of a draft: each sees what was there before, its ancestors and itself."""
    monkeypatch.setattr(attention, "WIDE", wide)
    torch.manual_seed(3)
    seen, mask = 300, torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
    query = torch.randn(heads, 4, 32)
    keys, values = torch.randn(2, kv_heads, seen + 4, 32)
    piece = attention.Slice(None, [1, 2, 3, 4], [300, 301, 301, 302], seen, mask=mask)
    bias = piece.bias(query.dtype, query.device, seen + 4, heads // kv_heads)
    assert bias.shape == (heads // kv_heads * 4, seen + 4 if wide else 4)
    ours = attention._flash_attention(query, keys, values, bias, 0.2)
    small = torch.zeros(4, 4).masked_fill_(~mask, -math.inf)
    torch.testing.assert_close(ours.double(), by_definition(query, keys, values, small, 0.2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seen", [5, 1200])
def test_the_bf16_kernel_is_as_close_as_bf16_allows(seen):
    torch.manual_seed(2)
    query = torch.randn(9, 4, 32, dtype=torch.bfloat16)
    keys, values = torch.randn(2, 3, seen + 4, 32, dtype=torch.bfloat16)
    ours = attention._matmul_attention(query, keys, values, None, 0.2)
    torch.testing.assert_close(ours.double(), by_definition(query, keys, values, None, 0.2), atol=2e-2, rtol=2e-2)
