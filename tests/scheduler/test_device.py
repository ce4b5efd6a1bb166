"""The device loop: who shares a forward, and how much of it a reader gets beside an answer."""

import asyncio

from longstride.scheduler import device
from tests.scheduler.test_session import TEXT, opened


async def test_who_reads_beside_an_answer_takes_small_bites(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "ANSWERING_S", 60.0)  # no clock decides this test
    async with opened(tmp_path, budget_tokens=128) as assistant:
        answering, reading = await assistant.session("answering"), await assistant.session("reading")
        await answering.feed(TEXT[:100])
        runner, sizes = assistant.model.runner, []
        real = runner.forward

        def recorded(slices):
            sizes.append([len(piece.ids) for piece in slices])
            return real(slices)

        runner.forward = recorded
        try:
            task = asyncio.create_task(reading.feed(TEXT * 3))
            tokens = 0
            async for piece in answering.ask("What of thing3?", policy="never", max_tokens=12):
                if piece.answer is None and (tokens := tokens + 1) == 2:
                    sizes.clear()  # from here on the device knows that someone is being answered
            beside = [forward for forward in sizes if 1 in forward and len(forward) > 1]
            answered = list(sizes)
            await task
        finally:
            del runner.forward
        assert beside  # they did share forwards
        assert max(sum(forward) for forward in answered) <= 128 // 8
        assert reading.tokens == len(TEXT * 3)


async def test_sessions_that_decode_together_share_forwards(tmp_path):
    async with opened(tmp_path) as assistant:
        sessions = [await assistant.session(f"s{i}") for i in range(4)]
        for session in sessions:
            await session.feed(TEXT[:60])
        before = assistant.model.runner.forwards
        answers = await asyncio.gather(
            *(session.answer("What of thing3?", policy="never", max_tokens=12) for session in sessions)
        )
        alone = sum(answer.usage.generated for answer in answers)
        assert assistant.model.runner.forwards - before < alone
