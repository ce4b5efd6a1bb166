"""The re-retrieval loop and decoding on a GPU, with random weights of a given shape and simulated retrieval.

Weights do not matter for time (the FlashBack paper's own timing was simulated as well). Needs torch and transformers
only: `make gpu` runs it from a checkout without installing anything. `--device cpu --shape tiny` tries it anywhere.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from longstride.engine.context import Context, Placement
from longstride.engine.model import CACHE
from longstride.engine.pieces import MemoryPieces
from longstride.engine.runner import ModelRunner
from longstride.engine.sequence import Sequence

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 32, "vocab_size": 32000},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "vocab_size": 49152},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip
PROMPT, REFRESH = 16, 16


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of `work`, the device's queue emptied before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.inference_mode()
def prepend(model: Any, ids: list[int], steps: int) -> None:
    """In-Context RALM: the passage in front, everything encoded anew, then token by token."""
    cache = DynamicCache(config=model.config)
    new = ids
    for _ in range(steps):
        given = torch.tensor([new], device=model.device)
        out = model(input_ids=given, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        new = [int(out.logits[0, -1].argmax())]


def loop(sequence: Sequence, runner: ModelRunner, passage: list[int], steps: int) -> None:
    """Our loop: a rewrite, then token by token."""
    sequence.rewrite([passage])
    for _ in range(steps):
        logits = sequence.run(runner)
        if logits is None:
            raise RuntimeError("nothing was due")
        sequence.context.append([int(logits[-1].argmax())])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--length", type=int, default=3968)
    parser.add_argument("--stride", type=int, default=16)
    parser.add_argument("--passage", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    # each its own configuration: the attention implementation is part of it
    configs = [LlamaConfig(**SHAPES[options.shape], max_position_embeddings=8192) for _ in range(2)]
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            plain, own = (AutoModelForCausalLM.from_config(config, dtype=dtype).eval() for config in configs)
    finally:
        torch.set_default_dtype(previous)
    weight_bytes = sum(p.numel() * p.element_size() for p in own.parameters() if p.dim() > 1)
    runner = ModelRunner(own)
    ids = torch.randint(3, configs[0].vocab_size, (options.length,)).tolist()
    passages = [torch.randint(3, configs[0].vocab_size, (options.passage,)).tolist() for _ in range(options.rounds + 1)]

    def read(placement: Placement) -> Sequence:
        refresh = REFRESH if placement is Placement.BESIDE else 0  # `end` as FlashBack has it
        context = Context(ids[:PROMPT], placement=placement, limit=8192, reserved=options.passage, refresh=refresh)
        store = MemoryPieces("random", 8 << 30)
        sequence = Sequence(runner, context, max_rows=8192, store=store)
        context.append(ids[PROMPT:])
        sequence.run(runner)
        for passage in passages if placement is Placement.BESIDE else ():
            sequence.rewrite([passage])  # seen before
            sequence.run(runner)
        return sequence

    sequences = {"end": read(Placement.END), "beside": read(Placement.BESIDE)}
    runs: dict[str, list[float]] = {"transformers-prepend": [], "end": [], "beside": [], "decode": []}
    for number, passage in enumerate(passages):
        taken = {
            name: timed(partial(loop, sequence, runner, passage, options.stride), device)
            for name, sequence in sequences.items()
        }
        taken["transformers-prepend"] = timed(partial(prepend, plain, [*passage, *ids], options.stride), device)
        taken["decode"] = timed(partial(sequences["end"].run, runner), device)
        if number:  # the first is the warm-up
            for name, seconds in taken.items():
                runs[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in runs.items()}
    kv_bytes = options.length * runner.layout.row_bytes
    big = torch.randn(100_000_000, device=device)
    big.sum()
    bandwidth = big.numel() * 4 / min(timed(big.sum, device) for _ in range(5))
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "setting": {k: str(v) for k, v in vars(options).items() if k != "json"},
        "rows": [
            {"system": name, "median": medians[name], "unit": "s", "runs": values} for name, values in runs.items()
        ],
        "ratios": {
            f"transformers-prepend @ {options.length} tokens, {name}": medians["transformers-prepend"] / medians[name]
            for name in sequences
        },
        "decode_over_bandwidth_limit": medians["decode"] / ((weight_bytes + kv_bytes) / bandwidth),
    }
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
