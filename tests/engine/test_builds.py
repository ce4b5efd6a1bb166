"""The builds of native.h and their products: which one is taken, and that it multiplies as torch does."""

import functools
import itertools
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from longstride.engine import native
from longstride.engine.fuse import Stack
from longstride.engine.runner import ModelRunner
from tests.tiny import fresh_model, halved

ROWS = [1, 2, 5, 6, 7, 12, 13, 14, 15, 29, 96, 97, 100, 144]


# it is for such processors; there it has to have been built (the README asks for a C compiler), or all of this fails
pytestmark = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="compiled for x86 with AVX2 only"
)


def test_it_is_built():
    """Each that this processor has instructions for; GCC knows those for fp16 from version 12 on."""
    has = torch.cpu.get_capabilities()
    wanted = {name for name, *_, needs in native._BUILDS if all(has.get(need) for need in needs)}
    assert {one.name for one in native.LIBRARIES} == wanted, "install a newer C compiler, then the package again"


def test_one_that_cannot_be_loaded_is_told_and_done_without(monkeypatch, caplog):
    def refuse(_path):
        raise OSError("undefined symbol: GOMP_parallel")

    monkeypatch.setattr(native.ctypes, "CDLL", refuse)
    assert native._load("avx2", torch.float32, torch.float32, 16, 6, ("avx2",)) is None
    assert "undefined symbol: GOMP_parallel" in caplog.text


