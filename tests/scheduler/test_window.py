"""What a session sees depends on its stream alone: not on how the text came, nor on restarts between."""

import pytest

from longstride.engine.window import Window
from longstride.errors import BadInput, StorageError
from tests.scheduler.test_session import TEXT, opened


async def window_and_answer(assistant) -> tuple[int, list[int], str]:
    session = await assistant.session("s")
    answer = await session.answer("What of thing3?")
    return session.window_start, list(session.sequence.context.text), answer.text


@pytest.fixture(params=["sinks", "separators", "cascade", "anchors", "anchors alone", "anchors-added", "rollup"])
def policy(request):
    window, _, alone = request.param.partition(" ")
    return {"window": window, "recent_tokens": 0 if alone else 40, "span_tokens": 12}


async def unbroken(tmp_path, policy) -> tuple[int, list[int], str]:
    folder = tmp_path / "unbroken"
    folder.mkdir()
    async with opened(folder, **policy) as assistant:
        await (await assistant.session("s")).feed(TEXT)
        return await window_and_answer(assistant)


@pytest.mark.parametrize("size", [7, 500])
async def test_the_window_slides_where_it_is_full_however_the_text_comes(tmp_path, policy, size):
    expected = await unbroken(tmp_path, policy)
    assert expected[0] > 0
    async with opened(tmp_path, **policy) as assistant:
        session = await assistant.session("s")
        for at in range(0, len(TEXT), size):
            await session.feed(TEXT[at : at + size])
        assert await window_and_answer(assistant) == expected


@pytest.mark.parametrize("placement", ["beside", "end", "turn"])
async def test_a_restart_in_the_middle_changes_nothing(tmp_path, policy, placement):
    policy = {**policy, "placement": placement}
    expected = await unbroken(tmp_path, policy)
    for at in range(0, len(TEXT), 300):
        async with opened(tmp_path, **policy) as assistant:
            session = await assistant.session("s")
            if session.resumed is not None:
                # all but the open block came back, however few rows the window keeps of it
                assert session.resumed.restored == session.resumed.tokens // 16 * 16 > 0
                assert session.resumed.problems == ()
            await session.feed(TEXT[at : at + 300])
    async with opened(tmp_path, **policy) as assistant:
        assert await window_and_answer(assistant) == expected


@pytest.mark.parametrize("bad", [0, 5, -1])
async def test_a_bad_block_is_told_and_computed_again(tmp_path, policy, bad):
    expected = await unbroken(tmp_path, policy)
    async with opened(tmp_path, **policy) as assistant:
        await (await assistant.session("s")).feed(TEXT)

        def damage(tables):
            ids = [row[0] for row in tables.conn.execute("select id from blocks where length(data) > 0 order by rowid")]
            tables.conn.execute("update blocks set data = zeroblob(length(data)) where id = ?", [ids[bad]])

        await assistant.database.awrite(damage)
    async with opened(tmp_path, **policy) as assistant:
        session = await assistant.session("s")
        assert len(session.resumed.problems) == 1
        assert "checksum" in session.resumed.problems[0]
        assert await window_and_answer(assistant) == expected


async def test_idle_sessions_give_their_rows_up_and_come_back(tmp_path, policy):
    expected = await unbroken(tmp_path, policy)
    async with opened(tmp_path, cache_limit_bytes=1, **policy) as assistant:
        session = await assistant.session("s")
        for at in range(0, len(TEXT), 200):
            await session.feed(TEXT[at : at + 200])
            other = await assistant.session("other")
            await other.feed("Something else.")
            assert session.snapshot.held_bytes == 0
        assert await window_and_answer(assistant) == expected


async def test_a_remembered_answer_is_part_of_the_stream_after_a_restart_too(tmp_path, policy):
    async def talk(assistant):
        session = await assistant.session("s")
        await session.answer("What of thing2?", remember=True)
        return session

    texts = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        async with opened(folder, **policy) as assistant:
            session = await assistant.session("s")
            await session.feed(TEXT[:300])
            session = await talk(assistant)
            if folder.name == "a":
                texts.append((await session.answer("And thing1?")).text)
                continue
        async with opened(folder, **policy) as assistant:
            texts.append((await (await assistant.session("s")).answer("And thing1?")).text)
    assert texts[0] == texts[1]


