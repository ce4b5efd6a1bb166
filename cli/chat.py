"""`longstride chat`: the interactive REPL."""

import asyncio
import shlex
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, NestedCompleter, PathCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.patch_stdout import patch_stdout

from longstride.cli import common as c
from longstride.engine.embedded import cache_folder
from longstride.errors import BadInput, LongstrideError
from longstride.scheduler.answer import Answer
from longstride.scheduler.convert import path_name, text_of

if TYPE_CHECKING:
    from longstride.scheduler.assistant import Assistant
    from longstride.scheduler.session import Session

T = TypeVar("T")
HELP = """\
Type a question, or text to ask about. Alt-Enter (or Esc, then Enter) starts a new line; Ctrl-C stops the answer only;
Ctrl-D leaves. The conversation is remembered in the session.

  /read FILE...    read files into the session; of a file what was not read before
  /ask QUESTION    ask without remembering the question and its answer
  /sources         the passages that the last answer drew on
  /stats           what the last answer reused and computed, and the session's size
  /stride [N]      show or set how often retrieval is repeated, in generated tokens
  /save            make sure that everything is saved (it is, after every answer and every chunk read)
  /sessions        list the sessions in this database
  /help            this text
  /quit            leave
"""


class Repl:
    """One conversation: reads lines, runs commands, streams answers."""

    def __init__(self, assistant: "Assistant", session: "Session") -> None:
        self.assistant = assistant
        self.session = session
        self.last: Answer | None = None
        self.failed = False  # some line was refused
        self.stride = session.settings.stride
        self.commands: dict[str, Callable[[str], Awaitable[None]]] = {
            "/read": self.read,
            "/ask": self.ask_once,
            "/sources": self.sources,
            "/stats": self.stats,
            "/stride": self.set_stride,
            "/save": self.save,
            "/sessions": self.sessions,
            "/help": self.help,
        }

    def completer(self) -> Completer:
        """Commands, and paths behind /read."""
        return NestedCompleter(
            {name: PathCompleter(expanduser=True) if name == "/read" else None for name in [*self.commands, "/quit"]}
        )

    async def line(self, text: str) -> bool:
        """Handle one input; False leaves. Errors are told and the conversation goes on."""
        text = text.strip()
        if text in {"/quit", "/exit"}:
            return False
        try:
            if not self.session.healthy:
                self.session = await self.assistant.session(self.session.name)
            if text.startswith("/"):
                name, _, rest = text.partition(" ")
                command = self.commands.get(name)
                if command is None:
                    raise BadInput(f"no command {name}; /help lists them")
                await command(rest.strip())
            elif text:
                await self.answer(text, remember=True)
        except LongstrideError as error:
            self.failed = True
            c.err.print(f"longstride: {error}", markup=False, style="red")
        return True

    async def answer(self, question: str, *, remember: bool) -> None:
        """Stream an answer; Ctrl-C stops it (within one step of the device) and nothing else."""
        answering = c.stream_answer(self.session, question, remember=remember, stride=self.stride)
        answer = await _stoppable(answering, "\n(stopped; this answer is not kept)")
        self.last = answer or self.last

    async def ask_once(self, question: str) -> None:
        """/ask"""
        await self.answer(question, remember=False)

    async def read(self, rest: str) -> None:
        """/read"""
        for path in _paths(rest):
            try:
                text = await asyncio.to_thread(text_of, path)
            except BadInput as error:
                raise BadInput(f"{path}: {error}") from error
            left = await self.session.unread(text, path_name(path.resolve()))
            if left.known and not left.ids:
                c.out.print(f"{path.name}: all of it was read before", style="dim", markup=False)
                continue
            with c.reading_bar() as bar:
                task = bar.add_task(path.name, total=len(left.ids), rate="")
                reading = self.session.feed_ids(left.ids, progress=partial(bar.advance, task), also=left.also)
                report = await _stoppable(reading, f"(stopped; /read {path} goes on there)")
            if report is None:
                return
            rate = report.tokens / report.seconds if report.seconds else 0.0
            on = ", behind what was read before" if left.known else ""
            c.out.print(
                f"read {path.name}: {report.tokens:,} tokens{on}, {rate:,.0f} tokens/s", style="dim", markup=False
            )

    async def sources(self, _rest: str) -> None:
        """/sources"""
        if self.last is None:
            raise BadInput("there is no answer yet")
        c.print_sources(self.last.sources)

    async def stats(self, _rest: str) -> None:
        """/stats"""
        if self.last is not None:
            c.print_usage(self.last)
        context, cache = self.session.sequence.context, self.session.sequence.cache
        c.out.print(
            f"  {self.session.tokens:,} tokens read, {context.rows:,} of {context.limit:,} in the context, "
            f"{cache.length:,} rows of KV ({cache.allocated_bytes / 1e6:,.0f} MB)",
            style="dim",
        )

    async def set_stride(self, rest: str) -> None:
        """/stride"""
        if rest:
            if not rest.isdigit() or int(rest) < 1:
                raise BadInput(f"/stride needs a number of tokens, 1 or more, not {rest!r}")
            self.stride = int(rest)
        c.out.print(f"retrieving every {self.stride} generated tokens", style="dim")

    async def save(self, _rest: str) -> None:
        """/save"""
        await self.assistant.database.awrite(lambda _tables: None)  # behind every write queued before
        c.out.print(f"saved in {self.assistant.database.path}", style="dim", markup=False)

    async def sessions(self, _rest: str) -> None:
        """/sessions"""
        for stored in await asyncio.to_thread(self.assistant.sessions.all):
            here = "*" if stored.id == self.session.id else " "
            c.out.print(f"{here} {stored.name}  {stored.tokens:,} tokens  {stored.updated_at}", markup=False)

    async def help(self, _rest: str) -> None:
        """/help"""
        c.out.print(HELP, markup=False, end="")