def test_a_build_for_other_processors_is_not_taken(monkeypatch):
    monkeypatch.setattr(native.torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_f": True})
    assert native._load("avx2", torch.float32, torch.float32, 16, 6, ("avx2",)) is not None
    assert native._load("avx512", torch.float32, torch.float32, 32, 14, ("avx512_f", "avx512_bw")) is None


@pytest.fixture(params=native.LIBRARIES, ids=lambda library: library.name)
def library(request):
    return request.param


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("outputs", [112, 130])
def test_a_product_is_that_of_torch(library, outputs, rows, bias):
    weight = halved(outputs, 40).to(library.dtype)
    offset, x = halved(outputs, seed=1) if bias else None, torch.randn(1, rows, 40).to(library.dtype)
    product = native.Packed(library, weight, offset, torch.float32)
    found = product(x)
    expected = functional.linear(x.float(), weight.float(), offset)
    if library.number == torch.float16:  # about what rounding x to bf16 would do
        assert found.sub(expected).norm() < 1.5e-3 * expected.norm()
    else:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.shape == (1, rows, outputs)
    apart = x.expand(2, -1, -1).transpose(0, 1)[:, 0]  # not contiguous
    torch.testing.assert_close(product(apart), found[0], atol=0, rtol=0)


def test_inputs_of_any_size_are_multiplied(library):
    """Far beyond what fp16 holds, and far below; a row's scale is its own, and a block's."""
    weight, x = halved(64, 96).to(library.dtype), torch.randn(5, 96)
    product = native.Packed(library, weight, None, torch.float32)
    powers = torch.tensor([1.0, 2.0**115, 2.0**-100, 2.0**16, 0.0])[:, None]
    assert torch.equal(product(x * powers), product(x) * powers)
    x[2, 7] = torch.nan
    assert product(x).isnan().any(1).tolist() == [False, False, True, False, False]
    weight[:, :32] = 0
    x[:, :32] = 0
    small = native.Packed(library, weight, None, torch.float32)
    expected = small(x)
    x[:, :32] = 2.0**30
    assert torch.equal(small(x), expected)


def test_the_largest_products_do_not_overflow(library):
    weight, x = torch.full((64, 96), 996.0, dtype=library.dtype), torch.full((3, 96), 1.99)
    expected = functional.linear(x, weight.float())
    torch.testing.assert_close(native.Packed(library, weight, None, torch.float32)(x), expected, rtol=0.01, atol=0)


def test_threads_share_the_panels(library):
    """Which do not divide by them, nor each share by what is multiplied at once."""
    product = native.Packed(library, halved(130, 40).to(library.dtype), None, torch.float32)
    for rows in (1, 14, 100):
        x = torch.randn(rows, 40)
        assert all(torch.equal(product(x, threads=n), product(x, threads=1)) for n in (2, 3, 5))


def test_weights_that_a_build_cannot_hold_are_refused(library):
    """In fp32 nothing may be lost; fp16 holds less than bf16; products of bf16 are of two."""

    def held(value):
        weight = torch.full((64, 64), 0.5)
        weight[0, 0] = value
        return library.holds(weight.to(library.dtype))

    exact, half = library.dtype == torch.float32, library.number == torch.float16
    assert held(0.25)
    assert held(0.3) == (not exact)
    assert held(2000.0) == (not half)
    assert held(1e5) == (not half and not exact)
    weight = torch.full((64, 63), 1e-5, dtype=library.dtype)
    assert library.holds(weight) == (not half and library.pair == 1 and not exact)
    assert library.holds(weight * 0) == (library.pair == 1)


def test_a_model_is_of_one_build_that_holds_all_of_it(monkeypatch):
    """The next fastest where the fastest does not; in fp32 of as many layers as it holds."""
    libraries = [one for one in native.LIBRARIES if one.dtype == torch.bfloat16]
    monkeypatch.setattr(native, "_seconds", lambda one: -(one.number == torch.float16))
    fine, huge = torch.ones(64, 64, dtype=torch.bfloat16), torch.full((64, 64), 2000.0, dtype=torch.bfloat16)
    if any(one.number == torch.float16 for one in libraries):
        assert native.library(torch.bfloat16, [fine]).number == torch.float16
        assert native.library(torch.bfloat16, [fine, huge]).number != torch.float16
    plain = fresh_model("llama").to(torch.bfloat16)
    plain.model.layers[0].mlp.up_proj.weight.data.fill_(2000.0)
    runner = ModelRunner(plain)
    assert any(isinstance(module, Stack) for module in runner.model.modules()) == bool(libraries)


def test_the_fastest_build_of_a_dtype_is_taken(monkeypatch):
    fast, slow, other = (object.__new__(native.Library) for _ in range(3))
    for one, dtype in ((fast, torch.bfloat16), (slow, torch.bfloat16), (other, torch.float32)):
        object.__setattr__(one, "dtype", dtype)
    seconds = {id(fast): 1.0, id(slow): 2.0, id(other): 0.5}
    monkeypatch.setattr(native, "_seconds", lambda one: seconds[id(one)])
    for libraries in ((fast, slow, other), (other, slow, fast)):
        monkeypatch.setattr(native, "LIBRARIES", libraries)
        assert native.library(torch.bfloat16) is fast
        assert native.library(torch.float32) is other
    assert native.library(torch.float16) is None


def test_threads_take_the_same_build(monkeypatch):
    """However unlike their measurements would be."""

    @functools.cache
    def measured(_library):
        time.sleep(0.01)
        return random.random()

    monkeypatch.setattr(native, "_seconds", measured)
    monkeypatch.setattr(native, "LIBRARIES", [replace(native.LIBRARIES[0], name=str(i)) for i in range(8)])
    with ThreadPoolExecutor(8) as pool:
        assert len({taken.name for taken in pool.map(native.library, [native.LIBRARIES[0].dtype] * 8)}) == 1


def test_a_build_is_as_fast_as_its_products(library, monkeypatch):
    """The fastest of some, by a clock that only they move."""
    now, steps = 0.0, itertools.cycle([3.0, 0.5, 2.0])
    product = native.Packed.__call__

    def slow(self, x, threads):
        nonlocal now
        now += next(steps)
        return product(self, x, threads)

    monkeypatch.setattr(native.Packed, "__call__", slow)
    monkeypatch.setattr(native, "time", SimpleNamespace(perf_counter=lambda: now))
    assert native._seconds.__wrapped__(library) == 0.5


def test_a_row_of_a_product_does_not_depend_on_the_others(library):
    product, x = native.Packed(library, halved(112, 40), None), torch.randn(100, 40)
    whole = product(x)
    for rows in ROWS:
        assert torch.equal(product(x[-rows:]), whole[-rows:])