async def test_what_a_policy_dropped_is_retrieved_though_the_window_still_spans_it(tmp_path):
    async with opened(tmp_path, window="anchors", recent_tokens=0, span_tokens=12) as assistant:
        session = await assistant.session("s")
        await session.feed(TEXT[:300])
        assert session.window_start == 0
        assert session.sequence.cache.length < 150
        answer = await session.answer("thing2 thing2", max_tokens=2)
        assert answer.sources
        assert all(s.stop <= session.view.whole_from for s in answer.sources)


async def test_added_anchors_are_in_the_context_and_nowhere_else(tmp_path):
    """They are no text: no stream, no passage, no draft and no count of what was read has them."""
    kept = {"window": "anchors-added", "recent_tokens": 0, "span_tokens": 12, "context_tokens": 1024}
    heard, told = [], []
    async with opened(tmp_path, **kept) as assistant:
        session = await assistant.session("s")
        report = await session.feed(TEXT[:600], progress=heard.append, also=lambda _tables, read: told.append(read))
        context, anchor = session.sequence.context, assistant.model.tokenizer.spare[0]
        assert context.text.count(anchor) >= 600 // 12
        assert report.tokens == sum(heard) == told[-1] == session.tokens == 600
        assert session.stream.tolist() == context.without_added(context.prompt) == list(TEXT[:600].encode())
        answer = await session.answer("thing2 thing2", max_tokens=20, remember=True)
        assert answer.sources
        assert session.sequence.cache.length < 250
        assert anchor in context.text[-24:]  # what was kept of the turn has them too
        with pytest.raises(BadInput, match="stands for anchors"):
            await session.feed_ids([5, anchor])
        text = list(context.text)
    async with opened(tmp_path, **kept) as assistant:
        assert (await assistant.session("s")).sequence.context.text == text


@pytest.mark.parametrize(("first", "then"), [("sinks", "anchors-added"), ("anchors-added", "cascade")])
async def test_a_session_that_changes_its_policy_is_as_one_that_always_had_it(tmp_path, first, then):
    kept = {"recent_tokens": 40, "span_tokens": 12}
    texts = []
    for name, policies in (("changed", [first, then]), ("same", [then])):
        (tmp_path / name).mkdir()
        async with opened(tmp_path / name, **kept) as assistant:
            await (await assistant.session("s", window=policies[0])).feed(TEXT[:200])
            session = await assistant.session("s", window=policies[-1])
            await session.feed(TEXT[200:300])
            texts.append((session.sequence.context.text, (await session.answer("What of thing1?")).text))
    assert texts[0] == texts[1]


async def test_snapshots_hold_what_is_kept_only(tmp_path, policy):
    async with opened(tmp_path, context_tokens=1024, **policy) as assistant:
        session = await assistant.session("s")
        await session.feed(TEXT[:800])
        row = assistant.model.runner.layout.row_bytes
        held = assistant.blocks.usage()[1] / row
        context = session.sequence.context
        size = len(context.text) // 16 * 16
        alive = size if context.window is None else int(context.window.alive(size).sum())
        assert held == alive


async def test_a_window_that_a_question_moved_is_stored_with_the_answer(tmp_path):
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        while session.window_start == 0:  # until just before the window slides by itself
            before = session.window_start
            await session.feed_ids([65], progress=None)
            if session.sequence.context.room <= session.headroom:
                break
        assert session.window_start == before
        await session.answer("x" * (session.question_room + 20))
        moved = session.window_start
        assert moved > 0
    async with opened(tmp_path) as assistant:
        assert (await assistant.session("s")).window_start == moved


async def test_notes_stand_for_what_left_and_roll_on(tmp_path):
    async with opened(tmp_path, window="rollup") as assistant:
        session = await assistant.session("s")
        report = await session.feed(TEXT)
        written = assistant.sessions.answers(session.id, "rollup")
        assert len(written) == report.slides > 1
        context, lead = session.sequence.context, session.view.lead
        decode = assistant.model.tokenizer.decode
        assert decode(lead) == f"[Before: {written[-1]['text'].strip()}]\n\n"[: session.view.most_lead]
        assert context.text[context.prompt :] == [*lead, *session.stream[session.window_start :]]
        before = session.window_start, list(context.text)
    async with opened(tmp_path, window="sinks") as assistant:
        session = await assistant.session("s", window="sinks")  # notes are this policy's alone
        assert decode(session.sequence.context.text[context.prompt :]) == TEXT[before[0] :]
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s", window="rollup")
        assert (session.window_start, session.sequence.context.text) == before


