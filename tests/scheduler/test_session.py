"""Sessions on a tiny random model: reading, answering, counters, resuming, windows, cancellation."""

import asyncio
import sqlite3

import pytest

from longstride import Assistant
from longstride.engine.context import Placement
from longstride.errors import BadInput, ContextFull, StorageError
from tests.tiny import tiny_assistant_model

TEXT = "".join(f"Sentence number {i} speaks of thing{i} and of nothing else. " for i in range(40))
SETTINGS = {
    "system": "s", "passage_tokens": 24, "passages": 2, "refresh": 8, "stride": 4, "max_tokens": 12, "block_tokens": 16,
    "budget_tokens": 64, "context_tokens": 512, "window": "sinks",
}  # fmt: skip


def opened(path, **changes):
    return Assistant.open(path / "t.db", model=tiny_assistant_model(), **{**SETTINGS, **changes})


@pytest.mark.parametrize("placement", list(Placement))
async def test_a_resumed_session_answers_as_an_unbroken_one(tmp_path, placement):
    async with opened(tmp_path, placement=placement) as assistant:
        session = await assistant.session("s")
        await session.feed(TEXT)
        unbroken = await session.answer("What of thing3?")
        context = list(session.sequence.context.text)
    async with opened(tmp_path, placement=placement) as assistant:
        session = await assistant.session("s")
        assert session.sequence.context.text == context
        assert session.resumed.problems == ()
        # all but the open block
        assert session.resumed.restored == len(context) // 16 * 16
        again = await session.answer("What of thing3?")
        assert again.text == unbroken.text
        assert [s.passage for s in again.sources] == [s.passage for s in unbroken.sources]
        assert again.usage.generated == unbroken.usage.generated == 12


@pytest.mark.parametrize("placement", list(Placement))
async def test_a_rewrite_computes_the_tail_and_the_segment_and_never_the_stream(tmp_path, placement):
    async with opened(tmp_path, placement=placement, context_tokens=1024) as assistant:
        await assistant.add_document("facts", TEXT)
        session = await assistant.session("s")
        await session.feed("A short stream that stays in view. " * 8)
        for _ in range(2):  # the second time every passage was seen before
            answer = await session.answer("thing1 thing2 thing3?", policy="tokens", stride=4, max_tokens=12)
        usage = answer.usage
        assert usage.retrievals == 3
        passages = SETTINGS["passages"] * SETTINGS["passage_tokens"]
        if placement is Placement.BESIDE:
            assert usage.rewritten == usage.rewrites * (4 + 8)  # stride + refresh, passages for nothing
        elif placement is Placement.END:
            marks = session.marks.size
            assert usage.rewritten <= usage.rewrites * (4 + 8 + passages + marks)
        else:
            tail = len("\n\nthing1 thing2 thing3?") + 1 + 12
            assert usage.rewritten <= usage.rewrites * (tail + passages + session.marks.size)
        assert usage.cached >= session.tokens - 8


async def test_counters_add_up_to_the_context(tmp_path):
    async with opened(tmp_path) as assistant:
        await assistant.add_document("facts", TEXT)
        session = await assistant.session("s")
        await session.feed("thing5 " * 20)
        rows, pieces = [], []
        async for piece in session.ask("What of thing5?", stride=100):
            rows.append(session.sequence.context.rows)
            pieces.append(piece)
        usage = pieces[-1].answer.usage
        assert usage.rewrites == 0
        # the last piece comes after the segment was cut off, so the one before it saw the whole context
        assert usage.cached + usage.encoded + usage.generated == max(rows)
        assert session.sequence.context.rows == len(session.frame.prompt) + session.tokens


async def test_an_unchanged_retrieval_rewrites_nothing(tmp_path):
    async with opened(tmp_path) as assistant:
        await assistant.add_document("facts", "Only thing7 is here.")
        session = await assistant.session("s")
        await session.feed("Some text to begin with.")
        answer = await session.answer("thing7?", stride=2, query_tokens=200)
        assert answer.usage.retrievals == 6
        assert answer.usage.rewrites == 0
        assert [(s.document, s.start, s.stop) for s in answer.sources] == [("facts", 0, 20)]
        assert answer.sources[0].answer == (0, len(answer.text))


async def test_what_left_the_window_is_retrieved_and_what_is_visible_is_not(tmp_path):
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        report = await session.feed(TEXT)
        assert report.slides > 0
        assert len(session.sequence.context.text) < 512
        early = await session.answer("thing2 thing2", max_tokens=2)
        assert early.sources
        assert all(s.stop <= session.window_start for s in early.sources)
        for source in early.sources:
            assert source.text == TEXT[source.start : source.stop]
        late = await session.answer("thing39", max_tokens=2)
        assert all(s.stop <= session.window_start for s in late.sources)


