"""Sessions that are left, stopped, removed or changed by others while something of theirs is under way."""

import asyncio
import threading

import pytest

from longstride.errors import StorageError
from longstride.scheduler.device import finished
from tests.scheduler.test_session import TEXT, opened


async def test_closing_the_iterator_leaves_the_session_as_it_was(tmp_path):
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        await session.feed(TEXT[:200])
        whole = await session.answer("What now?")
        before = (list(session.sequence.context.text), session.tokens)
        pieces = session.ask("What now?")
        async for _ in pieces:
            break
        await pieces.aclose()
        assert (list(session.sequence.context.text), session.tokens) == before
        assert (await session.answer("What now?")).text == whole.text


async def test_cancelling_a_task_stops_within_a_step(tmp_path):
    async with opened(tmp_path, max_tokens=200) as assistant:
        session = await assistant.session("s")
        await session.feed(TEXT[:100])
        started = asyncio.Event()

        async def ask():
            async for _ in session.ask("Go on and on", max_tokens=200, policy="never"):
                started.set()

        task = asyncio.create_task(ask())
        await asyncio.wait_for(started.wait(), 30)
        forwards = assistant.model.runner.forwards
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert assistant.model.runner.forwards <= forwards + 2
        assert (await session.answer("And now?", max_tokens=3)).usage.generated > 0


async def test_a_cancelled_feed_keeps_whole_chunks_only(tmp_path):
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        seen = asyncio.Event()
        task = asyncio.create_task(session.feed(TEXT, progress=lambda _n: seen.set()))
        await asyncio.wait_for(seen.wait(), 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        held = session.tokens
        session = await assistant.session("s")
        stored = assistant.sessions.get("s")
        assert stored.tokens == session.tokens >= held - 64
        await session.feed("And on.")
        assert assistant.sessions.get("s").tokens == session.tokens


async def test_a_cancelled_save_finishes_so_that_memory_and_database_agree(tmp_path, monkeypatch):
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        release, saving = threading.Event(), asyncio.Event()
        assistant.database.submit(lambda _tables: release.wait(30))  # the writer is busy
        write = assistant.database.awrite

        async def announced(change):
            saving.set()
            return await write(change)

        monkeypatch.setattr(assistant.database, "awrite", announced)
        task = asyncio.create_task(session.feed(TEXT[:64]))
        await saving.wait()
        task.cancel()
        await asyncio.sleep(0.05)
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert assistant.sessions.get("s").tokens == session.tokens == 64
        await session.feed("And on.")
        assert assistant.sessions.get("s").tokens == session.tokens


async def test_what_must_end_ends_however_often_it_is_cancelled():
    ready, ends = asyncio.Event(), []

    async def work():
        await ready.wait()
        ends.append(True)

    task = asyncio.create_task(finished(work()))
    for _ in range(3):
        await asyncio.sleep(0.01)
        task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    ready.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ends == [True]


async def test_what_still_runs_for_a_removed_session_never_reaches_a_new_one(tmp_path):
    async with opened(tmp_path) as assistant:
        alice = await assistant.session("alice")
        await alice.feed("Alice's secret. " * 10)
        pieces = alice.ask("Tell it!", max_tokens=12)
        await anext(pieces)
        await assistant.remove_session("alice")
        bob = await assistant.session("bob")
        with pytest.raises(StorageError, match="removed"):
            async for _ in pieces:
                pass
        with pytest.raises(StorageError, match="removed"):
            await alice.feed("More secrets.")
        assert bob.tokens == 0
        assert assistant.sessions.answers(bob.id) == []
        assert assistant.blocks.usage() == (0, 0)
    assert b"secret" not in (tmp_path / "t.db").read_bytes()


@pytest.mark.parametrize("how", ["fed", "removed"])
async def test_a_session_that_another_process_changed_is_opened_anew(tmp_path, how):
    async with opened(tmp_path) as assistant, opened(tmp_path) as other:
        session = await assistant.session("s")
        await session.feed(TEXT)
        if how == "fed":
            await (await other.session("s")).feed("And more. " * 4)
        else:
            await other.remove_session("s")
        with pytest.raises(StorageError):
            await session.answer("What?")
        again = await assistant.session("s")
        assert again is not session
        assert again.tokens == (session.tokens + 40 if how == "fed" else 0)
        if how == "fed":
            assert (await again.answer("What?")).text


async def test_leaving_during_a_search_waits_for_nothing_and_breaks_nothing(tmp_path, monkeypatch):
    """A search that was cancelled goes on in its thread; its database is closed under it."""
    searching, over = threading.Event(), threading.Event()
    async with opened(tmp_path) as assistant:
        await assistant.add_document("d", TEXT)
        documents = assistant.retriever.documents

        def slow(tables):
            searching.set()
            return tables.conn.execute(
                "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n"
            ).fetchone()

        def refresh(_collections=None):
            try:
                assistant.database.read(slow)
            finally:
                over.set()

        monkeypatch.setattr(documents, "refresh", refresh)
        search = asyncio.create_task(assistant.search("thing1"))
        await asyncio.to_thread(searching.wait)
        search.cancel()
        with pytest.raises(asyncio.CancelledError):
            await search
    assert over.wait(60)


async def test_opening_a_session_does_not_hold_up_another(tmp_path, monkeypatch):
    async with opened(tmp_path) as assistant:
        held = await assistant.session("held")
        free, resume = asyncio.Event(), assistant._create

        async def create(name, settings):
            await free.wait()
            return await resume(name, settings)

        monkeypatch.setattr(assistant, "_create", create)
        opening = asyncio.create_task(assistant.session("long"))
        await asyncio.sleep(0)
        assert await assistant.session("held") is held
        assert not opening.done()
        free.set()
        assert (await opening).name == "long"


async def test_what_was_read_is_stored_also_where_whoever_hears_of_it_fails(tmp_path):
    """A chunk is computed while the one before is stored: what memory holds afterwards is what the database holds."""
    async with opened(tmp_path, budget_tokens=16) as assistant:
        session = await assistant.session("s")

        def fail(_tokens):
            raise RuntimeError("nobody listens")

        with pytest.raises(RuntimeError, match="nobody listens"):
            await session.feed_ids(list(range(100)), progress=fail)
        assert 16 <= session.tokens < 100
        read = session.tokens
        assert assistant.sessions.get("s").tokens == read
        await session.feed_ids(list(range(read, 100)))
        assert list(session.stream) == list(range(100))
        assert session.healthy


async def test_no_chunk_is_stored_behind_one_that_could_not_be(tmp_path, monkeypatch):
    async with opened(tmp_path, budget_tokens=16) as assistant:
        session, told = await assistant.session("s"), []
        append, calls = assistant.sessions.append, iter(range(100))

        def full(*arguments):
            if next(calls) == 2:
                raise StorageError("the disk is full")
            append(*arguments)

        monkeypatch.setattr(assistant.sessions, "append", full)
        with pytest.raises(StorageError, match="the disk is full"):
            await session.feed_ids(list(range(100)), progress=told.append)
        assert told == [16, 16]
        assert assistant.sessions.get("s").tokens == 32
        assert not session.healthy
        again = await assistant.session("s")
        assert list(again.stream) == list(range(32))
