"""One step at a time: decoding and a rewrite by context length, and a long read, beside transformers and llama.cpp.

The physical limit printed with it: bytes of weights and KV that a step must read over the memory bandwidth measured in
the same run, and the arithmetic of a rewrite over the measured rate of the fastest large matrix product
(torch's in fp32 and in the model's dtype, and ours).
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Row, plot, report, shipped_text
from benchmarks.peers import LlamaCpp, plain_model
from longstride.engine import native
from longstride.engine.context import Context, Placement
from longstride.engine.model import CACHE, Model, load_model
from longstride.engine.sequence import Sequence

TURN = 3  # forwards of a system before it is the next one's turn, besides one that is not counted


def ours(model: Model, ids: list[int], length: int) -> Callable[[int], float]:
    """After reading the first `length` of `ids`: a function that computes n more tokens and forgets them: seconds."""
    runner = model.runner
    context = Context(ids[:16], placement=Placement.END, limit=runner.max_positions, reserved=0)
    sequence = Sequence(runner, context, max_rows=runner.max_positions)
    context.append(ids[16:length])
    sequence.run(runner)

    def step(count: int) -> float:
        context.append(ids[:count])
        began = time.perf_counter()
        logits = sequence.run(runner)
        if logits is None:
            raise RuntimeError("nothing was due")
        logits[-1].argmax().item()
        seconds = time.perf_counter() - began
        del context.text[length:]
        sequence.cache.truncate(length)
        return seconds

    return step


def theirs(model: Any, ids: list[int], length: int) -> Callable[[int], float]:
    """transformers with its DynamicCache and sdpa: the same function."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for at in range(0, length, 512):
            model(input_ids=torch.tensor([ids[at : min(at + 512, length)]]), logits_to_keep=1, **{CACHE: cache})

    @torch.inference_mode()
    def step(count: int) -> float:
        began = time.perf_counter()
        out = model(input_ids=torch.tensor([ids[:count]]), logits_to_keep=1, **{CACHE: cache})
        out.logits[0, -1].argmax().item()
        seconds = time.perf_counter() - began
        cache.crop(-count)
        return seconds

    return step


def limits(model: Model, plain: Any, length: int) -> dict[str, float]:
    """Seconds that a decode step and a 144-token rewrite at `length` cannot go below on this machine."""
    big = torch.randn(100_000_000)
    read, products = [], []
    square = torch.randn(1536, 1536)
    half = square.to(model.runner.dtype)
    library = native.library(model.runner.dtype)
    ours = half.matmul if library is None else native.Packed(library, half, None)
    # which of them is the fastest differs among processors
    for product, factor in ((square.matmul, square), (half.matmul, half), (ours, half)):
        for _ in range(10):
            began = time.perf_counter()
            product(factor)
            products.append(2 * 1536**3 / (time.perf_counter() - began))
    for _ in range(10):
        began = time.perf_counter()
        big.sum()
        read.append(big.numel() * 4 / (time.perf_counter() - began))
    layout, config = model.runner.layout, plain.config
    weights = [parameter for parameter in plain.parameters() if parameter.dim() > 1]
    stored = sum(w.numel() * (2 if native.fits_half(w.detach()) else w.element_size()) for w in weights)
    # all tokens pass the layers, one the head
    numbers = sum(w.numel() for w in weights) - config.vocab_size * config.hidden_size * 143 / 144
    flops = 144 * (2 * numbers + 4 * length * config.hidden_size * config.num_hidden_layers)
    return {
        "bandwidth_gb_s": max(read) / 1e9,
        "gflop_s": max(products) / 1e9,
        "decode_s": (stored + length * layout.row_bytes) / max(read),
        "rewrite_144_s": flops / max(products),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="64,1024,4096")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--read", type=int, default=8000, help="tokens read from nothing; 0 leaves this part out")
    parser.add_argument("--llama-python", type=Path, help="a Python with llama-cpp-python, to measure it as well")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    model, plain = load_model(options.model), plain_model(options.model)
    ids = model.tokenizer.encode(shipped_text())
    ids = (ids * (1 + 8192 // len(ids)))[:8192]
    lengths = list(map(int, options.lengths.split(",")))
    llamas: list[LlamaCpp] = []
    steps: dict[tuple[str, int], Callable[[int], float]] = {}
    for length in lengths:
        steps["ours", length] = ours(model, ids, length)
        steps["transformers", length] = theirs(plain, ids, length)
        for name, flash in (("llama.cpp", False), ("llama.cpp, flash", True)) if options.llama_python else ():
            llamas.append(LlamaCpp(options.llama_python, flash=flash))
            steps[name, length] = llamas[-1].step(ids, length)
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for count in (1, 16, 144):
        made = {key: Row(key[0], {"length": f"{key[1]} tokens", "new": count}, "ms a forward") for key in steps}
        for _ in range(options.rounds if count == 1 else max(3, options.rounds // 3)):
            for key, step in steps.items():
                time.sleep(0.02)  # until the threads of the one before have stopped spinning
                step(count)  # finds the caches as the one before left them
                made[key].runs += [1000 * step(count) for _ in range(TURN)]
        rows += made.values()
        for name, length in steps:
            if name != "ours":
                ratio = made[name, length].median / made["ours", length].median
                ratios[f"{name} @ {length} tokens, {count} new"] = ratio
        for length in lengths[1:]:
            ratio = made["ours", lengths[0]].median / made["ours", length].median
            ratios[f"ours at {lengths[0]} tokens @ {length} tokens, {count} new"] = ratio
    bounds = {f"{length} tokens": limits(model, plain, length) for length in lengths}
    if options.read:
        setting = {"length": f"{options.read} tokens", "new": "all"}
        read = {name: Row(name, dict(setting), "s") for name in ("ours", "transformers")}
        for _ in range(3):
            for name, row in read.items():
                began = time.perf_counter()
                if name == "ours":
                    ours(model, ids, options.read)
                else:
                    theirs(plain, ids, options.read)
                row.runs.append(time.perf_counter() - began)
        rows += read.values()
        ratio = read["transformers"].median / read["ours"].median
        ratios[f"transformers @ reading {options.read} tokens"] = ratio
    for llama in llamas:
        llama.close()
    versions = {"llama_cpp_python": llamas[0].version} if llamas else {}
    report(
        rows,
        ratios,
        {"dtype": str(model.runner.dtype), "limits": bounds, **versions},
        options.json,
    )
    if options.plot is not None:
        single = [row for row in rows if row.setting["new"] == 1]
        plot(single, "One token, by tokens in the context (ms, lower is better)", options.plot)


if __name__ == "__main__":
    main()
