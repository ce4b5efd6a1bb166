"""`Storing`: a chunk that was read, on its way to the database while the device is at the next one."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from longstride.scheduler.answer import ReadReport
from longstride.scheduler.device import ended, finished

log = logging.getLogger("longstride")


class Storing:
    """`save` stores it, `size` tokens, and returns how many blocks it stored; it awaits what it is given once it needs
    nothing of the session or the device any more, and comes to the database after those `before` it.

    Whoever makes one waits for `copied` before the session goes on, and for `ended` or `left` before it is left.
    """

    def __init__(
        self,
        save: Callable[[Callable[[], Awaitable[None]]], Coroutine[Any, Any, int]],
        size: int,
        before: Sequence["Storing"] = (),
    ) -> None:
        self.copied = asyncio.Event()
        self._size = size
        self._before = [storing.task for storing in before]
        self.task: asyncio.Task[int] = asyncio.create_task(save(self._next))
        self.task.add_done_callback(lambda _task: self.copied.set())  # it may have failed before

    async def _next(self) -> None:
        self.copied.set()
        for task in self._before:
            await ended(task)

    async def ended(self, report: ReadReport, progress: Callable[[int], None] | None) -> None:
        """Wait until it is stored; then it is told of. Raises what went wrong."""
        report.blocks += await finished(self.task)
        if progress is not None:
            progress(self._size)

    async def left(self) -> None:
        """Wait until it is stored, after something else has gone wrong."""
        await ended(self.task)
        if not self.task.cancelled() and self.task.exception() is not None:
            log.warning("a session that was left could not be saved: %s", self.task.exception())


async def all_ended(
    storing: list[Storing], report: ReadReport, progress: Callable[[int], None] | None, *, but: int = 0
) -> None:
    """Wait for the chunks of a list, but for so many of the last, and take them off it."""
    while len(storing) > but:
        await storing.pop(0).ended(report, progress)
