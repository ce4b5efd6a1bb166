"""Whether what was read long ago is found and answered: questions about a stream of many windows, by window policy.

The stream is read once (`benchmarks.endless --db` leaves what this needs, else it is read here). Then, for each policy,
a copy of that session reads some more under it and is asked. Beside that: without retrieval, and with what stands
around the answer read into one context that holds all of it.
"""

import argparse
import asyncio
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import machine
from benchmarks.endless import PIECE, SESSION, needles, stream
from longstride.engine.adapter import load_adapter
from longstride.engine.model import Model, load_model
from longstride.errors import BadInput
from longstride.scheduler.assistant import Assistant
from longstride.scheduler.session import Session
from longstride.tuning.scores import contained
from longstride.tuning.texts import texts

BOOKS = Path(__file__).with_name("books.jsonl")
WINDOWS = ("sinks", "separators", "cascade", "anchors", "anchors-added", "rollup")
NONE, WHOLE = "no retrieval", "whole context"
AROUND = 3000  # tokens before and behind the answer that one context holds
PARTS = ("beginning", "middle", "end")


@dataclass(frozen=True)
class Question:
    """`evidence`: a passage that has one of these can answer it; `answers`: one of them must be said. `at`: token of
    the stream where the first of the evidence stands."""

    kind: str
    text: str
    answers: tuple[str, ...]
    evidence: tuple[str, ...]
    at: int

    def stands_in(self, text: str) -> bool:
        """Whether the evidence does, however its lines are broken."""
        flat = flattened(text)
        return any(flattened(part) in flat for part in self.evidence)

    def answered_by(self, text: str) -> bool:
        """Whether an accepted answer is said."""
        return bool(contained(text, self.answers))


def flattened(text: str) -> str:
    """Lower case, one space between words."""
    return " ".join(text.lower().split())


def questions(model: Model, ids: list[int], books: dict[str, str]) -> list[Question]:
    """Those about the books (in `books` by name) and those about the planted sentences, as far as `ids` have them."""
    pieces = [model.tokenizer.decode(ids[at : at + 512]) for at in range(0, len(ids), 256)]  # each overlaps the next
    flat = [flattened(piece) for piece in pieces]
    found = []
    for line in BOOKS.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        if any(name.startswith(one["book"]) for name in books):
            found.append(("book", one["question"], tuple(one["answers"]), tuple(one["evidence"])))
    found += [("planted", needle.question, (needle.word,), (needle.sentence,)) for needle in needles()]
    asked = []
    for kind, text, answers, evidence in found:
        at = next((256 * n for n, piece in enumerate(flat) if flattened(evidence[0]) in piece), None)
        if at is not None:
            asked.append(Question(kind, text, answers, evidence, at))
    return asked


