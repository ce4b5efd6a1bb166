"""llama.cpp in an environment of its own, driven by JSON lines (`benchmarks/peers.py`). Imports nothing of ours.

A request `{"cut": n, "groups": [[ids...], ...]}` cuts the KV cache to n tokens and evaluates the groups one after the
other, choosing the best token after each; the reply `{"seconds": [...]}` has the time of each.
"""

import json
import sys
import time

import llama_cpp


def main() -> None:
    """argv: GGUF file, context length, threads, flash attention (0 or 1)."""
    path, length, threads, flash = sys.argv[1], *map(int, sys.argv[2:5])
    model = llama_cpp.Llama(
        path, n_ctx=length, n_threads=threads, n_threads_batch=threads, flash_attn=bool(flash), verbose=False
    )
    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        model.n_tokens = request["cut"]  # the next eval removes what lies behind
        seconds = []
        for ids in request["groups"]:
            began = time.perf_counter()
            model.eval(ids)
            model.sample(temp=0.0)
            seconds.append(time.perf_counter() - began)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
