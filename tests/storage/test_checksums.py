"""Checksums: what is damaged is named, refused and can be removed; what is beside it goes on."""

import sqlite3

import pytest
from sqlite_utils import Database as Tables

from longstride.errors import BadInput, StorageError
from longstride.storage.checksum import checksum
from longstride.storage.database import Database
from longstride.storage.documents import Documents
from longstride.storage.schema import migrations
from longstride.storage.sessions import Sessions, StreamPassage
from longstride.storage.verify import verify

TEXT = "Call me Ishmael. Some years ago I went to sea."
ANSWER = {"question": "Who?", "text": "Ishmael.", "usage": {}, "timing": {}, "sources": []}
IDS = bytes(range(12))


@pytest.fixture
def database(tmp_path):
    opened = Database(tmp_path / "t.db")
    yield opened
    opened.close()


@pytest.fixture
def sessions(database):
    """Two sessions of two runs each, with passages and an answer."""
    made = Sessions(database)
    for name in ("ahab", "ishmael"):
        id_ = database.write(lambda tables, name=name: made.create(tables, name, "m", "v", {"stride": 4}, b"\1\0\0\0"))
        for start, passages in ((0, [StreamPassage(0, 2, 0, 9)]), (3, [StreamPassage(2, 4, 9, 12)])):
            database.write(
                lambda tables, id_=id_, start=start, passages=passages: made.append(
                    tables, id_, start, IDS, passages, 0
                )
            )
        database.write(lambda tables, id_=id_: made.add_answer(tables, id_, "ask", 6, ANSWER))
    assert verify(database) == []
    return made


@pytest.fixture
def documents(database):
    """One document in two collections, and another one."""
    made = Documents(database)
    for name, text, collection in (("moby", TEXT, "default"), ("moby too", TEXT, "b"), ("other", "Other text.", "b")):
        database.write(
            lambda tables, name=name, text=text, collection=collection: made.add(
                tables, name, None, text, [(0, 5), (6, 11)], collection
            )
        )
    assert verify(database) == []
    return made


def execute(database, statement):
    """Change rows as no code of ours does, foreign keys or not."""
    connection = sqlite3.connect(database.path)
    with connection:
        connection.execute(statement)
    connection.close()


def behind_sqlites_back(database, table, old, new):
    """Change bytes in a table's pages, as a disk would: indexes and counts know nothing of it."""
    assert len(old) == len(new)
    database.read(lambda tables: tables.conn.execute("pragma wal_checkpoint(truncate)").fetchall())
    connection = sqlite3.connect(database.path)
    size = connection.execute("pragma page_size").fetchone()[0]
    pages = [row[0] - 1 for row in connection.execute("select pageno from dbstat where name = ?", [table])]
    connection.close()
    data = bytearray(database.path.read_bytes())
    count = 0
    for at in (page * size for page in pages):
        count += data[at : at + size].count(old)
        data[at : at + size] = data[at : at + size].replace(old, new)
    assert count == 1
    database.close()
    database.path.write_bytes(data)
    return Database(database.path)


def test_a_checksum_tells_values_types_and_places_apart():
    row = (1, "a", b"a", None, 1.0, [(1, 2), (3, 4)])
    others = [
        (*row[:-1], [(1, 2, 3, 4)]), (*row[:-1], [(1, 2)], (3, 4)), (1, b"a", "a", *row[3:]), ("1", *row[1:]),
        (1, "a", b"a", None, 1, row[5]), (1, "a", b"a", "None", 1.0, row[5]), row[:-1],
    ]  # fmt: skip
    assert len({checksum("kind", *values) for values in (row, *others)} | {checksum("other", *row)}) == 9
    # what is stored must be found again by every later version
    assert checksum("run", 1, 0, b"\0\xff", "é\n", [(1, 2)]).hex().startswith("1bed3800")


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("update sessions set settings = '{\"stride\": 5}' where id = 1", "its name, settings, prompt or length"),
        ("update sessions set settings = '{' where id = 1", "its name, settings, prompt or length"),
        ("update sessions set window_start = 1 where id = 1", "its name, settings, prompt or length"),
        ("update runs set ids = x'000000000000000000000000' where session_id = 1 and start = 3", "from token 3 on"),
        ("update stream_passages set last_char = 8 where session_id = 1 and start = 0", "from token 0 on"),
        ("delete from stream_passages where session_id = 1 and start = 2", "from token 3 on"),
        ("insert into stream_passages values (1, 4, 5, 12, 13)", "3 passages instead of 2"),
        ("delete from runs where session_id = 1 and start = 3", "a gap at token 3"),
        ("update runs set start = 4 where session_id = 1 and start = 3", "a gap at token 3"),
        ("update runs set passages = -1 where session_id = 1 and start = 0", "from token 3 on"),
    ],
)
def test_a_damaged_session_is_refused_and_removed_and_the_other_goes_on(database, sessions, statement, why):
    other = sessions.load(2)
    execute(database, statement)
    with pytest.raises(StorageError, match=f"session 'ahab' is damaged: .*{why}.*`longstride sessions remove 'ahab'`"):
        sessions.load(1)
    (problem,) = verify(database)
    assert why in problem
    assert {session.name for session in sessions.all()} == {"ahab", "ishmael"}
    assert sessions.load(2) == other
    found = sessions.get("ahab")
    database.write(lambda tables: sessions.remove(tables, found.id))
    assert verify(database) == []
    assert [session.name for session in sessions.all()] == ["ishmael"]