async def asked(system: str, session: Session, question: Question, total: int, **changes: Any) -> dict[str, Any]:
    """One answer, and whether what it needs was in view."""
    answer = await session.answer(question.text, max_tokens=32, **changes)
    view = session.core.model.tokenizer.decode(session.stream[session.view.whole_from :])
    return {
        "system": system,
        "kind": question.kind,
        "part": PARTS[min(2, 3 * question.at // total)],
        "question": question.text,
        "in view": any(question.stands_in(text) for text in (view, *(source.text for source in answer.sources))),
        "right": question.answered_by(answer.text),
        "answer": answer.text,
        "sources": [source.text for source in answer.sources],
    }


async def read_up_to(session: Session, ids: Sequence[int], what: str) -> None:
    """Feed what the session does not have yet of the stream `ids`."""
    starts = range(session.tokens, len(ids), PIECE)
    for at in track(starts, what, console=Console(stderr=True), transient=True):
        await session.feed_ids(list(ids[at : at + PIECE]))


async def under(
    window: str,
    model: Model,
    db: Path,
    these: list[Question],
    ids: list[int],
    more: list[int],
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """Go on reading under a policy, then ask."""
    async with Assistant.open(db, model=model) as assistant:
        session = await assistant.session(SESSION, **settings, window=window)
        await read_up_to(session, [*session.stream, *more], window)
        ways: list[tuple[str, dict[str, Any]]] = [(window, {})]
        if window == "sinks":
            ways.append((NONE, {"policy": "never"}))
        return [
            await asked(system, session, one, len(ids), **changes)
            for system, changes in ways
            for one in track(these, system, console=Console(stderr=True), transient=True)
        ]


async def whole(model: Model, db: Path, these: list[Question], ids: list[int]) -> list[dict[str, Any]]:
    """Each question behind what stands around its answer, all of it in view."""
    results = []
    async with Assistant.open(db, model=model) as assistant:
        for one in track(these, WHOLE, console=Console(stderr=True), transient=True):
            session = await assistant.session("whole", window="refuse")
            await session.feed_ids(ids[max(0, one.at - AROUND) : one.at + AROUND])
            results.append(await asked(WHOLE, session, one, len(ids), policy="never"))
            await assistant.remove_session("whole")
    return results


async def base(model: Model, db: Path, ids: list[int], settings: dict[str, Any]) -> None:
    """A session that has read the stream."""
    async with Assistant.open(db, model=model) as assistant:
        session = await assistant.session(SESSION, **settings, window="sinks")
        if list(session.stream) != ids[: session.tokens]:
            raise BadInput(f"{db} holds another stream; name the texts and --tokens that it was read with")
        await read_up_to(session, ids, "reading")


def run(model: Model, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Everything that was asked."""
    found = texts(options.texts)
    ids = stream(model, [text.body for text in found], options.tokens)
    more = [i for text in texts(options.then) for i in model.tokenizer.encode(text.body)][: options.then_tokens]
    these = questions(model, ids, {text.name: text.body for text in found})
    settings: dict[str, Any] = {"context_tokens": options.context}
    db = options.db if options.db is not None else folder / "base.db"
    asyncio.run(base(model, db, ids, settings))
    trained = load_adapter(options.adapter, model).window if options.adapter else ""
    results = []
    for window in options.windows:
        copy = folder / f"{window}.db"
        for file in db.parent.glob(f"{db.name}*"):
            shutil.copy(file, folder / file.name.replace(db.name, copy.name, 1))
        adapter = {"adapter": str(options.adapter)} if window == trained else {}
        results += asyncio.run(under(window, model, copy, these, ids, more, {**settings, **adapter}))
        for file in folder.glob(f"{copy.name}*"):
            file.unlink()
    return results + asyncio.run(whole(model, folder / "whole.db", these, ids))


def share(results: list[dict[str, Any]], what: str, **of: str) -> str:
    """Part of the results `of` a kind in which `what` holds, as a percentage."""
    mine = [one[what] for one in results if all(one[name] == value for name, value in of.items())]
    return f"{100 * sum(mine) / len(mine):.0f} %" if mine else ""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="the books that the questions are about")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of the stream")
    parser.add_argument("--then", type=Path, nargs="+", required=True, help="what is read behind it under each policy")
    parser.add_argument("--then-tokens", type=int, default=20_000)
    parser.add_argument("--windows", nargs="+", default=WINDOWS, choices=WINDOWS)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--adapter", type=Path, help="for the policy that it was trained for")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--db", type=Path, help="with the session that has read the stream; kept")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = load_model(options.model)
    with tempfile.TemporaryDirectory() as folder:
        results = run(model, options, Path(folder))
    table = Table("", "in view", "right", *(f"{kind}, {part}" for kind in ("book", "planted") for part in PARTS))
    for system in dict.fromkeys(one["system"] for one in results):
        cells = [share(results, what, system=system) for what in ("in view", "right")]
        for kind in ("book", "planted"):
            for part in PARTS:
                of = {"system": system, "kind": kind, "part": part}
                cells.append(f"{share(results, 'in view', **of)} / {share(results, 'right', **of)}")
        table.add_row(system, *cells)
    Console(width=140).print(table)
    if options.json is not None:
        told = {"tokens": options.tokens, "then": options.then_tokens, "context": options.context}
        data = {"machine": machine(), "settings": told, "questions": len(results), "results": results}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
