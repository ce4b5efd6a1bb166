"""Collections: a search, and so a session, knows nothing of documents outside the collections it names."""

import asyncio
import sqlite3
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlite_utils import Database as Tables

from longstride.errors import BadInput
from longstride.scheduler import retriever as retrieval
from longstride.scheduler.index import PassageIndex, scores
from longstride.scheduler.retriever import Retriever
from longstride.scheduler.settings import SessionSettings, changed_for_answer, load_settings
from longstride.storage.database import Database
from longstride.storage.documents import Documents
from longstride.storage.schema import migrations
from tests.scheduler.test_session import TEXT, opened

TEXTS = (
    "the whale and the ship\nthe sea\nship ship captain",
    "a storm at sea\na whale",
    "captain",
    "sea whale ship storm captain night",
    "the of and",  # no words at all
)
NAMES = ("a", "b")
names = st.sampled_from(NAMES)
words = st.lists(st.sampled_from(["whale", "ship", "sea", "captain", "zeppelin"]), min_size=2, max_size=8).map(" ".join)


def lines(text):
    """The spans of a text's lines."""
    spans, at = [], 0
    for line in text.split("\n"):
        spans.append((at, at + len(line)))
        at += len(line) + 1
    return spans


def add(documents, text, collection="default", name="name", path=None):
    documents.database.write(lambda tables: documents.add(tables, name, path, text, lines(text), collection=collection))


def remove(documents, text, collection="default"):
    documents.database.write(lambda tables: documents.remove(tables, documents.identity(text), collection))


