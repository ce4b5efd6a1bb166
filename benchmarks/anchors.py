"""Window policies beside each other: rows kept, perplexity, answers, speed and memory of one text read under each."""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.common import Row, report, shipped_text
from longstride.engine.adapter import Adapter, load_adapter, shipped_adapter
from longstride.engine.context import MIN_SINK, Context, Placement
from longstride.engine.model import Model, load_model
from longstride.engine.sequence import Sequence
from longstride.engine.tokenizer import punctuation
from longstride.engine.window import Cascade, Separators, Window
from longstride.scheduler.settings import SYSTEM
from longstride.scheduler.windows import ANCHORS as KINDS
from longstride.scheduler.windows import make_window
from longstride.tuning import scores
from longstride.tuning.layouts import follow, last_logits, losses_of
from longstride.tuning.questions import Case, Question, load
from longstride.tuning.systems import SYSTEM as BRIEFLY
from longstride.tuning.texts import texts

CHUNK = 256
STEPS = 16  # tokens decoded one by one at the end
TOGETHER = 4  # sessions that decode in one forward
ANSWER = 24  # tokens of an answer at most
ANCHORS = ((32, 0), (64, 0), (128, 0), (32, 128), (64, 128), (128, 128), (64, 512))  # span, recent
SIZES = {"recent": (128, 256, 512, 1024), "separators": (64, 256), "cascade": (64, 128, 256)}
ASKED = {
    "full",
    "recent 256",
    "recent 1024",
    "separators 256",
    "cascade 128",
}  # questions take time; and all of span 64


@dataclass
class Policy:
    """A policy of a size, and what came out: nats of each measured token of text, and of each gold answer's; each
    answer's F1 and whether it holds a gold one; rows in view at the end; seconds a token read; ms a token decoded, and
    ms a step of `TOGETHER` sessions."""

    name: str
    size: str
    make: Callable[[int], Window | None]  # for a sink
    adapter: Adapter | None = None
    losses: list[float] = field(default_factory=list)
    gold: list[float] = field(default_factory=list)
    f1: list[float] = field(default_factory=list)
    contained: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)

    @property
    def asked(self) -> bool:
        """Whether it is asked questions."""
        return (self.adapter is not None and self.size in {"", "64"}) or f"{self.name} {self.size}".strip() in ASKED

    @property
    def perplexity(self) -> float:
        """Of all measured tokens."""
        return math.exp(statistics.fmean(self.losses))


def policies(model: Model, adapter: Adapter | None) -> Iterator[Policy]:
    """All that are compared. `recent` is StreamingLLM's: the first tokens and the last."""
    marks = punctuation(model.tokenizer)
    yield Policy("full", "", lambda _sink: None)
    if adapter is not None:
        yield Policy("full, tuned", "", lambda _sink: None, adapter)  # what the adapter does to the text itself
    makers: dict[str, Callable[[int, int], Window]] = {
        "recent": lambda size, sink: Separators(sink, size, frozenset()),
        "separators": lambda size, sink: Separators(sink, size, marks.separators),
        "cascade": lambda size, sink: Cascade(sink, size),
    }
    for name, make in makers.items():
        for size in SIZES[name]:
            yield Policy(name, str(size), partial(make, size))
    spare = len(model.tokenizer.spare) > 2
    tuned_for = adapter.window if adapter is not None else ""
    for span, recent in ANCHORS:
        for kind in KINDS if spare else KINDS[:1]:
            name = kind if not recent else f"{kind} + {recent}"
            make_anchors = partial(make_window, kind, recent, span, model.tokenizer)
            if kind == tuned_for:
                yield Policy(f"{name}, tuned", str(span), make_anchors, adapter)
            if span == 64:
                yield Policy(name, str(span), make_anchors)


def read(model: Model, ids: list[int], policy: Policy) -> None:
    """Read `ids` behind a conversation's prompt; the second half's tokens are measured."""
    runner = model.runner
    prompt = model.tokenizer.frame(SYSTEM).prompt
    sink = max(len(prompt), MIN_SINK)
    limit = len(prompt) + room(len(ids))
    context = Context(
        prompt, placement=Placement.END, limit=limit, reserved=0, refresh=0, window=policy.make(sink)
    )  # fmt: skip
    sequence = Sequence(runner, context, max_rows=limit, adapter=policy.adapter)
    began = time.perf_counter()
    half = len(ids) // 2 // CHUNK * CHUNK
    for at in range(0, len(ids), CHUNK):
        if at == half:
            policy.read.append((time.perf_counter() - began) / half)
        before = len(context.text)
        context.append(ids[at : at + CHUNK])
        chunk = context.text[before:]
        if at < half:
            sequence.run(runner)
            sequence.settle(worth=True)  # as a session does
        else:
            found = losses_of(last_logits(runner, sequence, len(chunk))[:-1], chunk[1:])
            policy.losses += [loss for loss, id_ in zip(found, chunk[1:], strict=True) if id_ != context.adds]
            sequence.settle(worth=True)
    sequence.settle()
    policy.rows.append(sequence.cache.length - len(prompt))
    context.begin_turn()
    for token in ids[:STEPS]:
        context.append([token])
        began = time.perf_counter()
        sequence.run(runner)
        policy.decode.append(1000 * (time.perf_counter() - began))


