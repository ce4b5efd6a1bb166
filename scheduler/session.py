"""`Session`: one stream. Reads on, answers with sources, comes back after a restart."""

import asyncio
import logging
import time
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import TypeVar

from sqlite_utils import Database as Tables

from longstride.engine.adapter import Adapter
from longstride.engine.context import MIN_SINK, Context, Placement
from longstride.engine.draft import MOST_NODES
from longstride.engine.sequence import Sequence
from longstride.errors import BadInput, ContextFull, StorageError
from longstride.scheduler import notes
from longstride.scheduler.adapters import check_adapter, refresh_of
from longstride.scheduler.answer import Answer, Note, Piece, ReadReport, ResumeReport
from longstride.scheduler.bookmarks import Unread, unread
from longstride.scheduler.core import Also, Change, Core
from longstride.scheduler.device import finished
from longstride.scheduler.marks import Marks
from longstride.scheduler.memory import StreamMemory
from longstride.scheduler.pieces import StoredPieces
from longstride.scheduler.settings import SessionSettings, changed_for_answer
from longstride.scheduler.snapshot import Snapshot
from longstride.scheduler.storing import Storing, all_ended
from longstride.scheduler.turn import Turn
from longstride.scheduler.view import View
from longstride.scheduler.windows import new_window
from longstride.storage.sessions import StoredSession, StreamPassage

T = TypeVar("T")
log = logging.getLogger("longstride")
RECALLED = 64  # earlier answers that drafts are taken from after a restart


async def _at_once() -> None:
    """Nobody waits to go on."""


def _told(also: Also[int], read: int, tables: Tables) -> None:
    also(tables, read)


