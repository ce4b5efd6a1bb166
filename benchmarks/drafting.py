"""Drafting: tokens a second against the same engine without drafts, transformers' prompt lookup and plain llama.cpp.

Every prompt is read once by each system and only the writing is timed, greedy but for the rows at temperature 1; each
prompt begins with an empty history. Systems take turns, prompt by prompt.
"""

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Row, report, shipped_text
from benchmarks.peers import LlamaCpp, plain_model
from benchmarks.workloads import Prompt, Workloads
from longstride.engine.context import Context, Placement
from longstride.engine.draft import Drafter
from longstride.engine.history import WINDOW, History
from longstride.engine.model import Model, load_model
from longstride.engine.sampling import Sampler, Sampling
from longstride.engine.sequence import Sequence
from longstride.engine.verify import Decoding, generate

LIMIT = 8192


class Ours:
    """Our engine on one prompt, read once; every `write` begins behind it again."""

    def __init__(self, model: Model, prompt: list[int]) -> None:
        self.model = model
        self.prompt = prompt
        self.sequence = Sequence(
            model.runner, Context(prompt[:-1], placement=Placement.END, limit=LIMIT, reserved=0), max_rows=LIMIT
        )
        self.sequence.run(model.runner)

    def write(self, drafting: str, tokens: int, sampling: Sampling | None = None) -> tuple[Decoding, float]:
        """What was written, and seconds."""
        tokenizer, context = self.model.tokenizer, self.sequence.context
        context.text[:] = self.prompt
        self.sequence.cache.truncate(len(self.prompt) - 1)
        drafter = None if drafting == "off" else Drafter(self.model.ngrams, branches=drafting == "tree")
        banned = sorted(tokenizer.special - tokenizer.eos)
        started = time.perf_counter()
        if drafter is not None:
            drafter.begin(self.prompt)
        made = generate(
            self.model.runner,
            self.sequence,
            tokens,
            sampling=sampling,
            ends=tokenizer.eos,
            banned=banned,
            drafter=drafter,
        )
        return made, time.perf_counter() - started


class PromptLookup:
    """transformers' prompt lookup decoding.

    It reads the prompt in its first forward, even where a cache of it is given, so the clock starts behind that forward
    and the tokens it brings are counted all the same.
    """

    def __init__(self, plain: Any) -> None:
        self.plain = plain
        self._forward = plain.forward
        self._started = 0.0
        plain.forward = self._first_forward

    def _first_forward(self, *arguments: Any, **options: Any) -> Any:
        out = self._forward(*arguments, **options)
        if not self._started:
            self._started = time.perf_counter()
        return out

    @torch.inference_mode()
    def write(self, prompt: list[int], tokens: int, lookup: int, eos: int) -> tuple[list[int], float]:
        """What was written, and seconds."""
        ids = torch.tensor([prompt], device=self.plain.device)
        self._started = 0.0
        out = self.plain.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            prompt_lookup_num_tokens=lookup,
            eos_token_id=eos,
            pad_token_id=eos,
        )
        seconds = time.perf_counter() - self._started
        written: list[int] = out[0, len(prompt) :].tolist()
        return written, seconds


def by_match(ours: Ours, tokens: int, found: dict[int, list[int]]) -> None:
    """Accepted tokens of each step, by the longest match that its draft began with."""
    ours.sequence.context.text[:] = ours.prompt
    ours.sequence.cache.truncate(len(ours.prompt) - 1)
    tokenizer, runner = ours.model.tokenizer, ours.model.runner
    drafter = Drafter(ours.model.ngrams)
    drafter.begin(ours.prompt)
    banned = sorted(tokenizer.special - tokenizer.eos)
    decoding = Decoding(ours.sequence, Sampler(Sampling(), banned), tokenizer.eos, drafter=drafter)
    while not decoding.ended and len(decoding.tokens) < tokens:
        decoding.draft(tokens - len(decoding.tokens) - 1, runner.costs)
        before, length = decoding.accepted, decoding.proposal.match if decoding.proposal is not None else 0
        decoding.accept(ours.sequence.run(runner), lambda _choice: len(decoding.tokens) < tokens)
        found[length].append(decoding.accepted - before)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, help="folder of evaluation texts; without it the shipped chapters")
    parser.add_argument("--tasks", help="only these kinds of prompts, separated by commas; all when not given")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of each kind")
    parser.add_argument("--tokens", type=int, default=128, help="tokens written at most")
    parser.add_argument("--rounds", type=int, default=3, help="how often we write each, in turns; the median counts")
    parser.add_argument("--lookups", default="4,10", help="draft lengths that prompt lookup may choose from")
    parser.add_argument("--contexts", default="500,2000,4000,7500", help="tokens read, for the plot of the speed")
    parser.add_argument("--llama-python", type=Path, help="a Python with llama-cpp-python")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    model, plain = load_model(options.model), plain_model(options.model)
    llama = LlamaCpp(options.llama_python, context=LIMIT) if options.llama_python is not None else None
    workloads = Workloads(model.tokenizer, options.data)
    bench = Bench(model, plain, llama, options)
    wanted = None if options.tasks is None else options.tasks.split(",")
    for prompt in workloads.all(options.prompts):
        if wanted is None or prompt.task.split(",")[0] in wanted:
            bench.measure(prompt)
    if options.data is not None and wanted is None:
        bench.contexts(workloads, list(map(int, options.contexts.split(","))))
    if llama is not None:
        llama.close()
    bench.report()


