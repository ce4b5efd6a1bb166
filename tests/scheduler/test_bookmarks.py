"""Bookmarks: what was read of a text is not read again, wherever the reading was broken off and however it grew."""

import asyncio
import contextlib
import sqlite3

import pytest

from longstride.errors import LongstrideError, StorageError
from longstride.storage.database import Database
from longstride.storage.verify import verify
from tests.scheduler.test_session import TEXT, opened


class Killed(Exception):
    pass


async def read(path, text, *, chunks=None, name="book.txt", again=False):
    """(ids of the stream, whether it was known, whether it had changed) after reading in a process of its own, which
    ends after so many chunks."""
    async with opened(path) as assistant:
        session = await assistant.session("s")
        left = await session.unread(text, name, again=again)
        seen = []

        def progress(tokens):
            seen.append(tokens)
            if len(seen) == chunks:
                raise Killed

        with contextlib.suppress(Killed):
            await session.feed_ids(left.ids, also=left.also, progress=progress)
        return list(session.stream), left.known, left.changed


async def encoded(path, text):
    async with opened(path) as assistant:
        return assistant.model.tokenizer.encode(text)


async def test_a_reading_that_was_broken_off_goes_on(tmp_path):
    ids = await encoded(tmp_path, TEXT)
    sizes = []
    for chunks in (1, 3, 2, 1, None):
        stream, known, changed = await read(tmp_path, TEXT, chunks=chunks)
        assert stream == ids[: len(stream)]
        assert (known, changed) == (bool(sizes), False)
        sizes.append(len(stream))
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == len(ids)
    assert await read(tmp_path, TEXT) == (ids, True, False)  # nothing is left
    assert (await read(tmp_path, TEXT, again=True))[0] == ids + ids
    assert (await read(tmp_path, TEXT, name="another.txt"))[0] == ids * 3


@pytest.mark.parametrize("chunks", [2, None])
async def test_a_text_that_has_grown_is_read_on(tmp_path, chunks):
    before, _, _ = await read(tmp_path, TEXT, chunks=chunks)
    grown = TEXT + "And that was not all. "
    stream, known, changed = await read(tmp_path, grown)
    assert stream[: len(before)] == before
    assert (known, changed) == (True, False)
    assert stream == await encoded(tmp_path, grown)  # the tokenizer's tokens are bytes, so it may be cut anywhere


@pytest.mark.parametrize("chunks", [2, None])
@pytest.mark.parametrize("text", [f"x{TEXT}", TEXT[:100], TEXT.replace("number 1 ", "number I ")])
async def test_a_text_that_has_changed_is_read_from_its_beginning(tmp_path, chunks, text):
    before, _, _ = await read(tmp_path, TEXT, chunks=chunks)
    stream, known, changed = await read(tmp_path, text)
    assert stream == before + await encoded(tmp_path, text)
    assert (known, changed) == (False, True)
    assert await read(tmp_path, text) == (stream, True, False)


async def test_feed_takes_a_bookmark_beside_another_change(tmp_path):
    told = []
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        for _ in range(2):
            report = await session.feed(TEXT, bookmark="t", also=lambda _tables, read: told.append(read))
        assert report.tokens == 0
        assert told[-1] == session.tokens == len(assistant.model.tokenizer.encode(TEXT))
        other = await assistant.session("other")
        assert (await other.feed(TEXT, bookmark="t")).tokens == session.tokens


@pytest.mark.parametrize("column", ["session_id", "name", "characters", "tokens", "digest", "checksum"])
async def test_a_damaged_bookmark_is_named_and_goes_with_its_session(tmp_path, column):
    await read(tmp_path, TEXT)
    value = {"name": "'x'", "digest": "x'00'", "checksum": "x'00'"}.get(column, "77")
    connection = sqlite3.connect(tmp_path / "t.db")
    with connection:
        connection.execute(f"update bookmarks set {column} = {value}")  # noqa: S608
    connection.close()
    with Database(tmp_path / "t.db") as database:
        problems = verify(database)
    assert "how far" in problems[-1]
    if column != "session_id":  # it is another session's now, or none's
        with pytest.raises(StorageError, match="--again"):
            await read(tmp_path, TEXT)
    ids = await encoded(tmp_path, TEXT)
    assert (await read(tmp_path, TEXT, again=True))[0] == 2 * ids
    if column != "session_id":
        assert await read(tmp_path, TEXT) == (2 * ids, True, False)  # all is well again
        with Database(tmp_path / "t.db") as database:
            assert verify(database) == []
    async with opened(tmp_path) as assistant:
        await assistant.remove_session("s")
    rows = sqlite3.connect(tmp_path / "t.db").execute("select count(*) from bookmarks").fetchone()
    assert rows == ((1,) if column == "session_id" else (0,))


async def test_one_that_cannot_be_set_leaves_nothing_read(tmp_path):
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        left = await session.unread(TEXT, "t")
        connection = sqlite3.connect(tmp_path / "t.db")
        connection.execute("drop table bookmarks")
        connection.close()
        with pytest.raises(LongstrideError):
            await session.feed_ids(left.ids, also=left.also)
        assert (await asyncio.to_thread(assistant.sessions.get, "s")).tokens == 0


async def test_two_readers_of_one_text_do_not_read_it_twice(tmp_path):
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        reading = [session.feed(TEXT, bookmark="t") for _ in range(2)]
        (refused,) = [r for r in await asyncio.gather(*reading, return_exceptions=True) if isinstance(r, Exception)]
        assert isinstance(refused, StorageError)
        assert "by another reader" in str(refused)
        again = await assistant.session("s")
        assert again.tokens == len(assistant.model.tokenizer.encode(TEXT))
        assert (await again.feed(TEXT, bookmark="t")).tokens == 0


async def test_a_note_that_was_left_out_is_written_when_the_reading_goes_on(tmp_path):
    """The chunk is stored before the note on it is."""

    def broken(_tokens):
        raise Killed

    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        with pytest.raises(Killed):
            await session.feed(TEXT[:200], bookmark="t", notes_every=64, progress=broken)
        assert session.tokens == 64
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        report = await session.feed(TEXT[:200], bookmark="t", notes_every=64)
        assert [note.tokens for note in report.notes] == [64, 128, 192]
        kinds = [answer["tokens"] for answer in assistant.sessions.answers(session.id, "note")]
        assert kinds == [64, 128, 192]
