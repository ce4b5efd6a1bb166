"""Sessions with adapters: one a session, changed between openings, shared by sessions; marks; what is refused."""

import asyncio
import json
import shutil

import pytest

from longstride import Assistant
from longstride.engine.context import Placement
from longstride.errors import BadInput, ModelError, StorageError
from longstride.scheduler import adapters as adapters_module
from tests.lora import own_file, save_adapter
from tests.tiny import tiny_assistant_model

TEXT = "".join(f"Sentence number {i} speaks of thing{i} and of nothing else. " for i in range(20))
SETTINGS = {
    "system": "s", "passage_tokens": 24, "passages": 2, "refresh": 8, "stride": 4, "max_tokens": 12, "block_tokens": 16,
    "budget_tokens": 64, "context_tokens": 512, "window": "sinks",
}  # fmt: skip
QUESTION = "What of thing3?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Adapters of the tiny model: two that act everywhere, two on segments, one of those without marks."""
    folder = tmp_path_factory.mktemp("adapters")
    save_adapter(folder / "x", seed=1)
    save_adapter(folder / "y", seed=2)
    save_adapter(folder / "segment x", seed=3, own=own_file(), trainable_token_indices=[262, 263])
    save_adapter(folder / "segment y", seed=4, own=own_file(marks=([], [])))
    return folder


def opened(path, **changes):
    return Assistant.open(path / "t.db", model=tiny_assistant_model(), **{**SETTINGS, **changes})


async def answered(path, adapter, **changes):
    """(answer, rows restored, passages' rows copied) of the session in `path`, read if it is new."""
    async with opened(path, **changes) as assistant:
        await assistant.add_document("facts", TEXT)
        session = await assistant.session("s", adapter=str(adapter))
        if session.resumed is None:
            await session.feed(TEXT[:300])
        answer = await session.answer(QUESTION)
        restored = session.resumed.restored if session.resumed else 0
        return answer.text, restored, session.sequence.copied


@pytest.mark.parametrize("placement", list(Placement))
async def test_rows_of_one_adapter_everywhere_are_never_used_under_another(tmp_path, folders, placement):
    fresh, seen = {}, {}
    for name in ("x", "y", "none"):
        adapter = folders / name if name != "none" else name
        (tmp_path / name).mkdir()
        fresh[name], _, _ = await answered(tmp_path / name, adapter, placement=placement)
        text, restored, copied = await answered(tmp_path, adapter, placement=placement)
        assert (text, restored, copied) == (fresh[name], 0, 0)
        seen[name] = text
    assert len(set(seen.values())) == 3
    text, restored, copied = await answered(tmp_path, folders / "x", placement=placement)
    assert text == fresh["x"]
    assert restored > 200  # its own rows are there still
    assert (copied > 0) == (placement is Placement.BESIDE)


@pytest.mark.parametrize("placement", list(Placement))
async def test_adapters_of_segments_share_the_streams_rows_and_no_passages(tmp_path, folders, placement):
    fresh = {}
    first = True
    for name in ("none", "segment x", "segment y"):
        adapter = folders / name if name != "none" else name
        (tmp_path / name).mkdir()
        fresh[name], _, _ = await answered(tmp_path / name, adapter, placement=placement)
        text, restored, copied = await answered(tmp_path, adapter, placement=placement)
        assert text == fresh[name]
        assert (restored > 200) != first
        assert copied == 0
        first = False
    assert len(set(fresh.values())) == 3
    for name in ("segment x", "none"):
        adapter = folders / name if name != "none" else name
        text, restored, copied = await answered(tmp_path, adapter, placement=placement)
        assert text == fresh[name]
        assert restored > 200
        assert (copied > 0) == (placement is Placement.BESIDE)


ANCHORED = {"window": "anchors", "span_tokens": 12, "recent_tokens": 0}