async def test_a_full_context_is_refused_before_anything_is_read(tmp_path):
    async with opened(tmp_path, window="refuse") as assistant:
        session = await assistant.session("s")
        await session.feed("Hello. ")
        with pytest.raises(ContextFull, match="--window sinks"):
            await session.feed(TEXT)
        assert session.tokens == len("Hello. ")
        assert (await session.answer("Well?")).usage.generated > 0
        with pytest.raises(ContextFull, match="question"):
            await session.answer("long " * 200)
        assert (await session.answer("Well?")).usage.generated > 0


async def test_sessions_side_by_side_answer_as_alone(tmp_path):
    async with opened(tmp_path) as assistant:
        sessions = [await assistant.session(f"s{i}") for i in range(4)]
        for i, session in enumerate(sessions):
            await session.feed(f"The stream of session {i}. " * (i + 1))
        alone = [(await session.answer("What is it?")).text for session in sessions]
        together = await asyncio.gather(*(session.answer("What is it?") for session in sessions))
        assert [answer.text for answer in together] == alone


async def test_a_remembered_turn_is_part_of_the_stream(tmp_path):
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        await session.feed("To begin with. ")
        tokens = session.tokens
        answer = await session.answer("First?", remember=True, max_tokens=5)
        assert session.tokens == tokens + len("\n\nFirst?") + 1 + answer.usage.generated + 1
        text = list(session.sequence.context.text)
        second = await session.answer("Second?")
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        assert session.sequence.context.text == text
        assert (await session.answer("Second?")).text == second.text


async def test_notes_are_written_on_the_way(tmp_path):
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        report = await session.feed(TEXT[:600], notes_every=200)
        assert [note.tokens for note in report.notes] == [200, 400, 600]
        stored = assistant.sessions.answers(session.id, "note")
        assert [note["text"] for note in stored] == [note.answer.text for note in report.notes]


async def test_an_unsound_block_is_reported_replaced_and_never_used(tmp_path):
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        await session.feed(TEXT[:300])
        whole = await session.answer("What of it?")
    db = sqlite3.connect(tmp_path / "t.db")
    ((id_, data),) = db.execute("select id, data from blocks order by rowid limit 1 offset 4").fetchall()
    db.execute("update blocks set data = ? where id = ?", [bytes([data[0] ^ 1]) + data[1:], id_])
    db.commit()
    db.close()
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        assert session.resumed.restored == 4 * 16
        assert "checksum" in session.resumed.problems[0]
        assert (await session.answer("What of it?")).text == whole.text
        await session.feed("More to read, so that blocks are saved again. " * 2)
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        assert session.resumed.problems == ()
        assert session.resumed.restored == session.resumed.tokens // 16 * 16


async def test_a_full_disk_stops_reading_and_harms_nothing(tmp_path):
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        await session.feed(TEXT[:300])
        whole = await session.answer("What of it?")

        def fill(tables):
            pages = tables.conn.execute("pragma page_count").fetchone()[0]
            tables.conn.execute(f"pragma max_page_count = {pages}")

        assistant.database.write(fill)
        with pytest.raises(StorageError, match="full"):
            await session.feed(TEXT)
        with pytest.raises(StorageError, match="opened again"):
            await session.answer("What of it?")
        assistant.database.write(lambda tables: tables.conn.execute("pragma max_page_count = 1000000") and None)
        session = await assistant.session("s")
        assert session.tokens == 300
        assert (await session.answer("What of it?")).text == whole.text


async def test_wrong_names_and_settings_are_refused_in_words(tmp_path):
    async with opened(tmp_path) as assistant:
        with pytest.raises(BadInput, match="there are none yet"):
            await assistant.session("nobody", create=False)
        await assistant.session("somebody")
        with pytest.raises(BadInput, match="somebody"):
            await assistant.session("nobody", create=False)
        with pytest.raises(BadInput, match="passage"):
            await assistant.session("p", passage_tokens=600)
        with pytest.raises(BadInput, match="stride"):
            await assistant.session("p", stride=0)
        with pytest.raises(BadInput, match="recent_tokens 0"):
            await assistant.session("p", window="cascade", recent_tokens=0)
        with pytest.raises(BadInput, match="name"):
            await assistant.session("")
        session = await assistant.session("somebody")
        with pytest.raises(BadInput, match="stride"):
            await session.answer("Well?", stride=0)
        with pytest.raises(BadInput, match="placement"):
            await session.answer("Well?", placement="end")
        with pytest.raises(BadInput, match="empty"):
            await session.answer("  ")
        assert assistant.sessions.find("p") is None


