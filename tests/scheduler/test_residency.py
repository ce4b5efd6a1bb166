"""Idle sessions leave the device for storage and come back."""

import asyncio
import threading

import pytest

from longstride.errors import Busy
from longstride.scheduler.residency import Residency
from tests.scheduler.test_session import SETTINGS, TEXT, opened


async def test_idle_sessions_make_room_and_answer_the_same_when_they_come_back(tmp_path):
    names = ["a", "b", "c"]
    answers = {}
    (tmp_path / "free").mkdir()
    (tmp_path / "bound").mkdir()
    async with opened(tmp_path / "free") as assistant:
        for name in names:
            session = await assistant.session(name)
            await session.feed(TEXT + name)
            answers[name] = (await session.answer("What of thing3?")).text
        most = session.snapshot.bytes_for(512 + 48)
    async with opened(tmp_path / "bound", cache_limit_bytes=2 * most) as assistant:
        for name in names:
            await (await assistant.session(name)).feed(TEXT + name)
        assert (await assistant.session("a")).snapshot.held_bytes == 0  # least recently used
        assert (await assistant.session("c")).snapshot.held_bytes > 0
        for name in names:
            session = await assistant.session(name)
            before = session.sequence.computed
            answer = await session.answer("What of thing3?", policy="never")
            # restored, not computed again: only the open block, the question and the answer
            spent = SETTINGS["block_tokens"] + answer.usage.generated + len("\n\nWhat of thing3?") + 1
            assert session.sequence.computed - before < spent
            assert (await session.answer("What of thing3?")).text == answers[name]
            assert assistant.core.residency.held_bytes <= 2 * most


async def test_sessions_at_work_are_not_suspended_and_one_too_many_hears_busy(tmp_path):
    async with opened(tmp_path, cache_limit_bytes=0) as assistant:
        one, two = await assistant.session("one"), await assistant.session("two")
        await one.feed(TEXT)  # alone it may pass the limit
        pieces = one.ask("What of thing3?")
        await anext(pieces)
        with pytest.raises(Busy, match="cache_limit_bytes"):
            await two.feed(TEXT)
        assert two.tokens == 0
        await pieces.aclose()
        await two.feed(TEXT)
        assert one.snapshot.held_bytes == 0


async def test_a_removed_session_is_forgotten(tmp_path):
    async with opened(tmp_path) as assistant:
        await (await assistant.session("one")).feed(TEXT)
        held = assistant.core.residency.held_bytes
        await assistant.remove_session("one")
        assert held > 0
        assert assistant.core.residency.held_bytes == 0


async def test_least_recently_used_goes_first():
    class Fake:
        def __init__(self, size):
            self.held_bytes = self.size = size

        def bytes_for(self, rows):
            return rows

        def suspend(self):
            self.held_bytes = 0

    residency = Residency(30)
    old, new, third = Fake(10), Fake(10), Fake(10)
    for resident in (old, new, third):
        residency.admit(resident)
    async with residency.working(old, 15):
        assert [r.held_bytes for r in (old, new, third)] == [10, 0, 10]
    assert residency.held_bytes == 20


async def test_a_cancelled_way_back_is_gone_again_whole(tmp_path, monkeypatch):
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        await session.feed(TEXT)
        expected = (await session.answer("What of thing3?")).text
        session.snapshot.suspend()
        real = assistant.blocks.get
        loop, started, release = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

        def slow(*given):
            loop.call_soon_threadsafe(started.set)
            release.wait(30)
            return real(*given)

        monkeypatch.setattr(assistant.blocks, "get", slow)
        task = asyncio.create_task(session.answer("What of thing3?"))
        await started.wait()
        task.cancel()
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert session.snapshot.held_bytes == 0
        monkeypatch.undo()
        before = session.sequence.computed
        assert (await session.answer("What of thing3?", policy="never")).text
        assert session.sequence.computed - before < 64  # it came back from storage
        assert (await session.answer("What of thing3?")).text == expected