class Searches(RuleBasedStateMachine):
    """Two processes on one file, and a plain list of what is in which collection."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.databases = [Database(Path(self.folder.name) / "c.db") for _ in range(2)]
        self.retrievers = [Retriever(Documents(database)) for database in self.databases]
        self.saved, self.steps = retrieval.SAVE_AFTER, 0
        self.members = []  # (collection, text, name), in the order of adding
        self.stored = []  # texts, in the order in which they were stored

    @property
    def documents(self):
        return Documents(self.databases[0])

    @initialize(every=st.sampled_from([1, 1000]), query=words, count=st.integers(1, 6))
    def begin(self, every, query, count):
        retrieval.SAVE_AFTER = every
        self.query, self.count = query, count

    @rule(text=st.sampled_from(TEXTS), name=names)
    def add(self, text, name):
        called = f"{text[:4]} of {name}"
        if any(member[:2] == (name, text) for member in self.members):
            with pytest.raises(sqlite3.IntegrityError):
                add(self.documents, text, name, called, called)
            return
        add(self.documents, text, name, called, called)
        # texts that begin alike come from one path: the new version takes the older one's place
        self.members = [member for member in self.members if member[::2] != (name, called)]
        self.members.append((name, text, called))
        self.stored = [t for t in self.stored if any(t == member[1] for member in self.members)]
        if text not in self.stored:
            self.stored.append(text)

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def remove(self, data):
        name, text, called = data.draw(st.sampled_from(self.members))
        remove(self.documents, text, name)
        self.members.remove((name, text, called))
        self.stored = [t for t in self.stored if any(t == member[1] for member in self.members)]

    @rule(which=st.integers(0, 1))
    def restart(self, which):
        self.databases[which].close()
        self.databases[which] = Database(Path(self.folder.name) / "c.db")
        self.retrievers[which] = Retriever(Documents(self.databases[which]))

    @invariant()
    def a_search_is_that_of_a_database_that_holds_nothing_else(self):
        """The passages, their scores and the names of their documents."""
        self.steps += 1
        for collections in (None, [], ["a"], ["b"], ["a", "b", "unknown"]):
            called = {}
            for name, text, title in self.members:
                if collections is None or name in collections:
                    called.setdefault(text, title)
            passages = [(called[text], text[a:b]) for text in self.stored if text in called for a, b in lines(text)]
            index = PassageIndex()
            index.add([text for _, text in passages])
            values = scores([index], self.query)[0]
            by_text = {text: value for (_, text), value in zip(passages, values.tolist(), strict=True)}
            for retriever in self.retrievers[self.steps % 3 > 0 :]:  # the first one looks at every third state
                found = retriever._search(self.query, self.count, None, 0, collections)
                assert {(p.document, p.text) for p in found} <= set(passages)
                assert [p.score for p in found] == [by_text[p.text] for p in found]
                assert [p.score for p in found] == sorted(values[values > 0].tolist(), reverse=True)[: self.count]
                assert len({p.id for p in found}) == len(found)

    @invariant()
    def a_text_is_stored_once(self):
        spans = [span for text in self.stored for span in lines(text)]
        assert self.documents.count() == len(spans)
        assert sorted((d.collection, d.name) for d in self.documents.all()) == sorted(m[::2] for m in self.members)

    def teardown(self):
        retrieval.SAVE_AFTER = self.saved
        for database in self.databases:
            database.close()
        self.folder.cleanup()


TestSearches = Searches.TestCase
TestSearches.settings = settings(deadline=None, max_examples=50, stateful_step_count=20)


@settings(deadline=None, max_examples=100)
@given(st.data(), st.lists(words, min_size=1, max_size=30), words)
def test_a_selection_scores_as_an_index_of_its_passages_alone(data, parts, query):
    """Merged or not, and whatever is added to the index later."""
    index, alone = PassageIndex(), PassageIndex()
    index.add(parts)
    if data.draw(st.booleans()):
        index.merge()
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(parts), max_size=len(parts))))
    selection, everything = index.select(mask), index.select()
    alone.add([part for part, chosen in zip(parts, mask, strict=True) if chosen])
    before = scores([index], query)[0]
    index.add(["whale ship sea storm captain night"] * 3)
    ours = scores([selection], query)[0]
    assert not ours[~mask].any()
    np.testing.assert_array_equal(ours[mask], scores([alone], query)[0])
    np.testing.assert_array_equal(scores([everything], query)[0], before)


@pytest.fixture
def documents(tmp_path):
    database = Database(tmp_path / "c.db")
    yield Documents(database)
    database.close()


async def test_the_best_of_a_collection_are_found_however_many_others_are_better(documents):
    add(documents, "\n".join(f"whale whale {i}" for i in range(500)), "a")
    add(documents, "a whale among many other words of another text", "b")
    retriever = Retriever(documents)
    assert [p.text for p in await retriever.search("whale", 3, collections=["b"])] == [
        "a whale among many other words of another text"
    ]
    assert len(await retriever.search("whale", 600, collections=["a", "b", "a"])) == 501


async def test_another_collection_does_not_tell_by_which_name_it_has_a_text(documents):
    add(documents, TEXTS[2], "a", "secret plan")
    add(documents, TEXTS[2], "b", "notes")
    retriever = Retriever(documents)
    for collections, name in ((["b"], "notes"), (["a"], "secret plan"), (None, "secret plan")):
        assert [p.document for p in await retriever.search("captain", 3, collections=collections)] == [name]
    remove(documents, TEXTS[2], "a")
    assert [p.document for p in await retriever.search("captain", 3)] == ["notes"]
    documents.database.read(lambda tables: tables.conn.execute("pragma wal_checkpoint(truncate)").fetchall())
    assert b"secret plan" not in documents.database.path.read_bytes()


async def test_what_left_a_collection_does_not_count_there_any_more(documents):
    add(documents, TEXTS[2], "a")
    add(documents, TEXTS[2], "b")
    add(documents, TEXTS[3], "a")
    retriever = Retriever(documents)
    assert len(await retriever.search("captain", 3, collections=["a"])) == 2
    remove(documents, TEXTS[2], "a")
    found = await retriever.search("captain", 3, collections=["a"])
    assert found == await Retriever(documents).search("captain", 3, collections=["a"])
    assert [p.text for p in found] == [TEXTS[3]]


async def test_what_leaves_a_collection_after_the_search_is_not_read(documents):
    """Even the number of a passage that was found does not lead to its text."""
    add(documents, TEXTS[2], "a")
    add(documents, TEXTS[2], "b")
    retriever = Retriever(documents)
    (found,) = await retriever.search("captain", 3, collections=["a"])
    number = int(found.id.split(":")[1])
    assert retriever.documents.passages({number: 1.0}, ["a"])
    remove(documents, TEXTS[2], "a")
    assert retriever.documents.passages({number: 1.0}, ["a"]) == {}
    assert retriever.documents.passages({number: 1.0}, []) == {}


async def test_more_collections_than_are_kept_at_hand(documents, monkeypatch):
    monkeypatch.setattr(retrieval, "SELECTIONS", 2)
    for i in range(5):
        add(documents, f"whale number{i}", f"c{i}")
    retriever = Retriever(documents)
    for i in (0, 1, 2, 3, 4, 0, 4):
        (found,) = await retriever.search("whale", 5, collections=[f"c{i}"])
        assert found.text == f"whale number{i}"
    assert len(retriever.documents._selections) == 2


# --- sessions ---


def watch(session, seen):
    """Note every piece that is put into the session's context."""
    rewrite = session.sequence.rewrite

    def watched(pieces):
        seen.extend(pieces)
        return rewrite(pieces)

    session.sequence.rewrite = watched


