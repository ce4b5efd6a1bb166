"""`longstride read`."""

import asyncio
import codecs
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from longstride.cli import common as c
from longstride.errors import BadInput
from longstride.scheduler.answer import ReadReport
from longstride.scheduler.convert import path_name, text_of

if TYPE_CHECKING:
    from longstride.scheduler.core import Also
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


@dataclass(frozen=True)
class Input:
    """What is to be read: a file's whole text, or standard input (no path, no text)."""

    name: str
    path: Path | None = None
    text: str = ""

    @classmethod
    def of(cls, argument: str) -> "Input":
        """Raises `BadInput` naming a file that cannot be read."""
        if argument == "-":
            return cls("standard input")
        path = Path(argument)
        try:
            return cls(path.name, path.resolve(), text_of(path))
        except BadInput as error:
            raise BadInput(f"{argument}: {error}") from error


class Reading:
    """Feeds inputs to a session and moves the bar."""

    def __init__(self, session: "Session", bar: Progress, notes_every: int | None, again: bool) -> None:
        self.session = session
        self.bar = bar
        self.task = bar.add_task("reading", total=0, rate="")
        self.notes_every = notes_every
        self.again = again
        self.total = ReadReport()

    async def read(self, source: Input) -> None:
        """Read an input; of a file what was not read into this session before."""
        self.bar.update(self.task, description=source.name)
        if source.path is None:
            async for text in c.arriving(standard_input()):
                ids = await asyncio.to_thread(self.session.core.model.tokenizer.encode, text)
                await self._feed(ids, None)
            return
        left = await self.session.unread(source.text, path_name(source.path), again=self.again)
        if left.changed:
            self._say(f"{source.name} is not as it was when it was read last; reading it from its beginning")
        elif left.known and left.ids:
            self._say(f"{source.name}: going on behind what was read of it before")
        elif left.known:
            self._say(f"{source.name}: all of it was read before (--again reads it once more)")
        await self._feed(left.ids, left.also)

    async def _feed(self, ids: list[int], also: "Also[int] | None") -> None:
        known = self.bar.tasks[self.task].total or 0
        self.bar.update(self.task, total=known + len(ids))
        report = await self.session.feed_ids(ids, notes_every=self.notes_every, progress=self._moved, also=also)
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

    @staticmethod
    def _say(what: str) -> None:
        c.err.print(what, style="dim", markup=False)


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
    again: Annotated[bool, typer.Option("--again", help="Read what was read before once more.")] = False,
    json: c.Json = False,
) -> None:
    """Feed files or standard input to a session; it is created if it does not exist.

    Of a file that was read before, wholly or in part, only the rest is read: a reading that was broken off goes on when
    it is started again, and a log that has grown is read on.
    """
    if notes_every is not None and notes_every < 1:
        raise BadInput(f"--notes-every must be 1 or more, not {notes_every}")
    inputs = [Input.of(argument) for argument in files]
    changes = c.given(
        placement=placement, adapter=adapter, collections=collection, window=window, context_tokens=context_tokens
    )

    async def work() -> None:
        async with c.Opened(db=db, model=model, device=device, dtype=dtype) as assistant:
            opened = await assistant.session(session, **changes)
            if not json:
                c.report_resume(opened)
            with c.reading_bar() as bar:
                reading = Reading(opened, bar, notes_every, again)
                try:
                    for source in inputs:
                        await reading.read(source)
                except asyncio.CancelledError:
                    c.err.print(f"stopped; session {session} holds {opened.tokens:,} tokens", markup=False)
                    raise
            total = reading.total
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
