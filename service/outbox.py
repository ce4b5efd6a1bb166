"""`Outbox`: publishes the replies that are stored, in order, and marks what the broker has."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable

from sqlite_utils import Database as Tables

from longstride.service.mqtt import Link, Refused
from longstride.storage.jobs import Jobs, Reply

log = logging.getLogger("longstride.worker")
POLL_S = 1.0
BATCH = 10  # replies on their way to the broker at once
BREAKS = 5  # connections that may break over one reply before it is set aside

Surely = Callable[[Callable[[Tables], None]], Awaitable[None]]


class Outbox:
    """One for all connections. `surely` runs a transaction that has to be."""

    def __init__(self, jobs: Jobs, surely: Surely) -> None:
        self.jobs = jobs
        self.news = asyncio.Event()  # it may hold something
        self._surely = surely
        self._breaks: Counter[int] = Counter()  # by reply: how often it was sent and nothing was heard of it

    async def serve(self, link: Link) -> None:
        """Publish until the connection breaks, which is raised as `LinkLost`."""
        while True:
            self.news.clear()
            waiting = await asyncio.to_thread(self.jobs.outgoing, BATCH)
            if waiting:
                await self._publish(link, waiting)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self.news.wait()

    async def _publish(self, link: Link, waiting: list[tuple[int, Reply]]) -> None:
        if any(self._breaks[id_] for id_, _ in waiting):
            waiting = waiting[:1]  # one of them may be what breaks the connection
        first = waiting[0][0]
        if self._breaks[first] >= BREAKS:
            await self._settle([], {first: "the connection breaks over it"})
            return
        self._breaks.update(id_ for id_, _ in waiting)  # until it is known what became of them
        # they go out in order, without waiting for each other
        sent = await asyncio.gather(
            *(link.publish(reply.topic, reply.payload, reply.correlation) for _, reply in waiting),
            return_exceptions=True,
        )
        results = {id_: result for (id_, _), result in zip(waiting, sent, strict=True)}
        refused = {id_: str(result) for id_, result in results.items() if isinstance(result, Refused)}
        await self._settle([id_ for id_, result in results.items() if result is None], refused)
        for result in sent:
            if isinstance(result, BaseException) and not isinstance(result, Refused):
                raise result

    async def _settle(self, published: list[int], refused: dict[int, str]) -> None:
        """Store what became of replies."""

        def change(tables: Tables) -> None:
            self.jobs.published(tables, published)
            for id_, reason in refused.items():
                self.jobs.refuse(tables, id_, reason)

        await self._surely(change)
        for id_ in (*published, *refused):
            del self._breaks[id_]
        for id_, reason in refused.items():
            log.error("the broker refuses a reply", extra={"problem": reason, "reply": id_})