DOCUMENTS = tuple(f"{word} is a thing. " * 4 for word in ("Anchor", "Barrel", "Compass", "Dinghy", "Ensign"))
subsets = st.sets(names)


@settings(deadline=None, max_examples=12)
@given(
    held=st.lists(subsets, min_size=len(DOCUMENTS), max_size=len(DOCUMENTS)),
    drawn=st.lists(subsets, min_size=2, max_size=3),
)
def test_sessions_answer_from_their_collections_only(held, drawn):
    """Random collections, sessions at the same time: contexts, drafts and sources hold what they may only."""

    async def ask(session, may):
        seen = []
        watch(session, seen)
        answer = await session.answer("Which thing?", stride=3, max_tokens=9)
        decode = session.core.model.tokenizer.decode
        for part in [*map(decode, seen), *(source.text for source in answer.sources)]:
            assert any(part in text for text in may)
        drafts = decode([i for i in session.memory.texts.view.ids.tolist() if i >= 0])
        assert not any(text.split()[0] in drafts for text in DOCUMENTS if text not in may)
        assert {source.document for source in answer.sources} <= {text.split()[0] for text in may}
        assert bool(answer.sources) == bool(drafts) == bool(may)

    async def run(folder):
        async with opened(folder) as assistant:
            for text, collections in zip(DOCUMENTS, held, strict=True):
                for collection in sorted(collections):
                    await assistant.add_document(text.split()[0], text, collection=collection)
            sessions = [await assistant.session(f"s{i}", collections=sorted(c)) for i, c in enumerate(drawn)]
            may = [{t for t, c in zip(DOCUMENTS, held, strict=True) if c & own} for own in drawn]
            await asyncio.gather(*map(ask, sessions, may))

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder)))


async def sources(session):
    answer = await session.answer("What of the anchor?", max_tokens=2)
    return [source.document for source in answer.sources]


async def test_a_session_sees_what_comes_into_its_collection_and_not_what_leaves_it(tmp_path):
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s", collections=["ships"])
        await session.feed("Some text.")
        assert await sources(session) == []
        assert await assistant.add_document("other", "An anchor.") == 1
        assert await sources(session) == []
        assert await assistant.add_document("mine", "An anchor.", collection="ships") == 1
        assert await sources(session) == ["mine"]
        assert await assistant.add_document("mine again", "An anchor.", collection="ships") is None
        documents = assistant.documents
        id_ = documents.find("mine", "ships").id
        await assistant.database.awrite(lambda tables: documents.remove(tables, id_, "ships"))
        assert await sources(session) == []
        assert [p.document for p in await assistant.search("anchor")] == ["other"]
        assert await assistant.search("anchor", collections=["ships"]) == []


