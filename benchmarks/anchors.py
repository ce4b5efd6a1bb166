"""Window policies beside each other: rows kept, perplexity, speed and memory of one text read under each."""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks.common import Row, report, shipped_text
from longstride.engine.context import MIN_SINK, Context, Placement
from longstride.engine.model import Model, load_model
from longstride.engine.sequence import Sequence
from longstride.engine.tokenizer import punctuation
from longstride.engine.window import Anchors, Cascade, Separators, Window
from longstride.tuning.layouts import last_logits, losses_of
from longstride.tuning.texts import texts

CHUNK = 256
STEPS = 16  # tokens decoded one by one at the end
SIZES = {
    "recent": (128, 256, 512, 1024),
    "separators": (64, 128, 256, 512),
    "cascade": (64, 128, 256),
    "anchors": (16, 32, 64),
}


def windows(model: Model) -> dict[tuple[str, int], Callable[[], Window | None]]:
    """A maker of each policy's window, by name and size. `recent` is StreamingLLM's: the first tokens and the last."""
    marks = punctuation(model.tokenizer)
    makers: dict[str, Callable[[int], Window]] = {
        "recent": lambda size: Separators(MIN_SINK, size, frozenset()),
        "separators": lambda size: Separators(MIN_SINK, size, marks.separators),
        "cascade": lambda size: Cascade(MIN_SINK, size),
        "anchors": lambda size: Anchors(MIN_SINK, size, marks.ends),
    }
    found: dict[tuple[str, int], Callable[[], Window | None]] = {("full", 0): lambda: None}
    for name, sizes in SIZES.items():
        for size in sizes:
            found[name, size] = partial(makers[name], size)
    return found


@dataclass
class Result:
    """One policy over all texts: nats of each measured token; rows in view at the end; seconds a token read; ms a token
    decoded at the end."""

    losses: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """Of all measured tokens."""
        return math.exp(sum(self.losses) / len(self.losses))


def measure(model: Model, ids: list[int], window: Window | None, result: Result) -> None:
    """Read `ids`; the second half's tokens are measured."""
    runner = model.runner
    context = Context(
        ids[:MIN_SINK], placement=Placement.END, limit=len(ids) + 64, reserved=0, refresh=0, window=window
    )
    sequence = Sequence(runner, context, max_rows=len(ids) + 64)
    began = time.perf_counter()
    half = len(ids) // 2
    context.append(ids[MIN_SINK:half])
    sequence.run(runner)
    for at in range(half, len(ids), CHUNK):
        chunk = ids[at : at + CHUNK]
        context.append(chunk)
        logits = last_logits(runner, sequence, len(chunk))
        result.losses += losses_of(logits[:-1], chunk[1:])
    result.read.append((time.perf_counter() - began) / len(ids))
    sequence.settle()
    result.rows.append(sequence.cache.length)
    context.begin_turn()
    for token in ids[:STEPS]:
        context.append([token])
        began = time.perf_counter()
        sequence.run(runner)
        result.decode.append(1000 * (time.perf_counter() - began))


def plot(results: dict[tuple[str, int], Result], tokens: int, to: Path) -> None:
    """Perplexity and time of a decoded token against rows kept, a line a policy."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in ("full", *SIZES):
        mine = [result for (policy, _), result in results.items() if policy == name]
        kept = [100 * statistics.mean(result.rows) / tokens for result in mine]
        for axis, values in (
            (axes[0], [result.perplexity for result in mine]),
            (axes[1], [statistics.median(result.decode) for result in mine]),
        ):
            axis.plot(kept, values, "o-" if name != "full" else "k*", label=name)
    for axis, title in ((axes[0], "perplexity"), (axes[1], "ms a decoded token")):
        axis.set_xscale("log")
        axis.set_xlabel(f"rows kept of {tokens:,}, %")
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("log")
    axes[0].legend(frameon=False)
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=150)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, nargs="*", help="files to read (default: the chapters that are shipped)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a text")
    parser.add_argument("--count", type=int, default=4, help="stretches of text, from different places")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    model = load_model(options.model)
    bodies = [text.body for text in texts(options.texts)] if options.texts else [shipped_text()]
    encoded = [model.tokenizer.encode(body) for body in bodies]
    per = -(-options.count // len(encoded))
    stretches = [
        ids[at : at + options.tokens]
        for ids in encoded
        for at in range(0, len(ids) - options.tokens + 1, max(1, (len(ids) - options.tokens) // per))[:per]
    ][: options.count]
    if not stretches:
        parser.error(f"no text has {options.tokens} tokens; take fewer")
    makers = windows(model)
    results = {key: Result() for key in makers}
    for ids, (key, make) in track(
        [(ids, item) for ids in stretches for item in makers.items()], console=Console(stderr=True)
    ):
        measure(model, ids, make(), results[key])
    rows: list[Row] = []
    for (name, size), result in results.items():
        setting = {"size": size, "kept": round(statistics.mean(result.rows) / options.tokens, 4)}
        setting |= {"MB": round(statistics.mean(result.rows) * model.runner.layout.row_bytes / 1e6, 1)}
        rows.append(Row(name, {**setting, "measure": "decode"}, "ms", result.decode))
        rows.append(Row(name, {**setting, "measure": "read"}, "s a token", result.read))
        rows.append(Row(name, {**setting, "measure": "perplexity"}, "", [result.perplexity]))
    full = results["full", 0]
    ratios = {f"perplexity, {name} {size}": r.perplexity / full.perplexity for (name, size), r in results.items()}
    report(rows, ratios, {"tokens": options.tokens, "texts": len(stretches)}, options.json)
    if options.plot is not None:
        plot(results, options.tokens, options.plot)


if __name__ == "__main__":
    main()
