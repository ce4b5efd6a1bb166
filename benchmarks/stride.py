"""The re-retrieval loop: our placements against prepending, as people run it and in our own engine.

Every system does the same work on the same real text: at each stride it searches with the last 32 tokens, puts the
passage found into its context and computes the next `--stride` tokens one by one. Tokens are forced to the text's own
continuation, so that all systems see the same queries and passages. Systems take turns stride by stride, so that a
busy machine slows them alike.
"""

import argparse
import time
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.common import Row, plot, report, shipped_text
from benchmarks.peers import LlamaCpp, plain_model
from longstride.engine.context import Context, Placement
from longstride.engine.model import CACHE, Model, load_model
from longstride.engine.pieces import MemoryPieces
from longstride.engine.sequence import Sequence
from longstride.scheduler.index import PassageIndex, scores

QUERY, REFRESH, PROMPT = 32, 16, 16


class Corpus:
    """The text, and the passages found in it; the passage in place is never found again at once, so every stride
    has to rewrite."""

    def __init__(self, model: Model, text: str, passage: int) -> None:
        self.model = model
        self.ids = model.tokenizer.encode(text)
        self.passages = [self.ids[at : at + passage] for at in range(0, len(self.ids) - passage, passage)]
        self.index = PassageIndex()
        self.index.add([model.tokenizer.decode(p) for p in self.passages])
        self.index.merge()

    def search(self, at: int, not_this: int) -> int:
        """Number of the best passage for the text before token `at`, other than `not_this`."""
        query = self.model.tokenizer.decode(self.ids[at - QUERY : at])
        values = scores([self.index], query)[0]
        if not_this >= 0:
            values[not_this] = -1
        return int(values.argmax())


class System(Protocol):
    """A way to run the loop."""

    def start(self, length: int) -> None:
        """Read `length` tokens of the text."""

    def stride(self, tokens: int) -> int:
        """One stride; returns the tokens encoded besides the decoded ones."""


class Transformers:
    """In-Context RALM as people run it: the passage in front, everything encoded anew, DynamicCache, sdpa."""

    def __init__(self, corpus: Corpus, model: Any) -> None:
        self.corpus, self.model = corpus, model

    def start(self, length: int) -> None:
        self.at, self.length, self.found = length, length, -1

    @torch.inference_mode()
    def stride(self, tokens: int) -> int:
        from transformers import DynamicCache

        self.found = self.corpus.search(self.at, self.found)
        cache = DynamicCache(config=self.model.config)
        ids = [*self.corpus.passages[self.found], *self.corpus.ids[: self.at]]
        encoded = len(ids)
        for _ in range(tokens):
            out = self.model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1, **{CACHE: cache})
            out.logits[0, -1].argmax().item()
            ids = [self.corpus.ids[self.at]]
            self.at += 1
        return encoded


class OwnPrepend:
    """Prepending in our own engine: the same kernels, nothing reused."""

    def __init__(self, corpus: Corpus, model: Model) -> None:
        self.corpus, self.model = corpus, model

    def start(self, length: int) -> None:
        self.at, self.found = length, -1

    def stride(self, tokens: int) -> int:
        runner = self.model.runner
        self.found = self.corpus.search(self.at, self.found)
        ids = [*self.corpus.passages[self.found], *self.corpus.ids[: self.at]]
        context = Context(ids, placement=Placement.END, limit=runner.max_positions, reserved=0)
        sequence = Sequence(runner, context, max_rows=runner.max_positions)
        for _ in range(tokens):
            decode(sequence, self.model, self.corpus.ids[self.at])
            self.at += 1
        return len(ids)


class AppendLlamaCpp:
    """llama.cpp with its cache kept: the passage at the end, cut off and replaced at each stride, as FlashBack does."""

    def __init__(self, corpus: Corpus, llama: LlamaCpp) -> None:
        self.corpus, self.llama = corpus, llama

    def start(self, length: int) -> None:
        self.at, self.boundary, self.found = length, length, -1
        self.llama.run(0, [self.corpus.ids[:length]])

    def stride(self, tokens: int) -> int:
        self.found = self.corpus.search(self.at, self.found)
        due = [*self.corpus.ids[self.boundary : self.at], *self.corpus.passages[self.found]]
        forced = [[token] for token in self.corpus.ids[self.at : self.at + tokens - 1]]
        self.llama.run(self.boundary, [due, *forced])
        self.boundary, self.at = self.at, self.at + tokens
        return len(due)