def test_a_damaged_row_is_not_sealed_again(database, sessions):
    execute(database, "update sessions set window_start = 1 where id = 1")
    with pytest.raises(StorageError, match="is damaged"):
        database.write(lambda tables: sessions.append(tables, 1, 6, IDS, [], 0))
    with pytest.raises(StorageError, match="is damaged"):
        database.write(lambda tables: sessions.change(tables, 1, {}))
    with pytest.raises(StorageError, match="is damaged"):
        sessions.load(1)


def test_a_damaged_answer_is_not_shown_and_not_drafted_from(database, sessions):
    database.write(lambda tables: sessions.add_answer(tables, 1, "note", 6, {**ANSWER, "text": "A note."}))
    execute(database, "update answers set text = 'Ahab.' where id = 1")
    with pytest.raises(StorageError, match="'ahab' is damaged: one of its answers"):
        sessions.answers(1)
    assert [a["text"] for a in sessions.answers(1, "note")] == sessions.last_texts(1, 9) == ["A note."]
    assert len(verify(database)) == 1
    sessions.load(1)


@pytest.mark.parametrize("name", [b"ahub", b"ah\xffb"])
def test_a_damaged_name_is_listed_and_can_be_removed_and_is_not_given_away(database, sessions, name):
    database = behind_sqlites_back(database, "sessions", b"ahab", name)
    sessions = Sessions(database)
    shown = name.decode(errors="replace")
    with pytest.raises(BadInput, match=f"no session 'ahab' in .*; there are: .*{shown}"):
        sessions.get("ahab")
    with pytest.raises(StorageError, match=r"a session 'ahab' is there already.*or it is damaged"):
        database.write(lambda tables: sessions.create(tables, "ahab", "m", "v", {}, b""))
    assert any(f"session {shown!r} is damaged" in problem for problem in verify(database))
    found = sessions.get(shown)
    assert not found.sound
    database.write(lambda tables: sessions.remove(tables, found.id))
    assert verify(database) == []
    assert database.write(lambda tables: sessions.create(tables, "ahab", "m", "v", {}, b"")) == 3
    database.close()


def test_what_a_session_lost_goes_with_it(database, sessions):
    """Its text must not stay behind under an id that no session has."""
    execute(database, "update runs set session_id = 9 where session_id = 1")
    assert len(verify(database)) == 2
    database.write(lambda tables: sessions.remove(tables, 1))
    assert verify(database) == []
    assert database.read(lambda tables: tables["runs"].count) == 2


@pytest.mark.parametrize(
    "statement",
    [
        "update collections set name = 'Moby' where id = 1",
        "update passages set stop = 4 where id = 1",
        "delete from passages where id = 2",
        "insert into passages (document_id, start, stop) select document_id, 6, 9 from passages where id = 1",
    ],
)
def test_a_damaged_document_is_refused_everywhere_until_it_is_removed(database, documents, statement):
    id_ = Documents.identity(TEXT)
    other = documents.some([3, 4])
    execute(database, statement)
    fresh = Documents(database)
    for read in (fresh.passages, fresh.members, lambda: fresh.some([1])):
        with pytest.raises(StorageError, match=rf"{id_[:12]}.* is damaged.*`longstride docs remove {id_[:12]}`"):
            read()
    assert fresh.some([3, 4]) == other
    assert any(id_[:12] in problem for problem in verify(database))
    database.write(lambda tables: fresh.remove(tables, id_))
    database.write(lambda tables: fresh.remove(tables, id_, "b"))
    assert verify(database) == []
    assert [document.name for document in fresh.all()] == ["other"]
    database.write(lambda tables: fresh.add(tables, "moby", None, TEXT, [(0, 5)]))
    assert [passage.text for passage in Documents(database).passages()] == ["Other", "text.", "Call "]


