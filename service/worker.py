"""`Worker`: messages in, answers out, nothing lost.

Four loops on one event loop, none of which waits for the model: the link (stay connected), the intake (store, then
acknowledge), the work (sessions side by side, each in order) and the outbox (publish, then mark).
"""

import asyncio
import contextlib
import datetime as dt
import logging
import math
import os
import random
import time
import traceback
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import partial
from itertools import count
from typing import TypeVar

from sqlite_utils import Database as Tables

from longstride.errors import BadInput, Busy, ContextFull, LongstrideError, StorageError, StorageUnavailable
from longstride.scheduler.assistant import Assistant
from longstride.service.care import Care
from longstride.service.metrics import Metrics
from longstride.service.mqtt import Link, LinkLost, Refused
from longstride.service.outbox import Outbox
from longstride.service.requests import Request, Topics, received
from longstride.service.settings import WorkerSettings
from longstride.service.work import Work
from longstride.storage.jobs import Job, JobGone, Jobs
from longstride.storage.lock import WorkerLock

T = TypeVar("T")
log = logging.getLogger("longstride.worker")
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)  # of the message that is worked on

POLL_S = 1.0  # for what other processes change in the database
GOODBYE_S = 5.0  # for the replies that are ready, at the end
STEADY_S = 10.0  # a connection that lived so long was none that breaks at once
LONGEST_WAIT_S = 60.0


def backoff_s(failures: int) -> float:
    """Seconds to wait after so many failures: doubling, with jitter so that many workers do not come back at once."""
    return float(min(LONGEST_WAIT_S, 0.5 * 2 ** min(failures, 10))) * random.uniform(0.5, 1.0)  # noqa: S311 - no secret