def _paths(rest: str) -> list[Path]:
    """The files named behind /read, quoted as in a shell."""
    try:
        names = shlex.split(rest)
    except ValueError as error:
        raise BadInput(f"/read: {error}") from error
    if not names:
        raise BadInput("/read needs a file")
    return [Path(name).expanduser() for name in names]


def _history() -> History:
    """Lines typed before, readable by their owner only; in memory where the folder cannot be written."""
    path = cache_folder() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _newline(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    return keys


async def _stoppable(work: Coroutine[Any, Any, T], stopped: str) -> T | None:
    """Await `work`; Ctrl-C cancels it and nothing else, which is told: then None."""
    task = asyncio.ensure_future(work)
    loop, before = asyncio.get_running_loop(), signal.getsignal(signal.SIGINT)
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        own = asyncio.current_task()
        if own is not None and own.cancelling():
            raise  # it is the REPL itself that is told to end
        c.out.print(stopped, style="dim", markup=False)
        return None
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, before)  # removing puts Python's default there, not what was before


async def _interact(repl: Repl) -> None:
    if not sys.stdin.isatty():
        async for line in c.arriving(iter(sys.stdin.readline, "")):
            if not await repl.line(line):
                break
        if repl.failed:
            raise typer.Exit(1)  # a script must be able to tell
        return
    prompt: PromptSession[str] = PromptSession(
        history=_history(), completer=repl.completer(), key_bindings=_keys(), multiline=True, prompt_continuation="… "
    )
    c.out.print("/help lists the commands", style="dim")
    while True:
        try:
            with patch_stdout():
                text = await prompt.prompt_async("> ")
        except KeyboardInterrupt:
            continue  # Ctrl-C at the prompt clears the line
        except EOFError:
            return
        if not await repl.line(text):
            return


def run(
    session: Annotated[str, typer.Argument(help="The session's name.")] = "chat",
    db: c.Db = None,
    model: c.ModelName = None,
    device: c.Device = None,
    dtype: c.Dtype = None,
    placement: c.Placement = None,
    adapter: c.Adapter = None,
    collection: c.Collections = None,
    window: c.Window = None,
    context_tokens: c.ContextTokens = None,
) -> None:
    """Talk to a session: read files, ask, see sources. It is saved as you go."""

    async def work() -> None:
        async with c.Opened(db=db, model=model, device=device, dtype=dtype) as assistant:
            changes = c.given(
                placement=placement,
                adapter=adapter,
                collections=collection,
                window=window,
                context_tokens=context_tokens,
            )
            opened = await assistant.session(session, **changes)
            c.report_resume(opened)
            await _interact(Repl(assistant, opened))

    c.run(work())