def test_a_damaged_text_is_refused_at_every_reading(database, documents):
    assert len(documents.passages()) == 4
    execute(database, "update documents set text = replace(text, 'Ishmael', 'Isaac..') where text like 'Call%'")
    with pytest.raises(StorageError, match=r"document 'moby' .* is damaged"):
        documents.some([1])
    # each place that it has is named
    assert [problem.partition(" (")[0] for problem in verify(database)] == ["document 'moby'", "document 'moby too'"]


def test_a_damaged_document_is_not_sealed_again_by_adding_its_text_elsewhere(database, documents):
    execute(database, "update passages set stop = 4 where id = 1")
    with pytest.raises(StorageError, match="is damaged"):
        database.write(lambda tables: Documents(database).add(tables, "moby", None, TEXT, [(0, 5)], "c"))


@pytest.mark.parametrize("table", ["collections", "passages"])
def test_a_passage_that_is_found_but_not_there_is_no_removal(database, documents, table):
    """As when a damaged page holds fewer rows than were put there."""
    documents.members()
    execute(database, f"delete from {table} where id = 3")  # noqa: S608
    with pytest.raises(StorageError, match=r"damaged|lost its place"):
        documents.some([3], ["b"])
    assert verify(database)


def test_a_document_that_lost_its_place_is_added_again(database, documents):
    execute(database, "delete from collections where id = 3")
    with pytest.raises(StorageError, match="has lost its place"):
        documents.passages()
    database.write(lambda tables: documents.add(tables, "other", None, "Other text.", [(0, 5), (6, 11)], "b"))
    assert [passage.text for passage in documents.passages()][2:] == ["Other", "text."]
    assert verify(database) == []


def test_verify_knows_a_schema_that_sqlite_takes_for_right(database, sessions):
    database = behind_sqlites_back(database, "sqlite_schema", b"reply_topic text", b"reply_tapic text")
    assert verify(database) == ["the table jobs is not as it was created; restore a backup"]
    database.close()


def test_a_damaged_table_of_migrations_is_refused(database):
    with pytest.raises(StorageError, match="not a sound SQLite file"):
        behind_sqlites_back(database, "sqlite_schema", b'"applied_at" TEXT', b'"applied_it" TEXT')


def test_what_was_stored_before_there_were_checksums_gets_them(tmp_path):
    path = tmp_path / "old.db"
    connection = sqlite3.connect(path)
    tables = Tables(connection)
    migrations.apply(tables, stop_before="0005_collections")
    id_ = Documents.identity(TEXT)
    for statement, row in (
        ("insert into documents values (?, 'moby', '/m.txt', ?, ?, 'then')", [id_, TEXT, len(TEXT)]),
        ("insert into passages (document_id, start, stop) values (?, 0, 5)", [id_]),
        ("insert into passages (document_id, start, stop) values (?, 6, 11)", [id_]),
        ("insert into sessions values (7, 'é', 'm', 'v', '{\"stride\": 4}', x'01000000', 1, 6, 'then', 'now')", []),
        ("insert into runs values (7, 0, ?)", [IDS]),
        ("insert into runs values (7, 3, ?)", [IDS]),
        ("insert into stream_passages values (7, 0, 2, 0, 9)", []),
        ("insert into stream_passages values (7, 2, 4, 9, 12)", []),
        ("insert into answers values (1, 7, 'ask', 'Who?', 'Ishmael.', 6, '{}', '{\"a\": 0.1}', '[]', 'then')", []),
    ):
        connection.execute(statement, row)
    connection.commit()
    connection.close()
    database = Database(path)
    assert verify(database) == []
    sessions = Sessions(database)
    stored, ids, passages = sessions.load(7)
    assert (stored.name, stored.settings, stored.tokens) == ("é", {"stride": 4}, 6)
    assert (ids, passages) == (IDS * 2, [StreamPassage(0, 2, 0, 9), StreamPassage(2, 4, 9, 12)])
    database.write(lambda tables: sessions.append(tables, 7, 6, IDS, [StreamPassage(4, 8, 12, 20)], 1))
    assert len(sessions.load(7)[2]) == 3
    assert [answer["text"] for answer in sessions.answers(7)] == ["Ishmael."]
    assert [(passage.document, passage.text) for passage in Documents(database).passages()] == [
        ("moby", "Call "), ("moby", "e Ish"),
    ]  # fmt: skip
    database.close()
