"""What a session sees depends on its stream alone: not on how the text came, nor on restarts between."""

import pytest

from tests.scheduler.test_session import TEXT, opened


async def window_and_answer(assistant) -> tuple[int, list[int], str]:
    session = await assistant.session("s")
    answer = await session.answer("What of thing3?")
    return session.window_start, list(session.sequence.context.text), answer.text


async def unbroken(tmp_path) -> tuple[int, list[int], str]:
    folder = tmp_path / "unbroken"
    folder.mkdir()
    async with opened(folder) as assistant:
        await (await assistant.session("s")).feed(TEXT)
        return await window_and_answer(assistant)


@pytest.mark.parametrize("size", [1, 37, 500])
async def test_the_window_slides_where_it_is_full_however_the_text_comes(tmp_path, size):
    expected = await unbroken(tmp_path)
    assert expected[0] > 0
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        for at in range(0, len(TEXT), size):
            await session.feed(TEXT[at : at + size])
        assert await window_and_answer(assistant) == expected


async def test_a_restart_in_the_middle_changes_nothing(tmp_path):
    expected = await unbroken(tmp_path)
    for at in range(0, len(TEXT), 300):
        async with opened(tmp_path) as assistant:
            await (await assistant.session("s")).feed(TEXT[at : at + 300])
    async with opened(tmp_path) as assistant:
        assert await window_and_answer(assistant) == expected


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