async def test_damaged_notes_are_refused(tmp_path):
    async with opened(tmp_path, window="rollup") as assistant:
        await (await assistant.session("s")).feed(TEXT)
        await assistant.database.awrite(
            lambda tables: tables.conn.execute("update answers set text = 'other' where kind = 'rollup'")
        )
    async with opened(tmp_path) as assistant:
        with pytest.raises(StorageError, match="notes that stand for its beginning"):
            await assistant.session("s")


async def test_turns_that_dropped_rows_before_a_block_was_whole_lose_nothing(tmp_path, policy):
    async with opened(tmp_path, **policy) as assistant:
        session = await assistant.session("s")
        for at in range(0, 360, 60):
            await session.feed(TEXT[at : at + 60])
            await session.answer("What of thing2?", remember=True)
            await session.answer("And thing1?")
            await session.feed("A b. ")
        unbroken = (await session.answer("And thing3?")).text
    async with opened(tmp_path, **policy) as assistant:
        session = await assistant.session("s")
        assert session.resumed.restored > session.resumed.tokens - 32
        assert (await session.answer("And thing3?")).text == unbroken
        await assistant.database.awrite(lambda tables: tables.conn.execute("delete from blocks"))
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s", window="sinks")
        await session.answer("What?")
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s", **policy)
        assert (await session.answer("And thing3?")).text == unbroken
        await session.feed("x")


async def test_a_decoded_token_costs_no_work_that_grows_with_the_context(tmp_path, monkeypatch):
    looked = []
    sight = Window.sight
    monkeypatch.setattr(Window, "sight", lambda self, *given: looked.append(given) or sight(self, *given))
    async with opened(tmp_path, window="anchors", recent_tokens=0, span_tokens=12, context_tokens=1024) as assistant:
        session = await assistant.session("s")
        await session.feed(TEXT[:400])
        await session.answer("What of thing2?", remember=True)
        looked.clear()
        await session.answer("And thing1?")
        assert len(looked) <= 2  # the turn before, as part of the stream
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        looked.clear()
        await session.answer("And thing1?")
        assert len(looked) <= 2  # the open block


async def test_blocks_of_another_policy_make_room(tmp_path, policy):
    async with opened(tmp_path, context_tokens=1024) as assistant:
        await (await assistant.session("s")).feed(TEXT[:640])
        limit = assistant.blocks.usage()[1]
    for _ in range(2):
        async with opened(tmp_path, blocks_limit_bytes=limit) as assistant:
            session = await assistant.session("s", **policy)
            await session.feed("And so on, and on. ")
    assert session.resumed.restored > session.resumed.tokens - 48


async def test_a_chunk_that_failed_is_taken_back_alone(tmp_path, policy, monkeypatch):
    async with opened(tmp_path, context_tokens=1024, **policy) as assistant:
        session = await assistant.session("s")
        await session.feed(TEXT[:640])

        async def fail(*_):
            raise RuntimeError("the forward failed")

        with monkeypatch.context() as patched:
            patched.setattr(assistant.device, "step", fail)
            with pytest.raises(RuntimeError):
                await session.feed(TEXT[640:700])
        assert (await session.feed("y")).encoded == 1


async def test_what_a_turn_left_is_stored_before_the_next_drops_rows_of_it(tmp_path, policy):
    """A remembered turn's rows are computed again by the next turn; nothing is fed behind them."""
    async with opened(tmp_path, context_tokens=1024, **policy) as assistant:
        session = await assistant.session("s")
        await session.feed(TEXT[:300])
        await session.answer("What of thing2?", remember=True)
        unbroken = (await session.answer("And thing1?")).text
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        whole = session.resumed.tokens // 16 * 16
        if session.sequence.context.window is not None:
            assert session.resumed.restored == whole
        assert (await session.answer("And thing1?")).text == unbroken


async def test_a_question_behind_a_text_that_shorter_passages_cut_anew_is_answered(tmp_path, policy):
    """A turn that stores blocks stores no passages: it has no tokens that they could come with."""
    async with opened(tmp_path, **policy) as assistant:
        await (await assistant.session("s")).feed(TEXT[:310])
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s", passage_tokens=12)
        assert (await session.answer("What of thing2?")).text
        await session.feed(TEXT[310:320])
        assert (await session.answer("What of thing2?")).text
