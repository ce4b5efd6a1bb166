"""Peers that several benchmarks measure against."""

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch

from longstride.engine.embedded import embedded_folder, find_gguf
from longstride.engine.model import choose_device, choose_dtype


def plain_model(name: str) -> Any:
    """The model as transformers runs it: its sdpa attention, in our dtype or in fp32, whichever reads faster."""
    from transformers import AutoModelForCausalLM

    folder = embedded_folder() if name == "smollm2" else name
    device = choose_device("auto")
    kinds = {choose_dtype("auto", device), torch.float32} if device.type == "cpu" else {choose_dtype("auto", device)}
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=kind).to(device).eval() for kind in kinds]
    return min(models, key=_reading) if len(models) > 1 else models[0]


@torch.inference_mode()
def _reading(model: Any) -> float:
    """Seconds for 512 tokens, at best."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        model(input_ids=torch.arange(512)[None], logits_to_keep=1)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


class LlamaCpp:
    """llama.cpp on the embedded model's own GGUF (4-bit weights), in another Python's llama-cpp-python."""

    def __init__(self, python: Path, *, context: int = 8192, flash: bool = False) -> None:
        worker = Path(__file__).with_name("llama_cpp_worker.py")
        command = [str(python), str(worker), str(find_gguf()), str(context), str(torch.get_num_threads())]
        self._process = subprocess.Popen(
            [*command, str(int(flash))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._to = cast("IO[str]", self._process.stdin)
        self._from = cast("IO[str]", self._process.stdout)
        self.version: str = self._reply()["version"]

    def _reply(self) -> Any:
        line = self._from.readline()
        if not line:
            raise RuntimeError("llama.cpp's process ended; its message stands above")
        return json.loads(line)

    def run(self, cut: int, groups: Sequence[Sequence[int]]) -> list[float]:
        """Cut the cache to `cut` tokens, evaluate the groups in turn; seconds of each."""
        self._to.write(json.dumps({"cut": cut, "groups": [list(ids) for ids in groups]}) + "\n")
        self._to.flush()
        seconds: list[float] = self._reply()["seconds"]
        return seconds

    def step(self, ids: list[int], length: int) -> Callable[[int], float]:
        """Read the first `length` of `ids`; a function that computes n more tokens and forgets them: seconds."""
        self.run(0, [ids[:length]])
        return lambda count: self.run(length, [ids[:count]])[0]

    def close(self) -> None:
        """End the process."""
        self._to.close()
        self._process.wait()