class Ours:
    """Our loop. `seen`: which passages' rows are in the store: `all`, as for passages seen before; `some`, those that
    this stream has fetched already; `none`, as if each were new."""

    def __init__(self, corpus: Corpus, model: Model, placement: Placement, passage: int, *, seen: str = "none") -> None:
        self.corpus, self.model, self.placement, self.passage = corpus, model, placement, passage
        self.seen = seen

    def start(self, length: int) -> None:
        runner, corpus = self.model.runner, self.corpus
        context = Context(
            corpus.ids[:PROMPT], placement=self.placement, limit=runner.max_positions, reserved=self.passage,
            refresh=REFRESH if self.placement is Placement.BESIDE else 0,  # `end` as FlashBack has it
        )  # fmt: skip
        store = MemoryPieces(self.model.fingerprint, 0 if self.seen == "none" else 4 << 30)
        self.sequence = Sequence(runner, context, max_rows=runner.max_positions + self.passage, store=store)
        context.append(corpus.ids[PROMPT:length])
        self.sequence.run(runner)
        if self.seen == "all":
            for piece in corpus.passages:
                self.sequence.rewrite([piece])
                self.sequence.run(runner)
            self.sequence.rewrite([])
            self.sequence.run(runner)
        self.at, self.found = length, -1

    def stride(self, tokens: int) -> int:
        self.found = self.corpus.search(self.at, self.found)
        self.sequence.rewrite([self.corpus.passages[self.found]])
        before = self.sequence.computed
        for n in range(tokens):
            decode(self.sequence, self.model, self.corpus.ids[self.at])
            if n == 0:
                encoded = self.sequence.computed - before
            self.at += 1
        return encoded


def decode(sequence: Sequence, model: Model, forced: int) -> None:
    """Compute what is due, choose the next token, go on with the forced one."""
    logits = sequence.run(model.runner)
    if logits is None:
        raise RuntimeError("nothing was due")
    logits[-1].argmax().item()
    sequence.context.append([forced])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="512,2048,3968", help="tokens read before the first stride")
    parser.add_argument("--stride", type=int, default=16)
    parser.add_argument("--passage", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="strides of each system and length that are measured")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, help="a text file; the shipped chapters when not given")
    parser.add_argument("--llama-python", type=Path, help="a Python with llama-cpp-python, to measure it as well")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()

    model = load_model(options.model)
    peer = plain_model(options.model)
    corpus = Corpus(model, options.text.read_text() if options.text else shipped_text(), options.passage)
    systems: dict[str, System] = {
        "transformers-prepend": Transformers(corpus, peer),
        "own-prepend": OwnPrepend(corpus, model),
        "end": Ours(corpus, model, Placement.END, options.passage),
        "beside": Ours(corpus, model, Placement.BESIDE, options.passage, seen="all"),
        "beside-stream": Ours(corpus, model, Placement.BESIDE, options.passage, seen="some"),
        "beside-new": Ours(corpus, model, Placement.BESIDE, options.passage),
    }
    peers = ["transformers-prepend", "own-prepend"]
    if options.llama_python is not None:
        for name, flash in (("llama.cpp", False), ("llama.cpp, flash", True)):
            systems[name] = AppendLlamaCpp(corpus, LlamaCpp(options.llama_python, flash=flash))
            peers.append(name)
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for length in map(int, options.lengths.split(",")):
        medians: dict[str, float] = {}
        made = {name: Row(name, {"length": f"{length} tokens"}, "s a stride") for name in systems}
        for system in systems.values():
            system.start(length)
            system.stride(options.stride)  # warm-up
        encoded: dict[str, int] = {}
        for _ in range(options.rounds):
            for name, system in systems.items():
                began = time.perf_counter()
                encoded[name] = system.stride(options.stride)
                made[name].runs.append(time.perf_counter() - began)
        for name, row in made.items():
            row.setting["encoded"] = encoded[name]
            medians[name] = row.median
        rows += made.values()
        for peer_name in peers:
            for ours in ("end", "beside", "beside-stream", "beside-new"):
                ratios[f"{peer_name} @ {length} tokens, {ours}"] = medians[peer_name] / medians[ours]
    extra = {"stride": options.stride, "passage": options.passage, "dtype": str(model.runner.dtype)}
    report(rows, ratios, extra, options.json)
    if options.plot is not None:
        plot(rows, "A stride of the re-retrieval loop (lower is better)", options.plot)


if __name__ == "__main__":
    main()
