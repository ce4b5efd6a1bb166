"""Sessions with drafts: the same answers in fewer steps, from nothing but the session's own texts."""

import asyncio

import pytest

from longstride.engine.context import Placement
from longstride.engine.costs import StepCosts
from longstride.engine.draft import Node
from longstride.engine.history import GAP
from longstride.errors import BadInput
from tests.scheduler.test_session import TEXT, opened

POLICIES = ["tokens", "sentence", "confidence", "drift", "never"]
QUESTIONS = ["What of thing3?", "And thing17, what is said of it?"]


def seen(answer):
    return answer.text, answer.finish, answer.usage.generated, [s.passage for s in answer.sources]


@pytest.fixture(autouse=True)
def _steady(monkeypatch):
    """A drafted token costs a fiftieth of a step, so that no clock decides what is drafted."""
    monkeypatch.setattr(StepCosts, "curve", lambda _self, _rows, _keys: lambda further: 1.0 + 0.02 * further)


@pytest.mark.parametrize("placement", list(Placement))
@pytest.mark.parametrize("policy", POLICIES)
async def test_answers_are_the_same_with_and_without_drafts(tmp_path, placement, policy):
    answers = {}
    for drafting in ("off", "lookup", "tree"):
        (tmp_path / drafting).mkdir()
        async with opened(
            tmp_path / drafting, placement=placement, drafting=drafting, stride=5, budget_tokens=512
        ) as assistant:
            session = await assistant.session("s")
            await session.feed(TEXT[:1000])
            answers[drafting] = [
                *[await session.answer(q, policy=policy, max_tokens=40) for q in QUESTIONS],
                await session.answer(QUESTIONS[0], policy=policy, max_tokens=40, repetition_penalty=1.2),
                await session.answer(QUESTIONS[0], policy=policy, max_tokens=40, temperature=0.9, top_p=0.8, seed=4),
            ]
    expected = [seen(answer) for answer in answers["off"]]
    for drafting, made in answers.items():
        assert [seen(answer) for answer in made] == expected, drafting
        for answer in made:
            usage = answer.usage
            # the step that ended an answer may have brought no token but the end itself
            assert usage.generated in (usage.steps + usage.accepted, usage.steps + usage.accepted - 1)
            assert usage.cached + usage.encoded > 0
            assert usage.drafted >= usage.accepted >= 0
        retrievals = [answer.usage.retrievals for answer in made]
        assert retrievals == [answer.usage.retrievals for answer in answers["off"]]
    assert sum(answer.usage.drafted for answer in answers["off"]) == 0
    assert sum(answer.usage.accepted for answer in answers["tree"]) > 5  # a random model soon repeats itself


@pytest.mark.parametrize("window", ["separators", "cascade", "anchors", "anchors-added", "rollup"])
async def test_answers_behind_a_window_are_the_same_with_and_without_drafts(tmp_path, window):
    made = {}
    kept = {"window": window, "recent_tokens": 40, "span_tokens": 12, "stride": 5, "budget_tokens": 512}
    for drafting in ("off", "tree"):
        (tmp_path / drafting).mkdir()
        async with opened(tmp_path / drafting, drafting=drafting, **kept) as assistant:
            session = await assistant.session("s")
            await session.feed(TEXT)
            assert session.window_start > 0
            made[drafting] = [await session.answer(q, max_tokens=40, remember=True) for q in QUESTIONS]
    assert [seen(answer) for answer in made["tree"]] == [seen(answer) for answer in made["off"]]
    assert sum(answer.usage.accepted for answer in made["tree"]) > 5


async def test_sessions_in_one_forward_draft_apart(tmp_path):
    """Every drafted token of a session is one that this session read, was asked or has answered."""
    alphabets = {"a": "abcdefgh", "b": "ijklmnop", "c": "qrstuvwx"}
    drafted: dict[str, set[int]] = {name: set() for name in alphabets}
    async with opened(tmp_path, system="", drafting="tree") as assistant:
        sessions = {name: await assistant.session(name) for name in alphabets}
        forward = assistant.device.runner.forward

        def watched(slices):
            for piece in slices:
                name = next(n for n, s in sessions.items() if s.sequence.cache is piece.cache)
                drafted[name].update(list(piece.ids)[len(piece.ids) - piece.drafted :])
            return forward(slices)

        assistant.device.runner.forward = watched
        try:

            async def use(name):
                for turn in range(3):
                    await sessions[name].feed((alphabets[name] * 9)[turn:] + " ")
                    question = alphabets[name][::-1]
                    await sessions[name].answer(question, max_tokens=40, temperature=1.0, seed=turn)

            await asyncio.gather(*map(use, alphabets))
        finally:
            assistant.device.runner.forward = forward
        for name, session in sessions.items():
            said = set(session.memory.texts.said.ids.tolist()) - {GAP}
            assert drafted[name]
            assert drafted[name] <= {*session.stream, *said}
            # what a random model says may be any byte, so only those that it did not say itself tell
            others = {byte for other, text in alphabets.items() if other != name for byte in text.encode()}
            assert others - said
            assert not drafted[name] & (others - said)


async def test_a_resumed_session_drafts_from_what_it_read_and_answered(tmp_path):
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        await session.feed(TEXT)
        first = await session.answer(QUESTIONS[0], max_tokens=40)
        tokens = session.tokens
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        assert session.memory.texts.read.size == tokens
        assert session.memory.texts.read.ids.tolist() == session.stream.tolist()
        said = bytes(i for i in session.memory.texts.said.ids.tolist() if 0 <= i < 256).decode(errors="replace")
        assert first.text in said
        again = await session.answer(QUESTIONS[0], max_tokens=40)
        assert again.text == first.text
        # a part of the first answer was in no other text, and is drafted now
        assert again.usage.accepted > first.usage.accepted


async def test_an_answer_cancelled_before_its_first_token_leaves_no_draft(tmp_path):
    """Its question takes several forwards; the draft waits for the last of them when the task is cancelled."""
    question = " ".join(QUESTIONS * 6)
    async with opened(tmp_path, budget_tokens=16, context_tokens=1024) as assistant:
        session = await assistant.session("s")
        await session.feed(TEXT[:1000] + question)
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        step = assistant.device.step

        async def second_step(sequence, accept):
            if not await step(sequence, accept):
                sequence.draft = [Node(65, None, 1, 1.0, [])]  # as one that waits for the last of its forwards
                waiting.set_result(None)
                await asyncio.Event().wait()

        assistant.device.step = second_step
        task = asyncio.create_task(session.answer(question))
        await waiting
        assert session.sequence.draft
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assistant.device.step = step
        assert not session.sequence.draft
        report = await session.feed("A little more of thing17. ")
        assert report.encoded == report.tokens
        session.sequence.cache.check_integrity()
        drafted = await session.answer(QUESTIONS[1], max_tokens=40)
        assert drafted.text == (await session.answer(QUESTIONS[1], max_tokens=40, drafting="off")).text


async def test_a_session_that_does_not_draft_keeps_no_history_until_it_does(tmp_path):
    async with opened(tmp_path, drafting="off") as assistant:
        session = await assistant.session("s")
        await session.feed(TEXT)
        assert session.memory.texts.read.size == 0
        await session.answer(QUESTIONS[0], drafting="tree")
        assert session.memory.texts.read.size == session.tokens


async def test_an_unknown_way_of_drafting_is_refused(tmp_path):
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        with pytest.raises(BadInput, match="drafting: input should be 'off', 'lookup' or 'tree'"):
            await session.answer("Why?", drafting="fast")