@pytest.mark.parametrize("placement", list(Placement))
async def test_adapters_of_the_text_share_passages_and_no_rows_of_the_stream(tmp_path, placement):
    """The counterpart: what one makes of the stream is its own, passages' rows are the base's for all of them."""
    changes, fresh = {**ANCHORED, "placement": placement}, {}
    names = {"none": "none"}
    for seed, name in enumerate(("text x", "text y")):
        save_adapter(tmp_path / name, seed=seed, own=own_file("text", marks=([], []), window="anchors"))
        names[name] = tmp_path / name
    first = True
    for name, adapter in names.items():
        (tmp_path / f"fresh {name}").mkdir()
        fresh[name], _, _ = await answered(tmp_path / f"fresh {name}", adapter, **changes)
        text, restored, copied = await answered(tmp_path, adapter, **changes)
        assert (text, restored) == (fresh[name], 0)
        assert (copied > 0) == (placement is Placement.BESIDE and not first)
        first = False
    assert len(set(fresh.values())) == 3
    for name, adapter in names.items():
        text, restored, _ = await answered(tmp_path, adapter, **changes)
        assert (text, restored > 200) == (fresh[name], True)
    (tmp_path / "other").mkdir()
    with pytest.raises(BadInput, match="trained for window anchors, and session 's' has sinks"):
        await answered(tmp_path / "other", names["text x"], window="sinks")


async def test_sessions_with_several_adapters_share_forwards_and_answer_as_alone(tmp_path, folders):
    names = ["x", "segment x", "none", "segment y"]
    async with opened(tmp_path) as assistant:
        await assistant.add_document("facts", TEXT)
        sessions = []
        for name in names:
            adapter = str(folders / name) if name != "none" else name
            sessions.append(await assistant.session(name, adapter=adapter))
        await asyncio.gather(*(session.feed(TEXT[:300]) for session in sessions))
        forwards = assistant.model.runner.forwards
        together = await asyncio.gather(*(session.answer(QUESTION, drafting="off") for session in sessions))
        shared = assistant.model.runner.forwards - forwards
        alone = [await session.answer(QUESTION, drafting="off") for session in sessions]
        assert [a.text for a in together] == [a.text for a in alone]
        assert shared < (assistant.model.runner.forwards - forwards - shared) * 0.7


# --- marks ---


@pytest.mark.parametrize("placement", list(Placement))
async def test_the_adapters_marks_stand_around_passages_and_are_never_written(tmp_path, folders, placement):
    async with opened(tmp_path, placement=placement) as assistant:
        await assistant.add_document("facts", TEXT)
        session = await assistant.session("s", adapter=str(folders / "segment x"))
        plain = await assistant.session("plain", adapter="none")
        await session.feed("A short stream.")
        assert (session.marks.left, session.marks.right, session.marks.stops) == ((262,), (263,), ())
        segments = []
        async for piece in session.ask(
            "Which speak of thing3 or thing9?", temperature=5.0, seed=1, max_tokens=40, stride=100
        ):
            if piece.answer is None:
                segments.append(session.sequence.context.segment)
                assert not {262, 263} & set(session.sequence.context.text)
        beside = placement is Placement.BESIDE
        assert segments
        for pieces in segments:
            assert len(pieces) == (2 if beside else 1)
            for ids in pieces:
                assert (ids[0], ids[-1]) == (262, 263)
                assert not {262, 263} & set(ids[1:-1])
                assert len(ids) <= (24 if beside else 2 * 24 + 2)
        # beside the text the range before the stream stays as it was, so that its rows do
        assert session.sequence.context.reserved == (24 if beside else 2 * 24 + 2)
        assert beside == (session.sequence.context.reserved == plain.sequence.context.reserved)


async def test_marks_are_banned_where_the_tokenizer_does_not_know_them(tmp_path, folders):
    """Ids that the tokenizer takes for text are banned too, and their text ends nothing."""
    shutil.copytree(folders / "segment y", tmp_path / "letters")
    marks = [[i for i in range(256) if i != 7], []]
    (tmp_path / "letters" / "longstride.json").write_text(json.dumps(own_file(marks=marks)))
    async with opened(tmp_path, placement="end", context_tokens=1024) as assistant:
        session = await assistant.session("s", adapter=str(tmp_path / "letters"))
        await session.feed("A short stream.")
        answer = await session.answer(QUESTION, policy="never")
        assert set(answer.text) <= {"\x07"}


