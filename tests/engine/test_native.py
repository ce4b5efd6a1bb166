"""The compiled layer against the same layer in torch's operations, and rows that do not depend on their company."""

import platform
import shutil

import pytest
import torch
from torch.nn import functional

from longstride.engine import native
from longstride.engine.attention import Slice
from longstride.engine.cache import KVCache
from longstride.engine.fuse import Block
from longstride.engine.runner import ModelRunner
from tests.tiny import fresh_model

ROWS = [1, 2, 5, 6, 7, 13, 48, 49, 100]


def test_it_is_built_where_there_is_a_compiler_for_it():
    if platform.machine() == "x86_64" and shutil.which("cc"):
        assert native.LIBRARY is not None


def test_one_that_cannot_be_loaded_is_told_and_done_without(monkeypatch, caplog):
    def refuse(_path):
        raise OSError("undefined symbol: GOMP_parallel")

    if native.LIBRARY is None:
        pytest.skip("not built on this machine")
    monkeypatch.setattr(native.ctypes, "CDLL", refuse)
    assert native._load() is None
    assert "undefined symbol: GOMP_parallel" in caplog.text


def halved(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half().float()


@pytest.fixture(scope="module")
def runner():
    """Layers, heads of 16 and head of the kind that is compiled."""
    if native.LIBRARY is None:
        pytest.skip("not built on this machine")
    model = ModelRunner(fresh_model("llama", vocab_size=272, max_position_embeddings=4096, num_attention_heads=6,
                                    num_key_value_heads=2, hidden_size=96))  # fmt: skip
    assert all(block.native is not None for block in blocks(model))
    assert len(list(blocks(model))) == 2
    return model


def blocks(runner):
    return (module for module in runner.model.modules() if isinstance(module, Block))


def in_torch(runner, slices, monkeypatch):
    """The logits of slices by torch's operations."""
    with monkeypatch.context() as patch:
        for block in blocks(runner):
            patch.setattr(block, "native", None)
        return runner.forward(slices)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_a_product_is_that_of_torch(runner, rows, bias):
    weight, offset, x = halved(112, 40), halved(112, seed=1) if bias else None, torch.randn(1, rows, 40)
    found = native.Half(weight, offset)(x)
    torch.testing.assert_close(found, functional.linear(x, weight, offset), atol=1e-5, rtol=1e-5)
    assert found.shape == (1, rows, 112)
    apart = x.expand(2, -1, -1).transpose(0, 1)[:, 0]  # not contiguous
    torch.testing.assert_close(native.Half(weight, offset)(apart), found[0], atol=0, rtol=0)


def test_a_row_of_a_product_does_not_depend_on_the_others(runner):
    product, x = native.Half(halved(112, 40), None), torch.randn(100, 40)
    whole = product(x)
    for rows in ROWS:
        assert torch.equal(product(x[-rows:]), whole[-rows:])


def cache_of(runner, rows):
    """A cache with random rows, and room for more."""
    cache = KVCache(runner.layout, rows + 128)
    cache.reserve(rows + 128)
    for buffer in (*cache.keys, *cache.values):
        buffer.normal_()
    cache.length = rows
    return cache


def tokens(count, seed=0):
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def slices_of(runner, kind, n, rows):
    """Slices of one kind, `n` tokens over `rows` earlier ones, every token's logits wanted."""
    cache, ids, positions = cache_of(runner, rows), tokens(n), range(rows, rows + n)
    if kind == "plain":
        return [Slice(cache, ids, positions, rows, logits=n)]
    if kind == "ranges":
        seen = ((0, 4), (rows // 3, rows // 3 + 1), (rows // 2, rows - 3))
        return [Slice(cache, ids, positions, rows, visible=seen, logits=n)]
    if kind == "tree":
        mask = torch.rand(n, n + 7, generator=torch.Generator().manual_seed(1)) < 0.6
        mask[:, 7:] &= torch.ones(n, n).tril().bool()
        mask[:, 7:].fill_diagonal_(True)
        return [Slice(cache, ids, positions, rows, mask=mask, logits=n)]
    if kind == "weights":
        mask = torch.randn(n, rows + n)
        mask[:, rows:] += torch.full((n, n), -torch.inf).triu(1)
        mask[:, : rows // 2] = -torch.inf  # whole chunks that nobody sees
        return [Slice(cache, ids, positions, rows, mask=mask, logits=n)]
    other = cache_of(runner, 20)
    return [
        Slice(cache, ids, positions, rows, logits=n),
        Slice(other, tokens(3), range(20, 23), 20, visible=((0, 9),), logits=1),
        Slice(cache, tokens(2), range(rows + n, rows + n + 2), rows + n, logits=2),  # sees the first slice's rows
        Slice(other, [5], [23], 23, logits=1),
    ]


@pytest.mark.parametrize("kind", ["plain", "ranges", "tree", "weights", "several"])
@pytest.mark.parametrize("rows", [8, 511, 1300])
@pytest.mark.parametrize("n", [1, 2, 17, 60])
def test_the_layer_is_that_of_torch(runner, kind, rows, n, monkeypatch):
    slices = slices_of(runner, kind, n, rows)
    found = runner.forward(slices)
    written = [cache.read_rows(0, cache.length) for cache in {id(s.cache): s.cache for s in slices}.values()]
    expected = in_torch(runner, slices, monkeypatch)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for ours, piece in zip(written, {id(s.cache): s.cache for s in slices}.values(), strict=True):
        torch.testing.assert_close(ours, piece.read_rows(0, piece.length), atol=1e-4, rtol=1e-4)


def test_a_token_is_computed_alike_alone_in_company_and_drafted(runner):
    rows, ids = 700, tokens(9)
    cache, other = cache_of(runner, rows), cache_of(runner, 40)
    alone = [runner.forward([Slice(cache, [id_], [rows + i], rows + i, logits=1)])[0] for i, id_ in enumerate(ids)]
    cache.truncate(rows)
    company = [Slice(other, tokens(30), range(40, 70), 40, logits=1), Slice(cache, ids[:1], [rows], rows, logits=1)]
    assert torch.equal(runner.forward(company)[1], alone[0])
    cache.truncate(rows)
    together = runner.forward([Slice(cache, ids, range(rows, rows + 9), rows, logits=9)])[0]
    assert torch.equal(together, torch.cat(alone))


def test_extreme_values_stay_what_they_are_in_torch(runner, monkeypatch):
    """Scores and gates far beyond what an exponential in fp32 holds."""
    cache = cache_of(runner, 600)
    for buffer in (*cache.keys, *cache.values):
        buffer.mul_(1e4)
    slices = [Slice(cache, tokens(4), range(600, 604), 600, logits=4)]
    (found,), (expected,) = runner.forward(slices), in_torch(runner, slices, monkeypatch)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    "extra",
    [
        {"intermediate_size": 100},  # not whole panels
        {"hidden_act": "gelu"},
        {"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 320},  # too large a head
        {"head_dim": 12},
    ],
)
def test_what_is_of_another_kind_runs_in_torch(extra):
    runner = ModelRunner(fresh_model("llama", **extra))
    assert all(block.native is None for block in blocks(runner))
    plain = fresh_model("llama", **extra)
    ids = tokens(9)
    (logits,) = runner.forward([Slice(KVCache(runner.layout, 64), ids, range(9), 0, logits=9)])
    with torch.inference_mode():
        torch.testing.assert_close(logits, plain(torch.tensor([ids])).logits[0], atol=1e-4, rtol=1e-4)