class Session:
    """A stream being read, with its context, cache and index. Made by `Assistant.session`.

    One operation at a time; others wait for their turn. `resumed` says how it came back, None for a new session.
    """

    def __init__(
        self, core: Core, stored: StoredSession, settings: SessionSettings, adapter: Adapter | None = None
    ) -> None:
        self.core = core
        self.name = stored.name
        self.id = stored.id
        self.settings = settings
        self.resumed: ResumeReport | None = None
        tokenizer = core.model.tokenizer
        self.frame = tokenizer.frame(settings.system)
        check_adapter(adapter, settings, self.name)
        self.marks = Marks.of(tokenizer, settings.placement, adapter)
        limit = core.model.runner.max_positions
        if settings.context_tokens is not None:
            if settings.context_tokens > limit:
                raise BadInput(f"context_tokens {settings.context_tokens} passes the model's {limit}")
            limit = settings.context_tokens
        segment = settings.passages * settings.passage_tokens
        reserved = self.passage_tokens = settings.passage_tokens
        if settings.placement is Placement.BESIDE:
            # what is reserved decides the stream's positions, so marks take their room from the passages: a session
            # that changes its adapter keeps its rows
            self.passage_tokens -= self.marks.size
            if self.passage_tokens < 1:
                raise BadInput(
                    f"passage_tokens {reserved} leaves no room for passages between the adapter's marks of "
                    f"{self.marks.size} tokens; raise it"
                )
        else:
            reserved = segment + self.marks.size
        context = Context(
            self.frame.prompt,
            placement=settings.placement,
            limit=limit,
            reserved=reserved,
            refresh=refresh_of(settings.refresh, settings.placement, adapter),
            weight=settings.passage_weight,
            window=new_window(settings, tokenizer, max(len(self.frame.prompt), MIN_SINK)),
        )
        self.headroom = min(settings.max_tokens + 128, context.room // 4)
        if context.room - self.headroom < 16:
            raise BadInput(
                f"passages of {settings.passage_tokens} tokens leave no room for text in a context of {limit}; "
                "shorten them (passage_tokens, passages) or take a longer context (context_tokens)"
            )
        self.pieces = StoredPieces(core, lambda: self.id)
        rows = limit + segment
        self.sequence = Sequence(core.model.runner, context, max_rows=rows, store=self.pieces, adapter=adapter)
        self.snapshot = Snapshot(core.model, core.blocks, core.device, self.sequence, core.block_tokens)
        self.stream = array("I")
        self.view = View(self.sequence, self.stream, self.headroom, leads=settings.window == notes.ROLLUP)
        drafts = settings.drafting != "off"
        self.memory = StreamMemory(self.name, self.stream, core.model, settings.passage_tokens, drafts=drafts)
        self._lock = asyncio.Lock()
        self._failure: str | None = None

    # --- coming back ---

    async def restore(self, stored: StoredSession, stream: "array[int]", passages: list[StreamPassage]) -> None:
        """Take over what was stored: token ids, passages, and the KV blocks that are sound."""
        started = time.perf_counter()
        self.stream.extend(stream)
        lead = await asyncio.to_thread(notes.stored_lead, self) if self.settings.window == notes.ROLLUP else []
        context = self.sequence.context
        visible = len(stream) - stored.window_start
        if visible > context.room and self.settings.window == "refuse":
            # a setting made the context shorter than it was
            raise ContextFull(
                f"session {self.name!r} holds {visible} tokens, more than the {context.room} that now fit; open it "
                "with its former settings or with --window sinks"
            )
        self.view.show(stored.window_start, lead)
        restored, problems = await self.snapshot.restore(self.id)
        answers = await asyncio.to_thread(self.core.sessions.last_texts, self.id, RECALLED)
        await asyncio.to_thread(self.memory.restore, passages, answers)
        seconds = time.perf_counter() - started
        self.resumed = ResumeReport(len(context.text), restored, seconds, tuple(problems))

    # --- reading ---

    @property
    def tokens(self) -> int:
        """Stream tokens read."""
        return len(self.stream)

    @property
    def window_start(self) -> int:
        """First stream token in the context."""
        return self.view.start

    async def feed(
        self,
        text: str,
        *,
        bookmark: str | None = None,
        notes_every: int | None = None,
        progress: Callable[[int], None] | None = None,
        also: Also[int] | None = None,
    ) -> ReadReport:
        """Read on. With `bookmark`, a name for the text, only what was not read of it before (`unread`). With
        `notes_every`, write a running note after every so many tokens.

        `progress` hears of each chunk's tokens; `also` joins the transaction that saves each chunk and is told how many
        of these tokens have been read by then. Raises `ContextFull` when `text` does not fit and the window policy
        is `refuse` (nothing is read then), `Busy` when sessions at work hold the memory or the device, and
        `StorageError` when it cannot be saved (what was saved before stands).
        """
        if notes_every is not None and notes_every < 1:
            raise BadInput(f"notes every {notes_every} tokens: it must be 1 or more")
        if bookmark is None:
            ids = await asyncio.to_thread(self.core.model.tokenizer.encode, text)
        else:
            left = await self.unread(text, bookmark)
            ids, also = left.ids, left.and_also(also)
        return await self.feed_ids(ids, notes_every=notes_every, progress=progress, also=also)

    async def unread(self, text: str, bookmark: str, *, again: bool = False) -> Unread:
        """What was not read yet of `text`, which goes by the name `bookmark` in this session; with `again` all of it.

        A reading that was interrupted goes on so, and so does one of a file that has grown.
        """
        return await asyncio.to_thread(unread, self, bookmark, text, again=again)

    async def feed_ids(
        self,
        ids: list[int],
        *,
        notes_every: int | None = None,
        progress: Callable[[int], None] | None = None,
        also: Also[int] | None = None,
    ) -> ReadReport:
        """`feed` for token ids. Raises `BadInput` too for an id that the model does not have."""
        started = time.perf_counter()
        vocabulary = self.core.model.runner.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
            raise BadInput(f"token ids must be between 0 and {vocabulary - 1}")
        if (anchor := self.sequence.context.adds) is not None and anchor in ids:
            raise BadInput(f"token {anchor} stands for anchors in this session; leave it out")
        if notes_every is not None and notes.size(self, notes.NOTE) + 8 > self.headroom:
            raise BadInput(
                f"a context of {self.sequence.context.limit} tokens is too short for notes; take a longer one "
                "(context_tokens)"
            )
        report = ReadReport(tokens=len(ids))
        async with self._work(len(ids)):
            before = self.sequence.computed
            room = self.sequence.context.room - self.headroom
            if self.settings.window == "refuse" and len(ids) > room:
                raise ContextFull(
                    f"{len(ids)} tokens do not fit into session {self.name!r}: {max(room, 0)} are free of the "
                    f"{self.sequence.context.limit} of its context ({self.headroom} kept for answers); read less, or "
                    "slide the window with --window sinks (what leaves it stays retrievable)"
                )
            if notes_every is not None and ids and self.tokens and self.tokens % notes_every == 0:
                report.notes += await self._missing_note()
            at = 0
            storing: list[Storing] = []  # chunks on their way to the database while the next is computed
            try:
                while at < len(ids):
                    # the window slides when the next token does not fit, however the text was cut: what a session
                    # sees depends on its stream alone
                    if self.view.slid(1 + self.headroom) is not None:
                        await all_ended(storing, report, progress)
                    report.slides += await self._make_room(1 + self.headroom)
                    size = min(self.core.device.budget_tokens, self.view.ahead)
                    if notes_every is not None:
                        size = min(size, notes_every - self.tokens % notes_every)
                    chunk = ids[at : at + size]
                    at += len(chunk)
                    await self._read(chunk)
                    told = None if also is None else partial(_told, also, at)
                    storing.append(Storing(partial(self._save, chunk, told), len(chunk), storing[-1:]))
                    await storing[-1].copied.wait()
                    await all_ended(storing, report, progress, but=1)
                    if notes_every is not None and self.tokens % notes_every == 0:
                        await all_ended(storing, report, progress)
                        report.notes.append(Note(self.tokens, await notes.note(self)))
                await all_ended(storing, report, progress)
            finally:
                for chunk_stored in storing:  # something else went wrong, or this was cancelled
                    await chunk_stored.left()
            report.encoded = self.sequence.computed - before
        report.seconds = time.perf_counter() - started
        return report

    async def _missing_note(self) -> list[Note]:
        """The note that is due here, if a reading that was broken off has left it out."""
        sessions, tokens = self.core.sessions, self.tokens
        if await sessions.database.aread(lambda tables: sessions.has_answer(tables, self.id, "note", tokens)):
            return []
        return [Note(tokens, await notes.note(self))]

    async def _make_room(self, needed: int) -> int:
        """Slide the window if `needed` tokens do not fit; returns how often it slid (0 or 1)."""
        start = self.view.slid(needed)
        if start is None:
            return 0
        lead = await notes.roll_up(self, start) if self.settings.window == notes.ROLLUP else []
        self.view.slide(start, lead)
        self.snapshot.reset()
        return 1

    async def _read(self, chunk: list[int]) -> None:
        """Compute a chunk's rows (and whatever else was left pending)."""
        self.sequence.context.append(chunk)
        self.stream.extend(chunk)
        try:
            while self.sequence.pending:
                await self.core.device.step(self.sequence, lambda _logits: None)
        except BaseException:
            # not read: the text is taken back, so that memory and database say the same
            del self.stream[len(self.stream) - len(chunk) :]
            self.sequence.take_back(len(chunk))
            raise

    async def _save(self, chunk: list[int], also: Change | None, copied: Callable[[], Awaitable[None]]) -> int:
        """`_commit`. If it fails, memory is ahead of the database and the session must be opened again."""
        try:
            return await self._commit(chunk, also, copied)
        except BaseException as error:
            self.fail(error)
            raise

    async def _commit(self, chunk: list[int], also: Change | None, copied: Callable[[], Awaitable[None]]) -> int:
        """Store a chunk's ids, passages and full blocks in one transaction, and `also`; returns the blocks stored.
        `copied` is awaited where the session may go on."""
        core, tokens = self.core, self.tokens
        passages = self.memory.new_passages() if chunk else []
        blocks = await self.snapshot.new_blocks()
        start, packed, window = tokens - len(chunk), array("I", chunk).tobytes(), self.window_start
        stale, keep = self.snapshot.take_stale(), set(self.snapshot.ids)
        await copied()

        def change(tables: Tables) -> int:
            core.sessions.append(tables, self.id, start, packed, passages, window)
            core.blocks.release(tables, stale, self.id)
            if also is not None:
                also(tables)
            return core.blocks.put(tables, blocks, self.id, keep)

        stored = await core.sessions.database.awrite(change)
        await asyncio.to_thread(self.memory.learn, passages, tokens)
        return stored

    def close(self, why: str) -> None:
        """Let go of the KV, now or after the operation under way; this object refuses all further use."""
        self._failure = why
        if not self._lock.locked():
            self.snapshot.suspend()

    def fail(self, error: BaseException) -> None:
        """What is stored is not what is in memory, so this object refuses all further use."""
        self._failure = f"saving failed: {str(error) or type(error).__name__}"

    @property
    def healthy(self) -> bool:
        """Whether memory and database still say the same; if not, the assistant opens the session anew."""
        return self._failure is None

    @asynccontextmanager
    async def _work(self, tokens: int) -> AsyncGenerator[None, None]:
        """This session's operation, alone, with its KV on the device and room for `tokens` more."""
        async with self._lock:
            self._usable()
            segment = self.settings.passages * self.settings.passage_tokens
            rows = self.sequence.context.rows + segment + tokens + MOST_NODES
            async with self.core.residency.working(self.snapshot, rows):
                for problem in await self.snapshot.wake(self.id):
                    log.warning("session %s: %s", self.name, problem)
                try:
                    yield
                finally:
                    if not self.healthy:
                        self.snapshot.suspend()  # it will be opened anew, or was removed

    def _usable(self) -> None:
        if self._failure is not None:
            raise StorageError(f"session {self.name!r} must be opened again: {self._failure}")

    # --- answering ---

    async def ask(
        self, question: str, *, remember: bool = False, also: Also[Answer] | None = None, **changes: object
    ) -> AsyncGenerator[Piece, None]:
        """Answer from the stream and the documents; pieces stream, the last carries the `Answer`.

        Closing the iterator stops the device within one step and leaves the session as it was. `remember`: keep
        question and answer in the stream. `also` joins the transaction that stores the answer. `changes`: settings for
        this answer only (stride, policy, max_tokens, temperature, ...). Raises `BadInput`, `ContextFull` and `Busy`.
        """
        if not question.strip():
            raise BadInput("the question is empty")
        settings = changed_for_answer(self.settings, changes)
        head = self.core.model.tokenizer.encode(f"\n\n{question.strip()}")
        last: Piece | None = None
        async with self._work(len(head) + min(settings.max_tokens, self.sequence.context.limit)):
            turn = Turn(self, settings, question, [*head, *self.frame.answer])
            async with aclosing(turn.run("ask", remember=remember, also=also)) as pieces:
                async for piece in pieces:
                    if piece.answer is None:
                        yield piece
                    last = piece
        # outside the lock, so that whoever stops at the last piece does not hold the session
        if last is not None:
            yield last

    async def answer(
        self, question: str, *, remember: bool = False, also: Also[Answer] | None = None, **changes: object
    ) -> Answer:
        """`ask`, waiting for the whole answer."""
        answer: Answer | None = None
        async for piece in self.ask(question, remember=remember, also=also, **changes):
            answer = piece.answer
        if answer is None:
            raise RuntimeError("an answer ended without its last piece")
        return answer

    async def note(self, *, also: Also[Answer] | None = None) -> Answer:
        """A running note on what was read last; stored like an answer, together with `also`."""
        async with self._work(self.settings.max_tokens):
            return await notes.note(self, also)

    @property
    def question_room(self) -> int:
        """Tokens of a question that fit without sliding the window."""
        return max(0, self.sequence.context.room - self.settings.max_tokens)

    async def store(self) -> None:
        """Store blocks that have become whole."""
        await finished(self._save([], None, _at_once))

    async def remember(self, ids: list[int], also: Change) -> None:
        """Make a finished turn's ids (already in the context) part of the stream; `also` is stored with them."""
        self.stream.extend(ids)
        await finished(self._save(ids, also, _at_once))

    def save_window(self, tables: Tables) -> None:
        """Store where the context begins, which a turn may have moved; inside the caller's transaction."""
        self.core.sessions.append(tables, self.id, self.tokens, b"", [], self.window_start)

    async def make_room(self, needed: int) -> None:
        """Room for a turn of `needed` tokens, sliding the window where the policy allows it."""
        if self.settings.window != "refuse":
            await self._make_room(needed)
