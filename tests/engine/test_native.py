"""The compiled layer against the same layer in torch's operations, and rows that do not depend on their company."""

from dataclasses import replace

import pytest
import torch

from longstride.engine import native
from longstride.engine.adapter import Adapter
from longstride.engine.attention import Slice
from longstride.engine.cache import KVCache, LayerShape
from longstride.engine.fuse import Block, Stack
from longstride.engine.runner import ModelRunner
from tests.tiny import fresh_model, halved

# it is for such processors; there it has to have been built (the README asks for a C compiler), or all of this fails
pytestmark = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="compiled for x86 with AVX2 only"
)


@pytest.fixture(scope="module", params=native.LIBRARIES, ids=lambda library: library.name)
def library(request):
    return request.param


def built(library, **extra):
    """Layers, heads of 16 and head of the kind that is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "LIBRARIES", (library,))
        plain = fresh_model("llama", vocab_size=272, max_position_embeddings=4096, num_attention_heads=6,
                            num_key_value_heads=2, hidden_size=96, **extra)  # fmt: skip
        return ModelRunner(plain.to(torch.bfloat16).to(library.dtype))


@pytest.fixture(scope="module")
def runner(library):
    made = built(library)
    (stack,) = parts(made, Stack)
    assert list(made.model.model.layers) == [stack]
    assert list(stack.blocks) == parts(made, Block)
    assert len(stack.blocks) == 2
    return made


@pytest.fixture(scope="module")
def exact():
    """The same weights in fp32."""
    return built(native.library(torch.float32))


def parts(runner, kind):
    return [module for module in runner.model.modules() if isinstance(module, kind)]


def in_torch(runner, slices, monkeypatch):
    """The logits of slices by torch's operations."""
    with monkeypatch.context() as patch:
        patch.setattr(native.Layers, "takes", lambda *_: False)
        return runner.forward(slices)


def test_weights_of_two_builds_do_not_meet(library):
    made = built(library)
    layers, block = parts(made, Stack)[0].native, parts(made, Block)[0]
    first, second = layers._layers
    alone, other = native.Layers(first), replace(second, library=replace(second.library))
    assert not alone.join(other)
    assert alone.join(second)
    norms = [(torch.ones(96), 1e-6)] * 2
    products = {product.name: product.run for product in block.products}
    arguments = (0, LayerShape(2, 16, 16), 6, 0.25, norms)
    assert native.layer(*arguments, products) is not None
    weight = native.Packed(replace(layers.library), halved(96, 96), None)
    assert native.layer(*arguments, {**products, block.out.name: weight}) is None


def test_values_are_kept_as_torch_rounds_them(library, exact):
    """The first layer's: where a product is computed in fp32, what is rounded is the same but for the order of sums."""
    model, ids = built(library), tokens(40)
    ours, theirs = KVCache(model.layout, 64), KVCache(exact.layout, 64)
    for runner, cache in ((model, ours), (exact, theirs)):
        runner.forward([Slice(cache, ids, range(40), 0, logits=1)])
    found, expected = ours.values[0][:, :40], theirs.values[0][:, :40].to(library.dtype)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
    if library.dtype != library.number == torch.float32:
        assert (found == expected).float().mean() > 0.97


def test_in_bf16_a_model_is_compiled_as_a_whole_or_not_at_all():
    """What compiled layers hand on is fp32."""
    model = fresh_model("llama").to(torch.bfloat16)
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()
    runner = ModelRunner(model)
    assert len(parts(runner, Block)) == 2
    assert not parts(runner, Stack)
    (logits,) = runner.forward([Slice(KVCache(runner.layout, 64), tokens(9), range(9), 0, logits=9)])
    assert logits.shape == (9, 264)
    assert logits.isfinite().all()


