"""A stream without end: what reading costs as it grows, and whether its beginning is still found.

Reads texts behind one another into one session, with planted sentences at ten depths; notes time, memory and file size
as it goes; is killed (SIGKILL) and started again on the way; asks for the planted sentences at the end.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import machine, shipped_text
from longstride.engine.model import Model, load_model, load_plain
from longstride.engine.runner import ModelRunner
from longstride.scheduler.assistant import Assistant
from longstride.scheduler.session import Session
from longstride.tuning.texts import texts

SESSION, PIECE, NOTED = "endless", 2048, 10_000  # tokens fed at once, and between two notes
DEPTHS, A_DEPTH = 10, 2
THINGS = ("lantern", "anvil", "compass", "kettle", "violin", "saddle", "ladder", "mirror", "hammer", "basket")
OWNERS = ("miller", "ferryman", "glazier", "cooper", "weaver", "falconer", "chandler", "tanner", "potter", "mason")
WORDS = ("juniper", "cobalt", "marzipan", "tundra", "sextant", "papyrus", "walrus", "quartz", "saffron", "dynamo")


@dataclass(frozen=True)
class Needle:
    """A planted sentence, what asks for it, and what the answer must hold."""

    depth: int
    sentence: str
    question: str
    word: str


def needles(seed: int = 3) -> list[Needle]:
    """`A_DEPTH` for each of `DEPTHS` depths."""
    rng = random.Random(seed)
    pairs = [(owner, thing) for owner in OWNERS for thing in THINGS]
    found = []
    for number, (owner, thing) in enumerate(rng.sample(pairs, DEPTHS * A_DEPTH)):
        word = f"{rng.choice(WORDS)}{rng.randrange(100, 999)}"
        sentence = f"The password carved into the {thing} of the {owner} is {word}."
        question = f"What is the password carved into the {thing} of the {owner}?"
        found.append(Needle(number // A_DEPTH, sentence, question, word))
    return found


def stream(model: Model, bodies: Sequence[str], tokens: int) -> list[int]:
    """Token ids of the texts, again from the beginning where they are too short, with the needles in them."""
    ids: list[int] = []
    while len(ids) < tokens:
        for body in bodies:
            ids += model.tokenizer.encode(f"{body}\n\n")
            if len(ids) >= tokens:
                break
    ids = ids[:tokens]
    for number, needle in reversed(list(enumerate(needles()))):
        at = int((number + 0.5) * tokens / (DEPTHS * A_DEPTH))
        ids[at:at] = model.tokenizer.encode(f"\n\n{needle.sentence}\n\n")
    return ids[:tokens]


def tiny(name: str) -> Model:
    """A random model of one small layer with the real one's tokenizer: everything but the arithmetic is as it is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = load_plain(name)
    config = AutoConfig.for_model(
        "llama", vocab_size=plain.model.config.vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8192,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    runner = ModelRunner(model.half().float())  # as the embedded model, whose weights are fp16 in fp32
    return Model("tiny", runner, plain.tokenizer, "random", plain.vocabulary)


def resident() -> int:
    """This process's memory in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


async def read(model: Model, options: argparse.Namespace, notes: Path) -> dict[str, Any]:
    """Go on reading where the database stands, a note every `NOTED` tokens; then ask. Returns what was found."""
    bodies = [text.body for text in texts(options.texts)] if options.texts else [shipped_text()]
    ids = stream(model, bodies, options.tokens)
    del bodies
    settings = {"window": options.window, "context_tokens": options.context, "drafting": "off"}
    if options.adapter is not None:
        settings["adapter"] = str(options.adapter)
    async with Assistant.open(options.db, model=model) as assistant:
        session = await assistant.session(SESSION, **settings)
        if session.resumed is not None:
            note(notes, resumed=asdict(session.resumed), tokens=session.tokens, at=time.time())
        began, spent = time.perf_counter(), 0.0
        while session.tokens < len(ids):
            upto = min(len(ids), session.tokens + PIECE - session.tokens % PIECE)
            report = await session.feed_ids(ids[session.tokens : upto])
            spent += report.seconds
            if session.tokens // NOTED > (session.tokens - report.tokens) // NOTED or session.tokens == len(ids):
                note(notes, **state(session, assistant), seconds=spent, at=time.time())
                spent = 0.0
        note(notes, done=session.tokens, seconds=time.perf_counter() - began)
        return {"needles": [await asked(session, needle) for needle in needles()]}


def state(session: Session, assistant: Assistant) -> dict[str, Any]:
    """What may grow."""
    path = assistant.database.path
    return {
        "tokens": session.tokens,
        "resident": resident(),
        "cache": session.sequence.cache.allocated_bytes,
        "rows": session.sequence.cache.length,
        "blocks": assistant.blocks.usage()[1],
        "database": sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")),
    }


async def asked(session: Session, needle: Needle) -> dict[str, Any]:
    """Whether a planted sentence is in view when it is asked for, and in the answer."""
    answer = await session.answer(needle.question, max_tokens=24)
    view = session.core.model.tokenizer.decode(session.stream[session.view.whole_from :])
    found = needle.sentence in view or any(needle.word in source.text for source in answer.sources)
    return {"depth": needle.depth, "in view": found, "right": needle.word in answer.text, "answer": answer.text}


def note(to: Path, **values: Any) -> None:
    """A line of JSON, on the disk before anything else happens."""
    with to.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")
        file.flush()
        os.fsync(file.fileno())


def killed(arguments: list[str], kills: int, every: float) -> None:
    """Run this program as a child that is killed `kills` times, after `every` seconds at the mean."""
    rng = random.Random(0)
    for _ in range(kills):
        child = subprocess.Popen([sys.executable, "-m", "benchmarks.endless", *arguments])
        try:
            child.wait(timeout=every * rng.uniform(0.5, 1.5))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            continue
        return
    subprocess.run([sys.executable, "-m", "benchmarks.endless", *arguments], check=True)


def plot(lines: list[dict[str, Any]], title: str, to: Path) -> None:
    """Memory and speed against tokens read."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    grown = [line for line in lines if "resident" in line]
    for name in ("resident", "cache", "blocks", "database"):
        axes[0].plot([line["tokens"] for line in grown], [line[name] / 1e6 for line in grown], label=name)
    axes[1].plot(*zip(*rates(lines), strict=True))
    for axis, what in ((axes[0], "MB"), (axes[1], "tokens a second")):
        axis.set_xlabel("tokens read")
        axis.set_title(what)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=150)
    plt.close(figure)