async def test_marks_that_leave_no_room_are_refused(tmp_path, folders):
    async with opened(tmp_path, passage_tokens=2) as assistant:
        with pytest.raises(BadInput, match=r"passage_tokens 2 leaves no room .* marks of 2 tokens"):
            await assistant.session("s", adapter=str(folders / "segment x"))


# --- which one ---


async def test_adapters_are_loaded_once_and_again_when_they_change(tmp_path, folders, monkeypatch):
    shutil.copytree(folders / "x", tmp_path / "own")
    (tmp_path / "link").symlink_to(tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    async with opened(tmp_path) as assistant:
        one = await assistant.session("one", adapter="own")
        two = await assistant.session("two", adapter=str(tmp_path / "link"))
        assert one.sequence.adapter is two.sequence.adapter
        assert one.settings.adapter == str(tmp_path / "own")  # whole, so that it is found from elsewhere too
        assistant.close_session("one")
        shutil.copy(folders / "y" / "adapter_model.safetensors", tmp_path / "own")
        again = await assistant.session("one")
        assert again.sequence.adapter.fingerprint != two.sequence.adapter.fingerprint


async def test_auto_takes_the_adapter_that_comes_along(tmp_path, folders, monkeypatch):
    async with opened(tmp_path) as assistant:
        assert (await assistant.session("before")).sequence.adapter is None
        asked = []
        monkeypatch.setattr(
            adapters_module, "shipped_adapter", lambda *names: asked.append(names) or folders / "segment x"
        )
        session = await assistant.session("s", placement="end")
        assert session.sequence.adapter.name == "segment x"
        assert asked == [("tiny-llama", Placement.END)]
        assert session.settings.adapter == "auto"
        assert (await assistant.session("none", adapter="none")).sequence.adapter is None


async def test_an_adapter_belongs_to_the_session(tmp_path, folders):
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        await session.feed("A short stream.")
        with pytest.raises(BadInput, match="adapter belongs to the session"):
            await session.answer(QUESTION, adapter=str(folders / "x"))
        changed = await assistant.session("s", adapter=str(folders / "x"))
        assert changed is not session
        assert changed.sequence.adapter.acts == "everywhere"


async def test_an_adapter_that_cannot_be_used_makes_no_session(tmp_path):
    async with opened(tmp_path) as assistant:
        with pytest.raises(ModelError, match="no such folder"):
            await assistant.session("s", adapter=str(tmp_path / "nothing"))
        assert not await assistant.has_session("s")
        with pytest.raises(BadInput, match="adapter"):
            await assistant.session("s", adapter="")


async def test_an_adapter_goes_with_the_placement_that_it_was_trained_for(tmp_path):
    save_adapter(tmp_path / "end", seed=5, own=own_file(placement="end"), trainable_token_indices=[262, 263])
    save_adapter(tmp_path / "bare", seed=6, own=own_file(marks=([], []), placement="end"))
    async with opened(tmp_path) as assistant:
        with pytest.raises(BadInput, match="was trained for placement end, and session 'b' has beside"):
            await assistant.session("b", adapter=str(tmp_path / "end"))
        assert not await assistant.has_session("b")
        session = await assistant.session("e", placement="end", adapter=str(tmp_path / "end"))
        assert (session.marks.left, session.marks.right) == ((262,), (263,))
        # trained without marks: words in their place would be something else
        session = await assistant.session("bare", placement="end", adapter=str(tmp_path / "bare"))
        assert session.marks.size == 0


async def test_a_session_opened_with_another_adapter_lets_go_of_the_one_before(tmp_path, folders):
    async with opened(tmp_path) as assistant:
        before = await assistant.session("s", adapter=str(folders / "x"))
        await before.feed(TEXT[:200])
        after = await assistant.session("s", adapter=str(folders / "y"))
        assert before.snapshot.held_bytes == 0
        with pytest.raises(StorageError, match="it was opened with other settings"):
            await before.feed(TEXT[:50])
        await after.feed(TEXT[200:300])
        assert after.tokens == 300