def room(tokens: int) -> int:
    """Rows for a text and the anchors that may be added to it, and for a few decoded tokens."""
    return tokens + tokens // 12 + 64  # one for each half of the shortest span at most


def together(model: Model, ids: list[int], policy: Policy) -> None:
    """Several sessions have read `ids` and decode side by side, as the device's loop has them."""
    runner, prompt = model.runner, model.tokenizer.frame(SYSTEM).prompt
    limit = len(prompt) + room(len(ids))
    sequences = []
    for _ in range(TOGETHER):
        kept = policy.make(max(len(prompt), MIN_SINK))
        context = Context(prompt, placement=Placement.END, limit=limit, reserved=0, refresh=0, window=kept)
        sequences.append(Sequence(runner, context, max_rows=limit, adapter=policy.adapter))
        for at in range(0, len(ids), CHUNK):
            context.append(ids[at : at + CHUNK])
            sequences[-1].run(runner)
            sequences[-1].settle(worth=True)
        sequences[-1].settle()
        context.begin_turn()
    for token in ids[:STEPS]:
        began = time.perf_counter()
        for sequence in sequences:
            sequence.context.append([token])
        due = [sequence.take(TOGETHER) for sequence in sequences]
        runner.forward([piece for slices in due for piece in slices])
        for sequence, slices in zip(sequences, due, strict=True):
            sequence.accept(slices)
        policy.together.append(1000 * (time.perf_counter() - began))


def ask(model: Model, case: Case, policy: Policy, limit: int) -> None:
    """Read a document, then answer the questions about it from what is left of it in view."""
    runner, frame = model.runner, model.tokenizer.frame(BRIEFLY)
    sink = max(len(frame.prompt), MIN_SINK)
    context = Context(
        frame.prompt, placement=Placement.END, limit=limit, reserved=0, refresh=0, window=policy.make(sink)
    )
    sequence = Sequence(runner, context, max_rows=limit, adapter=policy.adapter)
    context.append(model.tokenizer.encode(case.text))
    sequence.run(runner)
    sequence.settle()
    for question in case.questions:
        turn = [*model.tokenizer.encode(f"\n\n{question.text.strip()}"), *frame.answer]
        context.begin_turn()
        context.append(turn)
        policy.gold.append(statistics.fmean(follow(runner, sequence, model.tokenizer.encode(question.answers[0]))))
        sequence.end_turn(keep=False)
        context.begin_turn()
        context.append(turn)
        said = model.tokenizer.decode(decoded(model, sequence))
        sequence.end_turn(keep=False)
        policy.f1.append(100 * scores.f1(said, question.answers))
        policy.contained.append(100 * scores.contained(said, question.answers))


def decoded(model: Model, sequence: Sequence) -> list[int]:
    """The greedy answer."""
    ids: list[int] = []
    while len(ids) < ANSWER:
        logits = sequence.run(model.runner)
        if logits is None:
            raise RuntimeError("nothing was due where an answer's next token was")
        token = int(torch.argmax(logits[-1]))
        if token in model.tokenizer.eos:
            break
        ids.append(token)
        sequence.context.append([token])
    return ids


