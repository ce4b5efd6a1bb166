"""Question answering over placements, on a tiny random model: what is counted, what was in view, going on."""

import asyncio
import json
from dataclasses import asdict, replace

import pytest

from longstride import Assistant
from longstride.engine.context import Placement
from longstride.errors import BadInput
from longstride.scheduler.answer import Source
from longstride.tuning.qa import Evaluation, Part, View, retrieves
from longstride.tuning.questions import Document, Gold, Question, QuestionSet
from longstride.tuning.systems import DEFAULT, ONCE, Setup, system, systems
from tests.tiny import tiny_assistant_model

LINES = [f"Thing{i} lives in town{7 * i} by the sea." for i in range(60)]
TEXT = "\n\n".join(LINES)
SETUP = Setup(context_tokens=400, passages=2, passage_tokens=40, query_tokens=16, refresh=8, max_tokens=8, system="s")
ALL = "closed-book,prepend:once,prepend:3,turn:3,end:3,beside:once,beside:3"


def about(i, **changes):
    start = TEXT.index(LINES[i])
    gold = Gold(None, start, start + len(LINES[i]))
    return Question(**{
        "id": f"q{i}", "document": "d", "text": f"Where lives Thing{i}?", "answers": (f"town{7 * i}",), "gold": (gold,),
        **changes,
    })  # fmt: skip


def read_set(*questions, name="read"):
    return QuestionSet(name, questions, texts={"d": TEXT})


def searched_set():
    """Questions that bring contexts: each has a document that the other's question would fetch."""
    documents = (Document("A", "A\nThing1 lives in town7."), Document("B", "B\nThing2 lives in town14."))
    first = Question("h1", "h1", "Thing1 Thing2?", ("town7",), gold=(Gold("A", 0, 24), Gold("C", 0, 5)))
    second = Question("h2", "h2", "Thing1 Thing2?", ("yes",))
    return QuestionSet("searched", (first, second), contexts={"h1": documents[:1], "h2": documents[1:]})


def opened(path):
    return Assistant.open(path / "t.db", model=tiny_assistant_model(), blocks_limit_bytes=0, temperature=0.7)


async def evaluated(path, sets, names=ALL, setup=SETUP, work=None):
    async with opened(path) as assistant:
        return await Evaluation(assistant, setup, systems(names), work).run(sets)


def by_system(parts):
    return {part.system: part for part in parts}


def timeless(parts):
    return [{**asdict(p), "records": [{**asdict(r), "seconds": 0, "first_token": 0} for r in p.records]} for p in parts]


async def test_what_each_system_computes(tmp_path):
    parts = by_system(await evaluated(tmp_path, [read_set(about(1), about(5), about(30))]))
    assert list(parts) == ALL.split(",")
    frame = len("\n\nWhere lives Thing1?") + 1
    closed = parts["closed-book"].records[0]
    assert (closed.retrievals, closed.encoded) == (0, frame)
    for i in range(3):
        turn, prepend, beside = (parts[name].records[i] for name in ("turn:3", "prepend:once", "beside:once"))
        window = beside.cached + beside.encoded  # all of its context before the answer, passages included
        assert prepend.encoded == pytest.approx(window, abs=4)  # the blank lines behind passages
        assert prepend.cached == 0
        assert beside.encoded <= frame + 8 + 2 * 40
        assert beside.encoded < turn.encoded < prepend.encoded
        assert (beside.retrievals, beside.rewrites) == (prepend.retrievals, prepend.rewrites) == (1, 0)
        assert parts["beside:3"].records[i].retrievals > 1
        assert prepend.generated == beside.generated == 8
    # reading is counted for those that keep what they read
    tokens = len(TEXT.encode())
    for name, part in parts.items():
        assert (part.read, part.read_encoded >= tokens) == ((0, False) if "prepend" in name else (tokens, True))


async def test_a_prefix_that_is_kept_saves_what_is_common(tmp_path):
    parts = by_system(await evaluated(tmp_path, [read_set(about(1), about(1, id="again"))], "prepend:once,beside:once"))
    first, again = parts["prepend:once"].records
    assert first.reusing == first.encoded
    assert (again.reusing, again.encoded) == (1, first.encoded)
    for record in parts["beside:once"].records:
        assert record.reusing == record.encoded
    # passages seen before are not encoded again
    first, again = parts["beside:once"].records
    assert again.encoded < first.encoded