def cache_of(runner, rows):
    """A cache with random rows, and room for more."""
    cache = KVCache(runner.layout, rows + 256)
    cache.reserve(rows + 256)
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
def test_the_layer_is_that_of_torch(runner, exact, kind, rows, n, monkeypatch):
    """In fp32; in bf16 it is as near to fp32 as torch's operations in bf16 are, where a token alone may chance to be
    nearer in one of the two."""
    slices = slices_of(runner, kind, n, rows)
    caches = {id(s.cache): s.cache for s in slices}
    lengths = {id_: cache.length for id_, cache in caches.items()}
    copies = {id_: in_fp32(exact, cache) for id_, cache in caches.items()}
    found = together(runner.forward(slices), caches)
    for id_, cache in caches.items():
        cache.truncate(lengths[id_])
    expected = together(in_torch(runner, slices, monkeypatch), caches)
    if runner.dtype == torch.float32:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        return
    same = [replace(s, cache=copies[id(s.cache)]) for s in slices]
    truth = together(in_torch(exact, same, monkeypatch), copies)
    assert found.sub(truth).norm() <= 1.2 * expected.sub(truth).norm()


@pytest.mark.parametrize("size", [8, 24, 40, 64, 72, 128, 248, 256])
def test_heads_may_be_of_any_whole_eights(library, size, monkeypatch):
    """Whose outputs do not fill blocks of numbers one by one, nor all together; or several panels."""
    model, exact = built(library, head_dim=size), built(native.library(torch.float32), head_dim=size)
    slices = [Slice(cache_of(model, 170), tokens(9), range(170, 179), 170, logits=9)]
    copies = [replace(s, cache=in_fp32(exact, s.cache)) for s in slices]
    assert parts(model, Stack)
    (found,), (truth,) = model.forward(slices), in_torch(exact, copies, monkeypatch)
    assert found.sub(truth).norm() <= (1e-5 if library.dtype == torch.float32 else 1e-2) * truth.norm()


def adapter_of(runner, names=(".q_proj", ".o_proj", ".gate_proj", ".down_proj"), rank=5):
    """Random factors for some products of both layers."""
    generator = torch.Generator().manual_seed(3)
    factors = {}
    for product in {id(p): p for p in runner.products.values()}.values():
        if product.name.endswith(names):
            outputs = sum(product.sizes.values())
            down, up = (torch.randn(shape, generator=generator) for shape in ((product.inputs, rank), (rank, outputs)))
            factors[product.name] = (0.1 * down.to(runner.dtype), 0.1 * up.to(runner.dtype))
    return Adapter("random", "random", ((), ()), True, {}, torch.empty(0), factors)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("n", [1, 5, 40, 120])
@pytest.mark.parametrize("names", [(".q_proj", ".o_proj", ".gate_proj", ".down_proj"), (".gate_proj",)])
def test_adapters_act_on_their_rows(runner, exact, n, names, threads, monkeypatch):
    """Two adapters and none in one forward, as in torch's operations."""
    monkeypatch.setattr(native.torch, "get_num_threads", lambda: threads)
    cache, one, two = cache_of(runner, 70), adapter_of(runner, names), adapter_of(runner, rank=130)
    slices = [
        Slice(cache, tokens(n), range(70, 70 + n), 70, logits=n, adapter=one),
        Slice(cache, tokens(7), range(70 + n, 77 + n), 70 + n, logits=7),
        Slice(cache, tokens(n), range(77 + n, 77 + 2 * n), 77 + n, logits=n, adapter=two),
    ]
    copy = in_fp32(exact, cache)
    found = together(runner.forward(slices), {0: cache})
    cache.truncate(70)
    without = together(runner.forward([replace(s, adapter=None) for s in slices]), {0: cache})
    cache.truncate(70)
    expected = together(in_torch(runner, slices, monkeypatch), {0: cache})
    assert found.sub(without).norm() > 0.05 * without.norm()
    if runner.dtype == torch.float32:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        return
    adapters = [
        a and replace(a, factors={k: (d.float(), u.float()) for k, (d, u) in a.factors.items()})
        for a in (one, None, two)
    ]
    same = [replace(s, cache=copy, adapter=a) for s, a in zip(slices, adapters, strict=True)]
    truth = together(in_torch(exact, same, monkeypatch), {0: copy})
    assert found.sub(truth).norm() <= 1.2 * expected.sub(truth).norm()


def test_an_adapter_of_too_high_a_rank_acts_in_torch(runner):
    cache, adapter = cache_of(runner, 20), adapter_of(runner, rank=native.MOST + 1)
    assert not parts(runner, Stack)[0].native.takes([(0, 3, adapter)])
    assert runner.forward([Slice(cache, tokens(3), range(20, 23), 20, logits=3, adapter=adapter)])[0].isfinite().all()