async def test_the_event_loop_stays_free_while_the_device_works(tmp_path):
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        runner = assistant.model.runner
        real = runner.forward
        inside = []

        def slow(slices):
            import time

            time.sleep(0.05)
            inside.append(len(slices))
            return real(slices)

        runner.forward = slow
        try:
            task = asyncio.create_task(session.feed(TEXT[:300]))
            ticks = 0
            while not task.done():
                await asyncio.sleep(0.005)
                ticks += 1
        finally:
            del runner.forward
        assert len(inside) >= 5
        assert ticks > len(inside)  # the loop turned several times within each forward


async def test_one_sessions_error_on_the_device_is_its_own(tmp_path):
    async with opened(tmp_path) as assistant:
        good, bad = await assistant.session("good"), await assistant.session("bad")
        await good.feed("Some text. ")
        alone = await good.answer("What?")
        with pytest.raises(BadInput, match="token ids"):
            await bad.feed_ids([5000])
        bad.stream.append(5000)
        bad.sequence.context.append([5000])  # past the check, as a bug would
        answers = await asyncio.gather(good.answer("What?"), bad.answer("What?"), return_exceptions=True)
        assert answers[0].text == alone.text
        assert isinstance(answers[1], IndexError)


async def test_a_full_remembered_session_opens_again(tmp_path):
    async with opened(tmp_path, window="refuse") as assistant:
        session = await assistant.session("s")
        room = session.sequence.context.room - session.headroom
        await session.feed("x" * room)
        await session.answer("And?", remember=True, max_tokens=4)
        text = list(session.sequence.context.text)
    async with opened(tmp_path, window="refuse") as assistant:
        session = await assistant.session("s")
        assert session.sequence.context.text == text


async def test_a_short_context_slides_in_smaller_chunks(tmp_path):
    async with opened(tmp_path, context_tokens=128, passage_tokens=16, budget_tokens=512, max_tokens=8) as assistant:
        session = await assistant.session("s")
        report = await session.feed(TEXT)
        assert session.tokens == len(TEXT)
        assert report.slides > 2
        assert (await session.answer("What?")).usage.generated > 0


async def test_spans_are_right_in_text_of_many_bytes_a_character(tmp_path):
    text = "".join(f"Größe {i}: 日本語のテキスト€ und Wörter ohne Ende " for i in range(30))
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        await session.feed(text)
        spans = session.memory.index.spans
        assert len(spans) > 20
        for a, b, first, last in spans:
            assert bytes(session.stream[a:b].tolist()).decode() == text[first:last]


async def test_searching_from_many_tasks_indexes_documents_once(tmp_path):
    async with opened(tmp_path) as assistant:
        for i in range(30):
            await assistant.add_document(f"d{i}", f"Document {i} tells of topic{i}.")
        found = await asyncio.gather(*(assistant.search(f"topic{i}", 3) for i in range(12)))
        assert [hits[0].document for hits in found] == [f"d{i}" for i in range(12)]
        assert len(assistant.retriever.documents.ids) == assistant.documents.count() == 60


async def test_of_a_file_that_has_changed_the_new_version_is_found(tmp_path):
    async with opened(tmp_path) as assistant:

        async def add(text, path):
            return await assistant.add_document(path, text, path)

        await add("An anchor of iron.", "/a")
        assert await add("An anchor of gold.", "/a") == 1
        assert [p.text for p in await assistant.search("anchor")] == ["An anchor of gold."]
        await add("An anchor of lead.", "/b")
        assert await add("An anchor of gold.", "/b") is None  # the same text is there, and it is no lead any more
        assert [p.text for p in await assistant.search("anchor")] == ["An anchor of gold."]
        # as a log is rotated: what was in /a is in /b now, and /a has another text
        assert await add("An anchor of salt.", "/a") == 1
        assert {p.text for p in await assistant.search("anchor")} == {"An anchor of gold.", "An anchor of salt."}
        assert {d.path: d.name for d in assistant.documents.all()} == {"/a": "/a", "/b": "/b"}
        # what is known costs no write, unless the file could not be read meanwhile
        writes = assistant.database.read(lambda tables: tables.conn.execute("pragma data_version").fetchone())
        assert await add("An anchor of salt.", "/a") is None
        assert assistant.database.read(lambda t: t.conn.execute("pragma data_version").fetchone()) == writes
        await assistant.database.awrite(lambda tables: assistant.documents.fail(tables, "/a", "is locked"))
        assert await add("An anchor of salt.", "/a") is None
        assert assistant.documents.failures() == []
        assert assistant.documents.verify() == []