def long_history(model: Model, data: Path | None, tokens: int = 1_000_000) -> dict[str, float]:
    """A stream of a million tokens: bytes and seconds to build, milliseconds to look up."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((data / "books").glob("*.txt"))] if data else []
    ids = [i for text in texts or [shipped_text()] for i in model.tokenizer.encode(text)]
    ids = (ids * (1 + tokens // len(ids)))[:tokens]
    started = time.perf_counter()
    history = History()
    for at in range(0, tokens, 512):
        history.extend(ids[at : at + 512])
    built = time.perf_counter() - started
    taken = []
    for at in range(WINDOW, tokens, tokens // 5000):
        started = time.perf_counter()
        history.matches(ids[at - WINDOW : at])
        taken.append(1000 * (time.perf_counter() - started))
    taken.sort()
    return {
        "tokens": tokens,
        "bytes a token": history.bytes / tokens,
        "seconds to build": built,
        "tokens a second": tokens / built,
        "ms a look-up, median": taken[len(taken) // 2],
        "ms a look-up, p99": taken[len(taken) * 99 // 100],
    }


class Bench:
    """All systems over all prompts."""

    def __init__(self, model: Model, plain: Any, llama: LlamaCpp | None, options: argparse.Namespace) -> None:
        self.model = model
        self.lookup = PromptLookup(plain)
        self.llama = llama
        self.options = options
        self.lookups = list(map(int, options.lookups.split(",")))
        self.runs: dict[tuple[str, str], list[float]] = defaultdict(list)  # (task, system): tokens a second, a prompt
        self.totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])  # tokens, seconds
        self.steps: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        self.matches: dict[int, list[int]] = defaultdict(list)
        self.lengths: dict[int, dict[str, float]] = {}
        self.different: list[str] = []
        self._warm()

    def _warm(self) -> None:
        """First calls of every system, which are slower, on a prompt of no task."""
        ids = self.model.tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 8)
        ours = Ours(self.model, ids)
        for drafting in ("off", "tree"):
            ours.write(drafting, 16)
        self.lookup.write(ids, 16, self.lookups[0], min(self.model.tokenizer.eos))

    def _note(self, task: str, system: str, count: int, seconds: float) -> None:
        if count:
            self.runs[task, system].append(count / seconds)
            for whole in (task, *(["question answering, both"] if task.startswith("question") else [])):
                total = self.totals[whole, system]
                total[0] += count
                total[1] += seconds

    def _written(self, ours: Ours, sampling: Sampling | None = None) -> dict[str, tuple[Decoding, float]]:
        """What we write with and without drafts, in turns, each from a cold start, and the median seconds: one write
        takes less than the memory's speed stays the same, and some of what is asked is a matter of a few percent."""
        made: dict[str, Decoding] = {}
        taken: dict[str, list[float]] = defaultdict(list)
        for _ in range(self.options.rounds):
            for system, drafting in (("undrafted", "off"), ("lookup", "lookup"), ("tree", "tree")):
                made[system], seconds = ours.write(drafting, self.options.tokens, sampling)
                taken[system].append(seconds)
        return {system: (decoding, statistics.median(taken[system])) for system, decoding in made.items()}

    def measure(self, prompt: Prompt) -> None:
        """All systems on one prompt, greedy; writing with nothing to copy at temperature 1 as well."""
        ours, tokens = Ours(self.model, prompt.ids), self.options.tokens
        texts = []
        for system, (made, seconds) in self._written(ours).items():
            self._note(prompt.task, system, len(made.tokens), seconds)
            counts = (len(made.tokens), made.steps, made.drafted, made.accepted)
            self.steps[prompt.task, system] = [
                a + b for a, b in zip(self.steps[prompt.task, system], counts, strict=True)
            ]
            texts.append(made.tokens)
        if prompt.task == "free":
            for system, (made, seconds) in self._written(ours, Sampling(temperature=1.0, seed=7)).items():
                self._note("free, temperature 1", system, len(made.tokens), seconds)
        if any(text != texts[0] for text in texts):
            self.different.append(prompt.name)
        by_match(ours, tokens, self.matches)
        for lookup in self.lookups:
            written, seconds = self.lookup.write(prompt.ids, tokens, lookup, min(self.model.tokenizer.eos))
            self._note(prompt.task, f"prompt-lookup {lookup}", len(written), seconds)
        if self.llama is not None and texts[0]:
            self.llama.run(0, [prompt.ids[:-1]])
            ids = [prompt.ids[-1], *texts[0]][: len(texts[0])]
            self._note(prompt.task, "llama.cpp", len(ids), sum(self.llama.run(len(prompt.ids) - 1, [[i] for i in ids])))
        print(
            prompt.task,
            prompt.name,
            {s: round(r[-1], 1) for (t, s), r in self.runs.items() if t == prompt.task},
            flush=True,
        )

    def contexts(self, workloads: Workloads, lengths: list[int]) -> None:
        """Logs behind contexts of growing length: tokens a second with drafts and without."""
        for length in lengths:
            both: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
            for prompt in workloads.log(3, length):
                ours = Ours(self.model, prompt.ids)
                for drafting in ("off", "tree"):
                    made, seconds = ours.write(drafting, self.options.tokens)
                    both[drafting][0] += len(made.tokens)
                    both[drafting][1] += seconds
            self.lengths[length] = {drafting: count / seconds for drafting, (count, seconds) in both.items()}
            print("log", length, self.lengths[length], flush=True)

    def report(self) -> None:
        """The table, the ratios, the plots."""
        rows, ratios = [], {}
        for (task, system), runs in self.runs.items():
            count, seconds = self.totals[task, system]
            rows.append(Row(system, {"task": task, "all": f"{count / seconds:.1f}"}, "tokens/s", runs))
        for task in dict.fromkeys(task for task, _ in self.totals):
            whole = {s: total[0] / total[1] for (t, s), total in self.totals.items() if t == task}
            for peer in [*whole]:
                if peer not in ("tree", "lookup"):
                    ratios[f"{peer} @ {task}"] = whole["tree"] / whole[peer]
            ratios[f"one branch @ {task}"] = whole["tree"] / whole["lookup"]
        extra = {
            "dtype": str(self.model.runner.dtype),
            "tokens a step": {f"{t}, {s}": round(v[0] / max(1, v[1]), 2) for (t, s), v in self.steps.items()},
            "accepted of drafted": {f"{t}, {s}": round(v[3] / max(1, v[2]), 2) for (t, s), v in self.steps.items()},
            "prompts whose greedy text differs": self.different,
            "tokens a second by context": self.lengths,
            "a long history": long_history(self.model, self.options.data),
        }
        report(rows, ratios, extra, self.options.json)
        if self.options.plot is not None:
            draw(self.matches, self.lengths, self.options.plot)


def draw(matches: dict[int, list[int]], lengths: dict[int, dict[str, float]], to: Path) -> None:
    """Accepted tokens a step by match length, and speed by context length."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    found = {n: steps for n, steps in sorted(matches.items()) if len(steps) >= 3}
    left.plot([*found], [sum(s) / len(s) for s in found.values()], marker="o", markersize=3)
    left.set_xlabel("longest match (tokens; 32 and more together)")
    left.set_ylabel("accepted tokens a step")
    left.set_title("What a match is worth")
    for drafting, label in (("tree", "drafts"), ("off", "no drafts")):
        if lengths:
            right.plot([*lengths], [made[drafting] for made in lengths.values()], marker="o", label=label)
    right.set_xlabel("tokens of log in the context")
    right.set_ylabel("tokens a second")
    right.set_ylim(bottom=0)
    right.set_title("Continuing a log")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
