"""Options and helpers that commands share."""

import asyncio
import contextlib
import json
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from longstride.scheduler.answer import Answer, Source
from longstride.storage.database import Database

if TYPE_CHECKING:  # torch takes seconds to import, and many commands need none
    from longstride.scheduler.assistant import Assistant
    from longstride.scheduler.retriever import Passage
    from longstride.scheduler.session import Session

T = TypeVar("T")

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Db = Annotated[Path | None, typer.Option("--db", help="The database file.", show_default="longstride.db")]
ModelName = Annotated[
    str | None, typer.Option("--model", help="smollm2, a folder, a GGUF file or a hub id.", show_default="smollm2")
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.", show_default="auto")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="auto, fp32, bf16 or fp16.", show_default="auto")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SessionName = Annotated[str, typer.Option("--session", "-s", help="The session's name.")]
Placement = Annotated[
    str | None, typer.Option("--placement", help="Where passages stand: beside, end or turn.", show_default="beside")
]
Adapter = Annotated[
    str | None,
    typer.Option("--adapter", help="A folder with a LoRA adapter, none, or auto.", show_default="auto"),
]
Window = Annotated[
    str | None,
    typer.Option(
        "--window",
        help="When the context is full: slide (sinks; rollup: behind notes on what left; separators, cascade, anchors, "
        "anchors-added: keeping fewer rows), or refuse.",
        show_default="sinks",
    ),
]
Collections = Annotated[
    list[str] | None,
    typer.Option(
        "--collection", help="Retrieve from this collection of documents; repeat for more.", show_default="default"
    ),
]
Stride = Annotated[
    int | None, typer.Option("--stride", help="Retrieve every so many generated tokens.", show_default="16")
]
Policy = Annotated[
    str | None,
    typer.Option(
        "--policy", help="When to retrieve: tokens, sentence, confidence, drift, never.", show_default="tokens"
    ),
]
ContextTokens = Annotated[
    int | None, typer.Option("--context-tokens", help="Context length.", show_default="the model's own")
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Tokens of an answer.", show_default="256")]
Temperature = Annotated[float | None, typer.Option("--temperature", help="0 is greedy.", show_default="0")]
Drafting = Annotated[
    str | None,
    typer.Option(
        "--drafting",
        help="Draft from text already seen and the model's own n-grams: off, lookup (one branch) or tree.",
        show_default="tree",
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def database(db: Path | None) -> Database:
    """The database for a command that looks at what is stored. One that is named must be there."""
    from longstride.scheduler.settings import load_settings

    return Database(load_settings(**given(db=db)).db, create=db is None)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine. SIGTERM cancels it once an assistant is open (`Opened`), so that it ends in order."""
    try:
        return asyncio.run(work)
    except asyncio.CancelledError:
        raise typer.Exit(128 + signal.SIGTERM) from None


async def arriving(items: Iterator[T]) -> AsyncGenerator[T, None]:
    """`items` as they come, made one ahead in a thread of their own: whoever waits for input can be cancelled, and a
    thread that still waits for it does not keep the process from its end."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue[tuple[str, Any]]()
    room, left = threading.Semaphore(), threading.Event()

    def put(kind: str, what: Any) -> None:
        room.acquire()
        if not left.is_set():
            loop.call_soon_threadsafe(arrived.put_nowait, (kind, what))

    def make() -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody listens any more
            try:
                for item in items:
                    put("item", item)
                    if left.is_set():
                        return
            except Exception as error:  # noqa: BLE001 - raised where the items are awaited
                put("error", error)
            else:
                put("end", None)

    threading.Thread(target=make, daemon=True, name="longstride-input").start()
    try:
        while (event := await arrived.get())[0] != "end":
            room.release()
            if event[0] == "error":
                raise event[1]
            yield event[1]
    finally:
        left.set()
        room.release()


class Loading:
    """A progress bar for a model's first conversion; says nothing when there is none."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: Any = None

    def __call__(self, what: str, done: float) -> None:
        if self._bar is None:
            self._bar = Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), console=err)
            self._task = self._bar.add_task(what, total=1.0)
            self._bar.start()
        self._bar.update(self._task, description=what, completed=done)
        if done >= 1.0:
            self.close()

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def loaded(load: Callable[..., T], model: str | None, device: str | None, dtype: str | None) -> T:
    """What `load` (of engine/model.py) gives for these options, over the settings; with the bar for a conversion."""
    from longstride.scheduler.settings import load_settings

    settings = load_settings(**given(model=model, device=device, dtype=dtype))
    bar = Loading()
    try:
        return load(settings.model, device=settings.device, dtype=settings.dtype, progress=bar)
    finally:
        bar.close()


class Opened:
    """`async with Opened(...) as assistant`: an assistant, with the bar for its model's first conversion."""

    def __init__(self, **options: Any) -> None:
        from longstride.scheduler.assistant import Assistant

        self._loading = Loading()
        self._assistant = Assistant.open(progress=self._loading, **given(**options))

    async def __aenter__(self) -> "Assistant":
        try:
            opened = await self._assistant.__aenter__()
        finally:
            self._loading.close()
        task = asyncio.current_task()
        if task is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return opened

    async def __aexit__(self, *_: object) -> None:
        await self._assistant.close()


def reading_bar() -> Progress:
    """The bar of `read` and `summarize`: tokens, and tokens a second."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    )


def print_json(data: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")


def report_resume(session: "Session") -> None:
    """Say what a resumed session did not have to compute again, and what was wrong."""
    back = session.resumed
    if back is None:
        return
    err.print(
        f"resumed {session.name}: {session.tokens:,} tokens read, {back.restored:,} of {back.tokens:,} context tokens "
        f"restored from the snapshot and not recomputed ({back.seconds:.2f} s)",
        style="dim",
        markup=False,
    )
    for problem in back.problems:
        err.print(f"warning: {problem}", style="yellow", markup=False)


def print_sources(sources: "Iterable[Source | Passage]") -> None:
    """Sources, a line each with the beginning of the passage."""
    sources = list(sources)
    if not sources:
        out.print("no passage was retrieved: all that was read is in the context, and no document matched")
    for number, source in enumerate(sources, 1):
        passage = source.passage if isinstance(source, Source) else source.id
        out.print(
            f"  [{number}] {source.document}, characters {source.start:,}-{source.stop:,} "
            f"(score {source.score:.2f}, passage {passage})",
            markup=False,
        )
        out.print(f"      {' '.join(source.text.split())[:160]}", style="dim", markup=False)


def print_usage(answer: Answer) -> None:
    """What an answer cost, in one line."""
    u, t = answer.usage, answer.timing
    out.print(
        f"  {u.cached:,} tokens reused, {u.encoded:,} encoded, {u.generated:,} generated, {u.rewritten:,} rewritten; "
        f"{u.retrievals} retrievals, {u.rewrites} rewrites; {u.drafted:,} drafted, {u.accepted:,} accepted, "
        f"{u.generated / max(1, u.steps):.1f} tokens a step; first token after {t.first_token:.2f} s, "
        f"{t.tokens_per_second:.1f} tokens/s",
        style="dim",
    )


async def stream_answer(session: "Session", question: str, **changes: Any) -> Answer:
    """Print an answer as it comes; returns it."""
    answer: Answer | None = None
    async for piece in session.ask(question, **changes):
        sys.stdout.write(piece.text)
        sys.stdout.flush()
        answer = piece.answer
    sys.stdout.write("\n")
    if answer is None:
        raise RuntimeError("an answer ended without its last piece")
    if answer.finish != "stop":
        why = "max_tokens" if answer.finish == "length" else "the context is full"
        err.print(f"(cut off after {answer.usage.generated:,} tokens: {why})", style="dim", markup=False)
    return answer