def rates(lines: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(tokens read, tokens a second since the note before, or since the restart that came between)."""
    found, since = [], 0
    for line in lines:
        if "resident" in line and line["tokens"] - since >= NOTED // 2:
            found.append((line["tokens"], (line["tokens"] - since) / line["seconds"]))
        since = line.get("tokens", since)
    return found


def summary(lines: list[dict[str, Any]], found: dict[str, Any]) -> dict[str, Any]:
    """The figures that the question is about."""
    grown = [line for line in lines if "resident" in line]
    fifth = max(1, len(grown) // 5)
    speeds = [rate for _, rate in rates(lines)]
    part = max(1, len(speeds) // 5)
    planted = found.get("needles", [])
    return {
        "tokens a second, first fifth": sum(speeds[:part]) / part,
        "tokens a second, last fifth": sum(speeds[-part:]) / part,
        "resident MB, after a fifth": grown[fifth - 1]["resident"] / 1e6,
        "resident MB, at most after it": max(line["resident"] for line in grown[fifth - 1 :]) / 1e6,
        "KV MB": grown[-1]["cache"] / 1e6,
        "database bytes a token": grown[-1]["database"] / grown[-1]["tokens"],
        "restarts": sum("resumed" in line for line in lines),
        "planted in view": sum(one["in view"] for one in planted) / max(1, len(planted)),
        "planted answered": sum(one["right"] for one in planted) / max(1, len(planted)),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, nargs="*", help="files to read (default: the chapters that are shipped)")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--window", default="sinks")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tiny", action="store_true", help="random weights of one small layer, same tokenizer")
    parser.add_argument("--db", type=Path, help="kept, and gone on with")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between kills")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.db is None:
            options.db = Path(folder) / "endless.db"
        notes = options.db.with_suffix(".notes.jsonl")
        if options.kills:
            passed = [word for word in sys.argv[1:] if word]
            for option in ("--kills", "--every"):
                if option in passed:
                    at = passed.index(option)
                    del passed[at : at + 2]
            killed([*passed, "--db", str(options.db)], options.kills, options.every)
            return
        model = tiny(options.model) if options.tiny else load_model(options.model)
        found = asyncio.run(read(model, options, notes))
        lines = [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]
        figures = summary(lines, found)
        for name, value in figures.items():
            print(f"{name}: {value:,.4g}")
        if options.json is not None:
            told = {
                "window": options.window,
                "context": options.context,
                "tokens": options.tokens,
                "tiny": options.tiny,
            }
            data = {"machine": machine(), "settings": told, "figures": figures, **found, "notes": lines}
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        if options.plot is not None:
            title = f"{options.tokens:,} tokens, window {options.window} of {options.context:,}"
            plot(lines, title, options.plot)


if __name__ == "__main__":
    main()