async def test_whoever_is_asked_before_changes_nothing(tmp_path):
    together = timeless(await evaluated(tmp_path / "t", [read_set(about(1), about(5))]))
    alone = []
    for name in ALL.split(","):
        alone += timeless(await evaluated(tmp_path / name, [read_set(about(1), about(5))], name))
    assert alone == together


@pytest.fixture(autouse=True)
def folders(tmp_path):
    for name in ("t", "u", *ALL.split(",")):
        (tmp_path / name).mkdir()


async def test_every_placement_sees_the_same_text(tmp_path):
    windows = set()
    async with opened(tmp_path) as assistant:
        for placement in Placement:
            settings = SETUP.for_session(placement, assistant.model)
            session = await assistant.session(str(placement), **settings)
            await session.feed(TEXT)
            windows.add((session.window_start, session.sequence.context.room))
            assert (session.settings.temperature, session.settings.drafting) == (0.0, "off")
    assert len(windows) == 1
    assert windows.pop()[0] > 0


async def test_what_was_in_view(tmp_path):
    names = "closed-book,beside:once,prepend:once"
    parts = by_system(await evaluated(tmp_path, [read_set(about(3), about(59))], names))
    early, late = parts["closed-book"].records
    assert (early.retrieved, early.gold, early.answer_in_view) == (0.0, 0.0, 0.0)
    assert (late.retrieved, late.gold, late.answer_in_view) == (0.0, 1.0, 1.0)  # in the window
    for name in ("beside:once", "prepend:once"):
        early, late = parts[name].records
        assert (early.retrieved, early.gold, early.answer_in_view) == (1.0, 1.0, 1.0)
        assert (late.retrieved, late.gold) == (0.0, 1.0)


async def test_a_question_is_answered_from_its_own_contexts(tmp_path):
    part, other = await evaluated(tmp_path, [searched_set()], "beside:once")
    (record,) = part.records
    assert record.retrieved == record.gold == 0.5  # one of its two passages is not there
    assert record.answer_in_view == 1.0
    (record,) = other.records
    assert (record.retrieved, record.gold) == (None, None)
    assert record.answer_in_view is None  # yes or no
    assert (part.read, other.read) == (0, 0)


async def test_the_question_has_the_last_word_on_its_metric(tmp_path):
    asked = [about(1, id="r", metric="rouge", answers=("x",)), about(1, id="e", metric="exam", answers=("(B) x",))]
    (part,) = await evaluated(tmp_path, [read_set(*asked)], "closed-book")
    assert [record.metric for record in part.records] == ["rouge", "exam"]
    assert all(record.score == 0.0 for record in part.records)


async def test_a_question_that_would_slide_the_window_is_left_out(tmp_path):
    long = about(2, text="Where lives " + "the very " * 30 + "Thing2?")
    for part in await evaluated(tmp_path, [read_set(about(1), long, about(5))]):
        assert part.too_long == ["q2"]
        assert [record.id for record in part.records] == ["q1", "q5"]


# --- going on ---


async def test_an_interrupted_run_goes_on_and_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    sets = [read_set(about(1), about(5)), searched_set()]
    unbroken = timeless(await evaluated(tmp_path, sets))
    asked, ask, stops = [], Evaluation._ask, [8]

    async def counted(self, system, session, view, question, held):
        asked.append((system.name, question.id))
        if len(asked) in stops:
            raise asyncio.CancelledError
        return await ask(self, system, session, view, question, held)

    monkeypatch.setattr(Evaluation, "_ask", counted)
    with pytest.raises(asyncio.CancelledError):
        await evaluated(tmp_path / "t", sets, work=tmp_path / "work")
    finished = asked[:6]  # in whole parts of two questions each
    asked.clear()
    stops.clear()
    went_on = await evaluated(tmp_path / "u", sets, work=tmp_path / "work")
    assert timeless(went_on) == unbroken
    assert not set(finished) & set(asked)
    asked.clear()
    assert timeless(await evaluated(tmp_path / "u", sets, work=tmp_path / "work")) == unbroken
    assert asked == []