async def test_collections_outlive_the_process(tmp_path):
    async with opened(tmp_path) as assistant:
        await assistant.add_document("one", "An anchor of iron.", collection="ships")
        await assistant.add_document("two", "An anchor of gold.", collection="banks")
        session = await assistant.session("s", collections=["ships"])
        await session.feed("Some text.")
    async with opened(tmp_path) as assistant:
        session = await assistant.session("s")
        assert session.settings.collections == ["ships"]
        assert await sources(session) == ["one"]
        changed = await assistant.session("s", collections=["banks"])
        assert await sources(changed) == ["two"]
    async with opened(tmp_path) as assistant:
        assert (await assistant.session("s")).settings.collections == ["banks"]
        assert (await assistant.session("new")).settings.collections == ["default"]


async def test_without_collections_there_is_the_stream_alone(tmp_path):
    async with opened(tmp_path, collections=[]) as assistant:
        await assistant.add_document("facts", TEXT)
        session = await assistant.session("s")
        await session.feed(TEXT)
        answer = await session.answer("thing2 thing2", max_tokens=2)
        assert {source.document for source in answer.sources} == {"s"}


async def test_an_old_database_has_its_documents_in_the_default_collection(tmp_path):
    tables = Tables(sqlite3.connect(tmp_path / "t.db", isolation_level=None))
    migrations.apply(tables, stop_before="0005_collections")
    old = [("one", "/a/one.txt", "An anchor of iron."), ("two", None, "Nothing else.")]
    for name, path, text in old:
        row = [Documents.identity(text), name, path, text, len(text), "2026-01-01T00:00:00"]
        tables.conn.execute("insert into documents values (?, ?, ?, ?, ?, ?)", row)
        tables.conn.execute("insert into passages (document_id, start, stop) values (?, 0, ?)", [row[0], len(text)])
    tables.conn.close()
    async with opened(tmp_path) as assistant:
        found = assistant.documents.all("default")
        assert [(d.name, d.path, d.characters, d.passages, d.added_at) for d in found] == [
            (name, path, len(text), 1, "2026-01-01T00:00:00") for name, path, text in old
        ]
        assert assistant.documents.all() == found
        assert assistant.database.check() == []
        assert await sources(await assistant.session("s")) == ["one"]
        assert await sources(await assistant.session("t", collections=["other"])) == []


# --- the setting ---


async def test_a_collection_needs_a_name(tmp_path):
    async with opened(tmp_path) as assistant:
        for name in ("", "  ", "x" * 101, "a\nb", "\ud800"):
            with pytest.raises(BadInput, match="a collection needs a name of 1 to 100 printable characters"):
                await assistant.add_document("one", "An anchor.", collection=name)
            with pytest.raises(BadInput, match=r"^collections\.1: a collection needs a name of 1 to 100 printable"):
                await assistant.session("s", collections=["fine", name])
        assert await assistant.add_document("one", "An anchor.", collection="ü" * 100) == 1


def test_collections_belong_to_the_session():
    with pytest.raises(BadInput, match="collections belongs to the session"):
        changed_for_answer(SessionSettings(), {"collections": ["a"]})


def test_the_setting_comes_from_file_and_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_settings().for_sessions().collections == ["default"]
    (tmp_path / "longstride.toml").write_text('collections = ["from", "toml"]\n')
    assert load_settings().collections == ["from", "toml"]
    monkeypatch.setenv("LONGSTRIDE_COLLECTIONS", '["of the environment"]')
    assert load_settings().collections == ["of the environment"]
    assert load_settings(collections=["given"]).for_sessions().collections == ["given"]
    monkeypatch.setenv("LONGSTRIDE_COLLECTIONS", "[]")
    assert load_settings().collections == []


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (
            "ships",
            r"^collections: write a list as JSON, for example \[\"default\"\] \(got 'ships' from LONGSTRIDE_COL",
        ),
        ('"ships"', r"^collections: input should be a valid list"),
        ("[1]", r"^collections\.0: input should be a valid string \(got 1 from LONGSTRIDE_COL"),
        (
            '[""]',
            r"^collections\.0: a collection needs a name of 1 to 100 printable characters \(got '' from LONGSTRIDE_COL",
        ),
    ],
)
def test_a_wrong_list_is_refused_in_one_sentence(tmp_path, monkeypatch, value, why):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGSTRIDE_COLLECTIONS", value)
    with pytest.raises(BadInput, match=why):
        load_settings()