def in_fp32(exact, cache):
    """A copy of a cache for the exact model."""
    copy = KVCache(exact.layout, cache.limit)
    copy.reserve(cache.limit)
    copy.write_rows(0, cache.read_rows(0, cache.length).float())
    copy.extend(cache.length)
    return copy


def together(logits, caches):
    """All that a forward came to, as one row of numbers."""
    rows = [cache.read_rows(0, cache.length) for cache in caches.values()]
    return torch.cat([part.float().flatten() for part in (*logits, *rows)])


def test_an_adapter_of_too_large_numbers_acts_in_torch_where_fp16_does_not_hold_them(runner):
    cache, adapter = cache_of(runner, 20), adapter_of(runner)
    layers = parts(runner, Stack)[0].native
    assert layers.takes([(0, 3, adapter)])
    next(iter(adapter.factors.values()))[0][0, 0] = 2000.0
    adapter = replace(adapter)  # what is known of one is known by its identity
    assert layers.takes([(0, 3, adapter)]) == (layers.library.number != torch.float16)
    assert runner.forward([Slice(cache, tokens(3), range(20, 23), 20, logits=3, adapter=adapter)])[0].isfinite().all()


@pytest.mark.parametrize("power", [-10, 0, 10])
def test_what_is_cached_may_be_small_and_large(library, power, monkeypatch):
    """Values of any size within fp16's, of which most weigh little beside one."""
    model, exact = built(library), built(native.library(torch.float32))
    cache = cache_of(model, 700)
    for keys, values in zip(cache.keys, cache.values, strict=True):
        keys[:, 0] *= 8
        values.mul_(2.0**power)
        values[:, 0] *= 1e-3
    copy = in_fp32(exact, cache)
    (found,) = model.forward([Slice(cache, tokens(9), range(700, 709), 700, logits=9)])
    (truth,) = in_torch(exact, [Slice(copy, tokens(9), range(700, 709), 700, logits=9)], monkeypatch)
    assert found.sub(truth).norm() <= (1e-4 if library.dtype == torch.float32 else 2e-2) * truth.norm()


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


def test_it_need_not_be_the_first_layer_that_is_compiled():
    """In fp32; nor does a list of slices have to be a new one, whose cache has grown meanwhile."""
    plain, mixed = (fresh_model("llama") for _ in range(2))
    for model in (plain, mixed):
        model.model.layers[0].mlp.up_proj.weight.data.add_(1e-5)  # fp16 does not hold it any more
    runner = ModelRunner(mixed)
    assert [type(layer) for layer in mixed.model.layers] == [Block, Stack]
    cache, ids = KVCache(runner.layout, 1024, initial=16), tokens(9)
    slices = [Slice(cache, ids, range(9), 0, logits=9)]
    with torch.inference_mode():
        expected = plain(torch.tensor([ids])).logits[0]
    for _ in range(2):
        torch.testing.assert_close(runner.forward(slices)[0], expected, atol=1e-4, rtol=1e-4)
        cache.reserve(600)


def test_extreme_values_stay_what_they_are_in_torch(runner, monkeypatch):
    """Scores and gates far beyond what an exponential in fp32 holds."""
    cache = cache_of(runner, 600)
    for buffer in (*cache.keys, *cache.values):
        buffer.mul_(1e4)
    slices = [Slice(cache, tokens(4), range(600, 604), 600, logits=4)]
    (found,), (expected,) = runner.forward(slices), in_torch(runner, slices, monkeypatch)
    assert found.isfinite().all()
    if runner.dtype == torch.float32:  # which of two scores of a million is the larger one, bf16 cannot tell
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
    assert not parts(runner, Stack)
    plain = fresh_model("llama", **extra)
    ids = tokens(9)
    (logits,) = runner.forward([Slice(KVCache(runner.layout, 64), ids, range(9), 0, logits=9)])
    with torch.inference_mode():
        torch.testing.assert_close(logits, plain(torch.tensor([ids])).logits[0], atol=1e-4, rtol=1e-4)