class Worker:
    """Works off the messages of one database. `run` returns after `stop`."""

    def __init__(self, assistant: Assistant, settings: WorkerSettings) -> None:
        self.assistant = assistant
        self.settings = settings
        self.topics = Topics(settings.topics)
        self.jobs = Jobs(assistant.database)
        self.metrics = Metrics()
        self.work = Work(assistant, self.jobs, settings, self.metrics, self._publish)
        self.problems: dict[str, str] = {}  # what keeps the worker from its work now: broker, storage
        self.care = Care(self.jobs, settings, self.metrics, self._condition)
        self.connected = asyncio.Event()
        self._link: Link | None = None
        self._stopping = asyncio.Event()
        self._news = asyncio.Event()  # a message arrived, a job ended, or it is time to stop
        self.outbox = Outbox(self.jobs, self._surely)
        self._running: dict[str, asyncio.Task[None]] = {}  # by session
        self._paused: dict[str, float] = {}  # sessions that wait after a failure, until when
        self._failures: dict[str, int] = {}
        self._since = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")

    def stop(self) -> None:
        """Finish: text that is being read stops at the last saved chunk, answers have `grace_s` to end."""
        self._stopping.set()
        self._news.set()

    async def run(self) -> None:
        """Work until `stop`. Raises `StorageError` if another worker holds the database, `BadInput` for settings."""
        Link(self.settings)  # what is wrong at the start is told, and what goes wrong later waited out
        with WorkerLock(self.jobs.database), self._metrics_port():
            again = await self.jobs.database.awrite(self.jobs.recover)
            log.info("started", extra={"interrupted": again, "waiting": (await asyncio.to_thread(self.jobs.depth))[0]})
            loops = [asyncio.create_task(loop) for loop in (self._dispatch(), self._stay_connected(), self.care.loop())]
            state = "lost"
            try:
                await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
                for loop in loops:
                    if loop.done():
                        loop.result()  # the first is done when it was told to stop; the others only if they failed
                state = "stopped"
                await self._flush()
            finally:
                await self._announce(state)
                tasks = [*loops, *self._running.values()]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self.care.write("stopped")
                log.info("stopped")

    def _metrics_port(self) -> contextlib.AbstractContextManager[object]:
        if self.settings.metrics_port is None:
            return contextlib.nullcontext()
        return self.metrics.serve(self.settings.metrics_host, self.settings.metrics_port)

    def _condition(self) -> dict[str, object]:
        return {"connected": self.connected.is_set(), "running": len(self._running), "problem": self.problem}

    @property
    def problem(self) -> str:
        """What keeps the worker from its work now; empty when nothing does."""
        return "; ".join(self.problems.values())

    # --- the link ---

    async def _stay_connected(self) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            try:
                async with self._connected() as link:
                    began = time.monotonic()
                    await self._serve(link)
            except (LinkLost, Refused, BadInput) as error:
                # a password or certificate that is just being changed is a reason to wait, as is the broker's refusal
                self.problems["broker"] = f"no connection to the broker: {error}"
            except StorageError as error:
                self.problems["storage"] = str(error)
            failures = 0 if time.monotonic() - began > STEADY_S else failures + 1
            wait = backoff_s(failures)
            log.warning("no connection", extra={"problem": self.problem, "again_in_s": round(wait, 1)})
            await asyncio.sleep(wait)

    @asynccontextmanager
    async def _connected(self) -> AsyncGenerator[Link, None]:
        async with Link(self.settings) as link:
            await link.announce({"state": "online", "since": self._since, "pid": os.getpid()})
            log.info("connected")
            self._link = link
            self.problems.pop("broker", None)
            self.connected.set()
            self.metrics.connected.set(1)
            try:
                yield link
            finally:
                self._link = None
                self.connected.clear()
                self.metrics.connected.set(0)

    async def _serve(self, link: Link) -> None:
        """Take messages and send replies until the connection breaks."""
        tasks = [
            asyncio.create_task(self._intake(link)),
            asyncio.create_task(self.outbox.serve(link)),
            asyncio.create_task(link.lost()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _publish(self, topic: str, payload: bytes) -> None:
        """Send what may get lost: nobody waits for it, and without a connection it is not sent."""
        if self._link is not None:
            with contextlib.suppress(LinkLost):
                await self._link.publish(topic, payload, sure=False)

    # --- in ---

    async def _intake(self, link: Link) -> None:
        async for message in link.messages():
            await self._room()
            job, problem = await asyncio.to_thread(
                received, self.topics, message.topic, message.payload, message.reply_topic, message.correlation,
                limit_bytes=self.settings.message_limit_bytes,
            )  # fmt: skip
            replies = self.work.replies.dead(job, problem) if problem else []
            new = await self._surely(partial(self.jobs.receive, job=job, problem=problem, replies=replies))
            link.acknowledge(message)
            outcome = "repeated" if not new else "refused" if problem else "received"
            self.metrics.messages.labels(outcome).inc()
            log.info(outcome, extra={"request": job.key, "bytes": len(message.payload)})
            self._news.set()
            if problem:
                self.outbox.news.set()

    async def _room(self) -> None:
        """Wait while as much waits here as may; the broker holds the rest."""
        while True:
            count, size = await asyncio.to_thread(self.jobs.depth)
            self.metrics.waiting.set(count)
            self.metrics.waiting_bytes.set(size)
            if count < self.settings.inbox_limit and size < self.settings.inbox_limit_bytes:
                return
            await asyncio.sleep(POLL_S / 4)

    async def _surely(self, change: Callable[[Tables], T]) -> T:
        """A transaction that has to be; waits for as long as the database cannot be written."""
        for failures in count():
            try:
                done = await self.jobs.database.awrite(change)
            except StorageError as error:
                self.problems["storage"] = str(error)
                wait = backoff_s(failures)
                log.error("cannot store", extra={"problem": str(error), "again_in_s": round(wait, 1)})  # noqa: TRY400
                await asyncio.sleep(wait)
            else:
                self.problems.pop("storage", None)
                return done
        raise AssertionError("counting does not end")

    # --- the work ---

    async def _dispatch(self) -> None:
        """Give every session its oldest message, as many sessions at once as may be."""
        while not self._stopping.is_set():
            self._news.clear()
            while len(self._running) < self.settings.sessions_at_once and not self._stopping.is_set():
                jobs = await self._take()
                if not jobs:
                    break
                task = asyncio.create_task(self._run(jobs), name=jobs[0].kind)
                self._running[jobs[0].session] = task
                task.add_done_callback(partial(self._ended, jobs[0].session))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._news.wait()
        await self._wind_down()

    def _ended(self, session: str, task: asyncio.Task[None]) -> None:
        del self._running[session]
        if not task.cancelled() and task.exception() is not None:
            log.error("a job was left over", extra={"problem": f"internal error ({type(task.exception()).__name__})"})
            self._paused[session] = math.inf  # what comes behind it waits for the next start, which takes it up
        self._news.set()
        self.outbox.news.set()

    async def _take(self) -> list[Job]:
        now = time.monotonic()
        self._paused = {session: until for session, until in self._paused.items() if until > now}
        busy = {*self._running, *self._paused}

        def take(tables: Tables) -> list[Job]:
            # what failed twice is tried alone, so that nothing else is blamed for it, or dies with it
            return [] if self._running and self.jobs.suspects(tables) else self.jobs.take(tables, busy)

        try:
            taken = await self.jobs.database.awrite(take)
        except StorageError as error:
            self.problems["storage"] = str(error)
            log.error("cannot take a message", extra={"problem": str(error)})  # noqa: TRY400
            return []
        self.problems.pop("storage", None)
        return taken

    async def _run(self, jobs: list[Job]) -> None:
        """Jobs of one session, one or several texts; whatever becomes of them is stored."""
        request_id.set(", ".join(job.key for job in jobs))
        started = time.perf_counter()
        outcome = "done"
        try:
            good = await self._readable(jobs)
            if not good:
                return
            jobs = [job for job, _ in good]
            await self.work.do(good)
            self._recovered(jobs[0].session)
        except JobGone:
            outcome = "removed"
        except asyncio.CancelledError:
            # once, as the next start finds them anyway: a full disk must not keep the worker from its end
            with contextlib.suppress(LongstrideError):
                await self.jobs.database.awrite(partial(self._put_back, jobs, counted=False))
            log.info("put back", extra={"seconds": round(time.perf_counter() - started, 3)})
            raise
        except (Busy, StorageUnavailable) as error:
            outcome = await self._again(jobs, str(error), counted=False)
        except (BadInput, ContextFull) as error:
            outcome = await self._refused(jobs, str(error))
        except Exception as error:
            # the error's own words may hold text of a session, or name a document that this one must not know
            where = "".join(traceback.format_tb(error.__traceback__))
            log.debug("failed", exc_info=error)
            outcome = await self._again(jobs, f"internal error ({type(error).__name__})", counted=True, where=where)
        if outcome != "dead":
            self.metrics.messages.labels(outcome).inc(len(jobs))
        seconds, waited = round(time.perf_counter() - started, 3), round(jobs[0].age_s, 1)
        log.info(outcome, extra={"messages": len(jobs), "seconds": seconds, "waited_s": waited})

    async def _readable(self, jobs: list[Job]) -> list[tuple[Job, Request]]:
        """What the jobs ask for; those that ask for nothing that can be done are dead."""
        good = []
        for job in jobs:
            try:
                good.append((job, await self.work.read(job)))
            except BadInput as error:
                await self._bury(job, str(error))
        return good

    async def _refused(self, jobs: list[Job], reason: str) -> str:
        """What cannot be done is dead; of several, each is tried alone to find out which it is."""
        if len(jobs) > 1:
            await self._give_back(jobs, counted=True)
            return "again"
        return await self._bury(jobs[0], reason)

    async def _again(self, jobs: list[Job], reason: str, *, counted: bool, where: str = "") -> str:
        """Try jobs once more after a while, unless they were tried often enough; the session waits with them."""
        session, attempts = jobs[0].session, jobs[0].attempts
        if counted and attempts >= self.settings.attempts and len(jobs) == 1:
            return await self._bury(jobs[0], reason)
        failures = self._failures[session] = self._failures.get(session, 0) + 1
        self._paused[session] = time.monotonic() + backoff_s(failures - 1)
        self.problems[f"session {session}"] = reason
        log.warning("to be tried again", extra={"problem": reason, "attempt": attempts, "where": where})
        await self._give_back(jobs, counted=counted)
        return "again"

    def _recovered(self, session: str) -> None:
        self._failures.pop(session, None)
        self.problems.pop(f"session {session}", None)

    async def _give_back(self, jobs: list[Job], *, counted: bool) -> None:
        # the next try begins with what is stored, which another process may have changed
        self.work.close(jobs[0].session)
        await self._surely(partial(self._put_back, jobs, counted=counted))

    def _put_back(self, jobs: list[Job], tables: Tables, *, counted: bool) -> None:
        for job in jobs:
            with contextlib.suppress(JobGone):  # it was done before the others failed, or was removed
                self.jobs.give_back(tables, job.seq, counted=counted)

    async def _bury(self, job: Job, reason: str) -> str:
        replies = self.work.replies.dead(job, reason)
        self._recovered(job.session)
        self.metrics.messages.labels("dead").inc()
        log.warning("dead", extra={"problem": reason, "request": job.key})
        with contextlib.suppress(JobGone):
            await self._surely(lambda tables: self.jobs.bury(tables, job.seq, reason, replies))
        return "dead"

    # --- the end ---

    async def _wind_down(self) -> None:
        """Reading stops at once, at what was saved; answers may end."""
        log.info("stopping", extra={"running": len(self._running)})
        tasks = list(self._running.values())
        for task in tasks:
            if task.get_name() == "feed":
                task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=self.settings.grace_s)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _flush(self) -> None:
        """Send what is ready to be sent, if the broker is there."""
        link, until = self._link, time.monotonic() + GOODBYE_S
        while link is not None and link is self._link and time.monotonic() < until:
            if not await asyncio.to_thread(self.jobs.outgoing, 1):
                return
            await asyncio.sleep(0.02)

    async def _announce(self, state: str) -> None:
        """Say how it ended; a connection that ends in order takes the last will with it."""
        if self._link is not None:
            with contextlib.suppress(LinkLost, Refused):
                await self._link.announce({"state": state, "since": self._since})
