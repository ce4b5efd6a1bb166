"""`longstride read`."""

import codecs
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress, TaskID

from longstride.cli import common as c
from longstride.errors import BadInput
from longstride.scheduler.answer import ReadReport
from longstride.scheduler.convert import text_of

if TYPE_CHECKING:
    from longstride.scheduler.session import Session

PIECE_BYTES = 1 << 16


def standard_input() -> Iterator[str]:
    """Standard input in pieces that end at line ends, as they arrive."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held = ""
    while data := os.read(sys.stdin.fileno(), PIECE_BYTES):
        held += decoder.decode(data)
        cut = held.rfind("\n") + 1
        if not cut and len(held) >= PIECE_BYTES:
            cut = len(held)
        if cut:
            yield held[:cut]
            held = held[cut:]
    held += decoder.decode(b"", final=True)
    if held:
        yield held


def texts(files: list[str]) -> Iterator[tuple[str, Iterator[str]]]:
    """(name, pieces of text) of each source. Unreadable files are refused before anything is read."""
    checked: list[tuple[str, str | None]] = []
    for name in files:
        if name == "-":
            checked.append(("standard input", None))
            continue
        try:
            checked.append((Path(name).name, text_of(Path(name))))
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from error
    for name, text in checked:
        yield name, standard_input() if text is None else iter([text])


class Meter:
    """Feeds a session and moves the bar."""

    def __init__(self, session: "Session", bar: Progress, task: TaskID, notes_every: int | None) -> None:
        self.session = session
        self.bar = bar
        self.task = task
        self.notes_every = notes_every
        self.total = ReadReport()

    async def feed(self, text: str) -> None:
        """Read one piece of text."""
        ids = self.session.core.model.tokenizer.encode(text)
        known = self.bar.tasks[self.task].total or 0
        self.bar.update(self.task, total=known + len(ids))
        report = await self.session.feed_ids(ids, notes_every=self.notes_every, progress=self._moved)
        total = self.total
        total.tokens += report.tokens
        total.encoded += report.encoded
        total.blocks += report.blocks
        total.slides += report.slides
        total.seconds += report.seconds
        total.notes += report.notes

    def _moved(self, tokens: int) -> None:
        speed = self.bar.tasks[self.task].speed
        self.bar.update(self.task, advance=tokens, rate=f"{speed:,.0f} tokens/s" if speed else "")


def run(
    files: Annotated[list[str], typer.Argument(help="Files to read, or - for standard input.")],
    session: c.SessionName,
    db: c.Db = None,
    model: c.ModelName = None,
    device: c.Device = None,
    dtype: c.Dtype = None,
    placement: c.Placement = None,
    adapter: c.Adapter = None,
    collection: c.Collections = None,
    window: c.Window = None,
    context_tokens: c.ContextTokens = None,
    notes_every: Annotated[
        int | None, typer.Option("--notes-every", help="Write a running note every N tokens.")
    ] = None,
    json: c.Json = False,
) -> None:
    """Feed files or standard input to a session; it is created if it does not exist."""
    if notes_every is not None and notes_every < 1:
        raise BadInput(f"--notes-every must be 1 or more, not {notes_every}")
    sources = list(texts(files))
    changes = c.given(
        placement=placement, adapter=adapter, collections=collection, window=window, context_tokens=context_tokens
    )

    async def work() -> None:
        async with c.Opened(db=db, model=model, device=device, dtype=dtype) as assistant:
            opened = await assistant.session(session, **changes)
            if not json:
                c.report_resume(opened)
            with c.reading_bar() as bar:
                task = bar.add_task("reading", total=0, rate="")
                meter = Meter(opened, bar, task, notes_every)
                for name, pieces in sources:
                    bar.update(task, description=name)
                    async for text in c.arriving(pieces):
                        await meter.feed(text)
            total = meter.total
            if json:
                notes = [{"tokens": n.tokens, **n.answer.to_dict()} for n in total.notes]
                c.print_json({"session": session, "read": opened.tokens, **vars(total), "notes": notes})
                return
            for note in total.notes:
                c.out.print(f"[{note.tokens:,} tokens] {note.answer.text.strip()}", markup=False)
            rate = total.tokens / total.seconds if total.seconds else 0.0
            c.out.print(
                f"read {total.tokens:,} tokens in {total.seconds:.1f} s ({rate:,.0f} tokens/s), "
                f"{total.blocks:,} blocks saved; session {session} holds {opened.tokens:,} tokens",
                markup=False,
            )
            if total.slides:
                c.out.print(
                    f"the window slid {total.slides} times; what left it ({opened.window_start:,} tokens) "
                    "stays retrievable"
                )

    c.run(work())