async def test_only_what_has_the_same_settings_is_used_again(tmp_path, monkeypatch):
    sets, work = [read_set(about(1))], tmp_path / "work"
    await evaluated(tmp_path, sets, "beside:once", work=work)
    asked, ask = [], Evaluation._ask

    async def counted(self, *arguments):
        asked.append(arguments)
        return await ask(self, *arguments)

    monkeypatch.setattr(Evaluation, "_ask", counted)

    async def again(sets=sets, names="beside:once", setup=SETUP):
        asked.clear()
        await evaluated(tmp_path, sets, names, setup, work)
        return len(asked)

    assert await again() == 0
    assert await again(names="beside:3") == 1
    assert await again(setup=replace(SETUP, max_tokens=7)) == 1
    assert await again(setup=replace(SETUP, system="t")) == 1
    assert await again(sets=[read_set(about(1), about(2))]) == 2
    assert await again(sets=[read_set(about(1), name="other")]) == 1
    assert await again() == 0


@pytest.mark.parametrize("damage", ["", "{", '{"part": {}, "identity": {}}', "[]", '{"identity": 1}'])
async def test_a_damaged_part_is_asked_again(tmp_path, damage):
    sets, work = [read_set(about(1))], tmp_path / "work"
    whole = timeless(await evaluated(tmp_path, sets, "beside:once", work=work))
    (path,) = work.iterdir()
    path.write_text(damage)
    assert timeless(await evaluated(tmp_path, sets, "beside:once", work=work)) == whole
    assert Part.from_dict(json.loads(path.read_text())["part"]).records[0].id == "q1"


async def test_progress_counts_every_answer_once(tmp_path):
    sets, work = [read_set(about(1), about(5))], tmp_path / "work"
    done = []
    for run in (1, 2):  # the second time all are kept
        async with opened(tmp_path) as assistant:
            evaluation = Evaluation(assistant, SETUP, systems("beside:3,prepend:3"), work)
            await evaluation.run(sets, lambda _what, count: done.append(count))
        assert sum(done) == 4 * run


async def test_nothing_is_left_in_the_database(tmp_path):
    async with opened(tmp_path) as assistant:
        await Evaluation(assistant, SETUP, systems("beside:3,turn:3")).run([read_set(about(1))])
        assert assistant.sessions.all() == []
        assert assistant.blocks.usage() == (0, 0)


# --- systems ---


def test_systems_by_name():
    names = [one.name for one in systems(DEFAULT)]
    assert ",".join(names) == DEFAULT
    closed, stride = system("closed-book"), system("end:8")
    assert (closed.placement, closed.policy, closed.plain) == (Placement.BESIDE, "never", True)
    assert (stride.placement, stride.policy, stride.stride, stride.plain) == (Placement.END, "tokens", 8, False)
    assert system("beside:once").stride == ONCE
    assert system("turn:drift").policy == "drift"
    assert system("prepend:4").prepends
    assert system("prepend:4").plain


@pytest.mark.parametrize(
    "name", ["", "beside", "beside:", "beside:0", "beside:-1", "aside:4", "prepend:never", "end:٤"]
)
def test_a_system_that_is_none_is_refused(name):
    with pytest.raises(BadInput, match=r"no system|no systems"):
        systems(name)
    with pytest.raises(BadInput, match="named twice"):
        systems("end:4,end:4")


@pytest.mark.parametrize("name", ["turn:once", "prepend:once"])
async def test_positions_that_the_model_does_not_have_are_refused_before_the_work(tmp_path, name):
    setup = replace(SETUP, context_tokens=1020)
    async with opened(tmp_path) as assistant:
        Evaluation(assistant, setup, systems("beside:once"))
        with pytest.raises(BadInput, match=f"system {name}: a context of 1020 tokens .* the model has 1024"):
            Evaluation(assistant, setup, systems(name))


def test_a_source_overlaps_a_gold_passage_or_does_not():
    source = Source("D", "p", 10, 20, 1.0, (0, 1), "")
    assert retrieves(source, Gold(None, 19, 30))
    assert retrieves(source, Gold("D", 0, 11))
    assert not retrieves(source, Gold(None, 20, 30))
    assert not retrieves(source, Gold(None, 0, 10))
    assert not retrieves(source, Gold("E", 10, 20))


def test_a_window_shows_what_stands_in_it():
    view = View("x" * 10, 100)
    assert view.shows(Gold(None, 109, 120))
    assert view.shows(Gold(None, 90, 101))
    assert not view.shows(Gold(None, 110, 120))
    assert not view.shows(Gold(None, 90, 100))
    assert not view.shows(Gold("D", 100, 110))
