"""`Work`: what a message asks for, done so that it can break off anywhere and go on from what was stored."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import groupby

from sqlite_utils import Database as Tables

from longstride.errors import BadInput
from longstride.scheduler.answer import Answer
from longstride.scheduler.assistant import Assistant
from longstride.scheduler.session import Session
from longstride.service.metrics import Metrics
from longstride.service.requests import Ask, Close, Feed, Replies, Request, Topics, encode, id_of, parse
from longstride.service.settings import WorkerSettings
from longstride.storage.jobs import Job, Jobs

Publish = Callable[[str, bytes], Awaitable[None]]


class Work:
    """Does jobs on an assistant's sessions. `publish` sends what may get lost (text as it comes)."""

    def __init__(
        self, assistant: Assistant, jobs: Jobs, settings: WorkerSettings, metrics: Metrics, publish: Publish
    ) -> None:
        self.assistant = assistant
        self.jobs = jobs
        self.settings = settings
        self.metrics = metrics
        self.topics = Topics(settings.topics)
        self.replies = Replies(self.topics)
        self._publish = publish
        self._used: OrderedDict[str, None] = OrderedDict()  # open sessions, least recently used first
        self._at_work: set[str] = set()

    async def read(self, job: Job) -> Request:
        """What a job asks for. Raises `BadInput` for what no further try can change."""
        if job.attempts > self.settings.attempts:
            raise BadInput(f"it was tried {self.settings.attempts} times, and the worker failed or died each time")
        if job.damaged:
            raise BadInput("the message was damaged in the database (its checksum is wrong); send it again")
        request = parse(job.kind, job.payload)
        if not isinstance(request, Feed) and not await self.assistant.has_session(job.session):
            # the sentence of the command line names the sessions that exist; this one must not
            raise BadInput(f"there is no session {job.session!r}; feed it first")
        return request

    async def do(self, jobs: Sequence[tuple[Job, Request]]) -> None:
        """One job, or several texts of one session, to the end.

        What they change, that they are done and their replies are stored in one transaction.
        """
        job, request = jobs[0]
        self._at_work.add(job.session)
        try:
            self._use(job.session)
            await self._do(job, request, jobs)
        finally:
            self._at_work.discard(job.session)

    async def _do(self, job: Job, request: Request, jobs: Sequence[tuple[Job, Request]]) -> None:
        if isinstance(request, Ask):
            await self._ask(job, request)
        elif isinstance(request, Close):
            await self._close(job, request)
        else:
            texts = [(job, request) for job, request in jobs if isinstance(request, Feed)]
            for every, group in groupby(texts, lambda text: text[1].notes_every or self.settings.notes_every):
                await self._feed(list(group), every)

    def _use(self, session: str) -> None:
        """Close sessions that were not used for long, so that memory does not grow with their number."""
        self._used[session] = None
        self._used.move_to_end(session)
        for idle in [name for name in self._used if name not in self._at_work]:
            if len(self._used) <= self.settings.sessions_open:
                return
            self.close(idle)

    def close(self, session: str) -> None:
        """Let go of a session: the next job on it begins with what is stored."""
        self._used.pop(session, None)
        self.assistant.close_session(session)

    # --- feed ---

    async def _feed(self, texts: list[tuple[Job, Feed]], every: int | None) -> None:
        """Read texts of one session, with a note after `every` so many tokens of it."""
        session = await self.assistant.session(texts[0][0].session)
        reading = Reading(self, await asyncio.to_thread(_spelled, session, texts))
        await self._note_if_due(session, every, reading)
        while reading.left:
            count = len(reading.left) if every is None else min(len(reading.left), every - session.tokens % every)

            def also(tables: Tables, tokens: int, count: int = count) -> None:
                # what ends where a note is due ends with the note
                noted = every is not None and session.tokens % every == 0 and tokens == count
                reading.saved(tables, tokens, ended=not noted)

            self.metrics.fed(await session.feed_ids(reading.left[:count], also=also))
            reading.advance(count)
            await self._note_if_due(session, every, reading)
        await self.jobs.database.awrite(partial(reading.saved, tokens=0, ended=True))  # nothing, as a rule

    async def _note_if_due(self, session: Session, every: int | None, reading: "Reading") -> None:
        """The note that is due where the stream stands, unless it was written before the worker died."""
        at = session.tokens
        if every is None or not at or at % every or not reading.begun:
            return
        sessions = session.core.sessions
        if await sessions.database.aread(lambda tables: sessions.has_answer(tables, session.id, "note", at)):
            return

        def also(tables: Tables, note: Answer) -> None:
            self.jobs.send(tables, reading.last.seq, self.replies.note(reading.last, at, note))
            reading.saved(tables, 0, ended=True)

        self.metrics.answered(await session.note(also=also))

    # --- ask, close ---

    async def _ask(self, job: Job, request: Ask) -> None:
        session = await self.assistant.session(job.session)

        def also(tables: Tables, answer: Answer) -> None:
            self.jobs.finish(tables, job.seq, [self.replies.answer(job, answer)])

        at = 0
        async for piece in session.ask(request.question, remember=request.remember, also=also, **request.changes()):
            if request.stream and piece.text:
                data = {"id": id_of(job), "at": at, "text": piece.text}
                await self._publish(self.topics.of(job.session, "stream"), encode(data))
                at += len(piece.text)
            if piece.answer is not None:
                self.metrics.answered(piece.answer)

    async def _close(self, job: Job, request: Close) -> None:
        done = self.replies.done(job, {"closed": True, "removed": request.remove})
        if request.remove:
            # messages that came after this one are not part of what is removed
            self._used.pop(job.session, None)
            await self.assistant.remove_session(
                job.session, jobs_before=job.seq, also=lambda tables: self.jobs.finish(tables, job.seq, done)
            )
            return
        self.close(job.session)
        await self.jobs.database.awrite(lambda tables: self.jobs.finish(tables, job.seq, done))


