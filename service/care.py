"""`Care`: how the worker is, said in a file and in gauges; and forgetting what was done long ago."""

import asyncio
import contextlib
import datetime as dt
import json
import logging
import os
import time
from collections.abc import Callable

from longstride.errors import StorageError
from longstride.service.metrics import Metrics
from longstride.service.settings import WorkerSettings
from longstride.storage.jobs import Jobs

log = logging.getLogger("longstride.worker")
EVERY_S = 5.0
FORGET_S = 3600.0


class Care:
    """Looks every few seconds; `condition` says how the worker is."""

    def __init__(
        self, jobs: Jobs, settings: WorkerSettings, metrics: Metrics, condition: Callable[[], dict[str, object]]
    ) -> None:
        self.jobs = jobs
        self.settings = settings
        self.metrics = metrics
        self._condition = condition
        self._forgot = -FORGET_S

    async def loop(self) -> None:
        """Go on until cancelled; a database that cannot be read or written now is no reason to stop."""
        while True:
            await asyncio.to_thread(self.write, "online")
            with contextlib.suppress(StorageError):
                self.metrics.oldest.set(await asyncio.to_thread(self.jobs.oldest_s))
                self.metrics.dead.set(await asyncio.to_thread(self.jobs.dead_count))
                outgoing, refused = await asyncio.to_thread(self.jobs.outbox_counts)
                self.metrics.outgoing.set(outgoing)
                self.metrics.refused.set(refused)
                await self._forget()
            await asyncio.sleep(EVERY_S)

    async def _forget(self) -> None:
        if time.monotonic() - self._forgot < FORGET_S:
            return
        before = dt.datetime.now(dt.UTC) - dt.timedelta(days=self.settings.keep_days)
        await self.jobs.database.awrite(lambda tables: self.jobs.forget(tables, before.isoformat(timespec="seconds")))
        self._forgot = time.monotonic()

    def write(self, state: str) -> None:
        """Write the health file, if there is to be one."""
        path = self.settings.health_file
        if path is None:
            return
        at = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        fresh = path.with_name(path.name + ".new")
        try:
            fresh.write_text(json.dumps({"state": state, "pid": os.getpid(), "at": at, **self._condition()}) + "\n")
            fresh.replace(path)
        except OSError as error:
            log.error("cannot write the health file", extra={"problem": str(error)})  # noqa: TRY400