def plot(found: list[Policy], tokens: int, to: Path) -> None:
    """Perplexity, the gold answers' nats and the time of a decoded token against rows kept, a line a policy."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    asked = [policy for policy in found if policy.gold]
    figure, axes = plt.subplots(1, 3 if asked else 2, figsize=(15 if asked else 10, 4.2), layout="constrained")
    titles = ["perplexity", "ms a decoded token", "nats a token of the gold answer"]
    for name in dict.fromkeys(policy.name for policy in found):
        mine = [policy for policy in found if policy.name == name]
        values = [[policy.perplexity for policy in mine], [statistics.median(policy.decode) for policy in mine]]
        lines = [(axis, mine, value) for axis, value in zip(axes, values, strict=False)]
        if said := [policy for policy in mine if policy.gold]:
            lines.append((axes[2], said, [statistics.fmean(policy.gold) for policy in said]))
        for axis, drawn, value in lines:
            kept = [100 * statistics.mean(policy.rows) / tokens for policy in drawn]
            axis.plot(kept, value, "*" if name.startswith("full") else "o-", label=name)
    for axis, title in zip(axes, titles, strict=False):
        axis.set_xscale("log")
        axis.set_xlabel(f"rows kept of {tokens:,}, %")
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("log")
    axes[0].legend(frameon=False, fontsize=8)
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=150)
    plt.close(figure)


def rows_of(found: list[Policy], model: Model, tokens: int) -> list[Row]:
    """All figures as rows of a report."""
    rows: list[Row] = []
    for policy in found:
        kept = statistics.mean(policy.rows)
        setting = {"size": policy.size, "kept": round(kept / tokens, 4)}
        setting |= {"MB": round(kept * model.runner.layout.row_bytes / 1e6, 1)}
        measured = [
            ("perplexity", "", [policy.perplexity]),
            ("decode", "ms", policy.decode),
            ("read", "s a token", policy.read),
        ]
        measured += [(f"decode, {TOGETHER} together", "ms", policy.together)] if policy.together else []
        if policy.gold:
            measured += [
                ("gold answer", "nats a token", [statistics.fmean(policy.gold)]),
                ("F1", "%", [statistics.fmean(policy.f1)]),
                ("holds the gold answer", "%", [statistics.fmean(policy.contained)]),
            ]
        rows += [Row(policy.name, {**setting, "measure": name}, unit, runs) for name, unit, runs in measured]
    return rows


def stretches(model: Model, bodies: list[str], tokens: int, count: int) -> list[list[int]]:
    """At most `count` pieces of `tokens` tokens, none overlapping another, the texts taking turns."""
    encoded = [model.tokenizer.encode(body) for body in bodies]
    by_text = [[ids[at : at + tokens] for at in range(0, len(ids) - tokens + 1, tokens)] for ids in encoded]
    turns = range(max(map(len, by_text), default=0))
    return [piece for turn in turns for pieces in by_text for piece in pieces[turn : turn + 1]][:count]


def cases(model: Model, specs: list[str], count: int, tokens: int) -> list[Case]:
    """`count` questions or a few more, about documents of at most `tokens` tokens that are read whole."""
    per = -(-count // max(1, len(specs)))
    found: list[Case] = []
    for spec in specs:
        asked = 0
        for case in load(spec).chosen(None, None, 0).cases():
            if asked >= per:
                break
            if case.text and len(model.tokenizer.encode(case.text)) <= tokens:
                # from all over the text: they stand in its order
                questions: tuple[Question, ...] = case.questions[:: max(1, len(case.questions) // 8)][:8]
                found.append(Case(case.name, case.text, (), questions))
                asked += len(questions)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, nargs="*", help="files to read (default: the chapters that are shipped)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a text")
    parser.add_argument("--count", type=int, default=4, help="stretches of text, from different places")
    parser.add_argument("--questions", nargs="*", default=[], metavar="NAME=FILES", help="sets, as for `eval qa`")
    parser.add_argument("--asked", type=int, default=100, help="questions in all")
    parser.add_argument("--adapter", type=Path, help="for anchors (default: the one that comes along, if any)")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    model = load_model(options.model)
    folder = options.adapter or shipped_adapter(model.name, "anchors")
    bodies = [text.body for text in texts(options.texts)] if options.texts else [shipped_text()]
    pieces = stretches(model, bodies, options.tokens, options.count)
    if not pieces:
        parser.error(f"no text has {options.tokens} tokens; take fewer")
    found = list(policies(model, None if folder is None else load_adapter(folder, model)))
    for ids, policy in track([(ids, p) for ids in pieces for p in found], "reading", console=Console(stderr=True)):
        read(model, ids, policy)
    for policy in track([p for p in found if p.asked], "decoding together", console=Console(stderr=True)):
        together(model, pieces[0], policy)
    limit = min(model.runner.max_positions, room(options.tokens) + 256)
    about = cases(model, options.questions, options.asked, min(options.tokens, (limit - 256) * 12 // 13))
    asked = [(case, policy) for case in about for policy in found if policy.asked]
    for case, policy in track(asked, "asking", console=Console(stderr=True)):
        ask(model, case, policy, limit)
    ratios = {f"perplexity, {p.name} {p.size}": p.perplexity / found[0].perplexity for p in found}
    told = {"tokens": options.tokens, "texts": len(pieces), "questions": len(found[0].f1)}
    report(rows_of(found, model, options.tokens), ratios, told, options.json)
    if options.plot is not None:
        plot(found, options.tokens, options.plot)


if __name__ == "__main__":
    main()