def _spelled(session: Session, texts: list[tuple[Job, Feed]]) -> list[tuple[Job, list[int]]]:
    """Messages with their token ids. Each is spelled by itself, so it does not matter which others it is read with."""
    encode = session.core.model.tokenizer.encode
    return [
        (job, encode(request.text if request.text.endswith("\n") else request.text + "\n")) for job, request in texts
    ]


class Reading:
    """Texts on their way into a stream. `left`: the tokens that are still to be read."""

    def __init__(self, work: Work, texts: list[tuple[Job, list[int]]]) -> None:
        self._work = work
        self._texts = texts
        self._at = 0  # tokens read, of all that were left at the beginning
        self._ended = 0  # texts that were stored as done
        self.left = [i for job, ids in texts for i in ids[job.read :]]

    @property
    def begun(self) -> bool:
        """Whether any of them is in the stream."""
        return self._at > 0 or self._texts[0][0].read > 0

    @property
    def last(self) -> Job:
        """The text that was read last."""
        at = 0
        for job, ids in self._texts:
            at += len(ids) - job.read
            if at >= self._at:
                return job
        return self._texts[-1][0]

    def advance(self, count: int) -> None:
        """So many more are read and stored."""
        self._at += count
        self.left = self.left[count:]

    def saved(self, tables: Tables, tokens: int, *, ended: bool) -> None:
        """Store that `tokens` more are read: which texts are done, and how far the next one is.

        Not `ended`: what was read to its end is not done before its note.
        """
        reached, stop = self._at + tokens, 0
        for number, (job, ids) in enumerate(self._texts):
            start, stop = stop, stop + len(ids) - job.read
            if number < self._ended:
                continue
            if stop < reached or (stop == reached and ended):
                self._work.jobs.finish(tables, job.seq, self._work.replies.done(job, {"read": len(ids)}))
                self._ended = number + 1
            else:
                if start < reached:
                    self._work.jobs.progress(tables, job.seq, job.read + reached - start)
                break
