"""`Residency`: whose KV stays on the device. Idle sessions make room for those at work and come back from storage."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Protocol
from weakref import WeakKeyDictionary

from longstride.errors import Busy


class Resident(Protocol):
    """A session's `Snapshot`, as far as it matters here."""

    @property
    def held_bytes(self) -> int:
        """Bytes of KV that it holds on the device now."""

    def bytes_for(self, rows: int) -> int:
        """Bytes that it may hold with `rows` rows."""

    def suspend(self) -> None:
        """Let go of its KV; only called while it is idle."""


class Residency:
    """Keeps all sessions' KV within `limit_bytes`: the least recently used idle ones go first. On the event loop.

    A session alone may pass the limit, so that one setting cannot lock a database up.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._idle: WeakKeyDictionary[Resident, None] = WeakKeyDictionary()  # least recently used first
        self._working: dict[Resident, int] = {}

    @property
    def held_bytes(self) -> int:
        """What idle sessions hold and those at work may come to hold."""
        return sum(self._working.values()) + sum(session.held_bytes for session in self._idle)

    def admit(self, session: Resident) -> None:
        """A session that was just opened, and is idle."""
        self._idle[session] = None
        self._make_room()

    def forget(self, session: Resident) -> None:
        """A session that was removed; its memory goes with the object."""
        self._idle.pop(session, None)

    @asynccontextmanager
    async def working(self, session: Resident, rows: int) -> AsyncGenerator[None, None]:
        """`session` at work, with its KV on the device and room for `rows` rows in all.

        Raises `Busy` when those at work already need the memory.
        """
        needed = session.bytes_for(rows)
        taken = sum(self._working.values())
        if self._working and taken + needed > self.limit_bytes:
            raise Busy(
                f"{len(self._working)} sessions at work take {taken >> 20} of {self.limit_bytes >> 20} MiB for their "
                f"KV and this one needs {needed >> 20} MiB; try again later, or raise cache_limit_bytes"
            )
        self._idle.pop(session, None)
        self._working[session] = needed
        try:
            self._make_room()
            yield
        finally:
            del self._working[session]
            self._idle[session] = None

    def _make_room(self) -> None:
        for session in list(self._idle):
            if self.held_bytes <= self.limit_bytes:
                return
            session.suspend()
