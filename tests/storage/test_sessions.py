"""Sessions: token ids in append-only runs, passages, answers; nothing half written, nothing left behind."""

from array import array

import pytest

from longstride.errors import BadInput, StorageError
from longstride.storage.database import Database
from longstride.storage.sessions import Sessions, StreamPassage

TABLES = ("sessions", "runs", "stream_passages", "answers")


@pytest.fixture
def sessions(tmp_path):
    database = Database(tmp_path / "t.db")
    yield Sessions(database)
    database.close()


def create(sessions, name="s", **settings):
    return sessions.database.write(
        lambda tables: sessions.create(tables, name, "model", "vocabulary", settings, packed(1, 2))
    )


def append(sessions, id_, start, ids, passages=(), window_start=0):
    sessions.database.write(
        lambda tables: sessions.append(tables, id_, start, packed(*ids), list(passages), window_start)
    )


def packed(*ids):
    return array("I", ids).tobytes()


def answer(text="It is a whale."):
    source = {"document": "Moby Dick", "passage": 7, "start": 0, "stop": 12}
    return {"question": "What?", "text": text, "usage": {"cached": 3}, "timing": {"total": 0.5}, "sources": [source]}


def add_answer(sessions, id_, kind="ask", text="It is a whale."):
    return sessions.database.write(lambda tables: sessions.add_answer(tables, id_, kind, 5, answer(text)))


def rows(sessions):
    """Rows of each of the tables."""
    return sessions.database.read(lambda tables: {name: tables[name].count for name in TABLES})


def drop_run(sessions, start):
    sessions.database.write(lambda tables: tables.conn.execute("delete from runs where start = ?", [start]))


def test_a_new_session_is_found_as_it_was_created(sessions):
    id_ = create(sessions, "moby-dick", stride=16, system="Be brief.")
    found = sessions.find("moby-dick")
    assert found == sessions.get("moby-dick")
    assert (found.id, found.name, found.model, found.vocabulary) == (id_, "moby-dick", "model", "vocabulary")
    assert found.settings == {"stride": 16, "system": "Be brief."}
    assert (found.prompt, found.window_start, found.tokens) == (packed(1, 2), 0, 0)
    assert sessions.load(id_)[1] == b""
    assert sessions.load(id_)[2] == []
    assert sessions.answers(id_) == []


def test_an_unknown_session_is_refused_naming_those_there_are(sessions):
    assert sessions.find("nobody") is None
    with pytest.raises(BadInput, match=r"no session 'nobody' in .*t\.db; there are none yet"):
        sessions.get("nobody")
    create(sessions, "ahab")
    create(sessions, "ishmael")
    with pytest.raises(BadInput, match=r"no session 'nobody' in .*; there are: ishmael, ahab"):
        sessions.get("nobody")


def test_a_name_is_taken_once(sessions):
    id_ = create(sessions)
    with pytest.raises(StorageError, match="a session 's' is there already"):
        create(sessions)
    assert [s.id for s in sessions.all()] == [id_]


def test_settings_change(sessions):
    id_ = create(sessions, stride=16)
    sessions.database.write(lambda tables: sessions.change(tables, id_, {"stride": 8}))
    assert sessions.get("s").settings == {"stride": 8}


def test_the_stream_is_all_that_was_appended(sessions):
    id_, other = create(sessions), create(sessions, "other")
    first, second = StreamPassage(0, 3, 0, 11), StreamPassage(3, 5, 11, 20)
    append(sessions, id_, 0, [5, 6, 2**32 - 1], [first])
    append(sessions, other, 0, [9])
    append(sessions, id_, 3, [], window_start=1)
    append(sessions, id_, 3, [7, 8], [second], window_start=2)
    assert sessions.load(id_)[1] == packed(5, 6, 2**32 - 1, 7, 8)
    assert sessions.load(other)[1] == packed(9)
    assert sessions.load(id_)[2] == [first, second]
    assert (sessions.get("s").tokens, sessions.get("s").window_start) == (5, 2)


@pytest.mark.parametrize("start", [0, 2, 4])
def test_an_append_at_the_wrong_place_is_refused_and_writes_nothing(sessions, start):
    id_ = create(sessions)
    append(sessions, id_, 0, [1, 2, 3])
    before = sessions.get("s")
    with pytest.raises(StorageError, match="changed or removed by another process"):
        append(sessions, id_, start, [4, 5], [StreamPassage(start, start + 2, 0, 2)], window_start=1)
    assert sessions.get("s") == before
    assert sessions.load(id_)[1] == packed(1, 2, 3)
    assert sessions.load(id_)[2] == []


def test_an_append_that_fails_half_way_writes_nothing(sessions):
    id_ = create(sessions)
    append(sessions, id_, 0, [1, 2], [StreamPassage(0, 2, 0, 2)])
    with pytest.raises(StorageError, match="something behind its last token, 2, already"):
        append(sessions, id_, 2, [3, 4], [StreamPassage(0, 2, 0, 2)])
    assert (sessions.get("s").tokens, sessions.load(id_)[1]) == (2, packed(1, 2))


def test_an_append_to_a_removed_session_is_refused(sessions):
    id_ = create(sessions)
    sessions.database.write(lambda tables: sessions.remove(tables, id_))
    with pytest.raises(StorageError, match="removed by another process"):
        append(sessions, id_, 0, [1])
    assert rows(sessions) == dict.fromkeys(TABLES, 0)


@pytest.mark.parametrize(("missing", "at"), [(0, 0), (2, 2), (4, 4)])
def test_a_missing_run_is_noticed(sessions, missing, at):
    """The first, one in the middle and the last."""
    id_ = create(sessions)
    for start in (0, 2, 4):
        append(sessions, id_, start, [start, start + 1])
    drop_run(sessions, missing)
    with pytest.raises(StorageError, match=f"gap at token {at}"):
        sessions.load(id_)


def test_answers_come_back_in_order_and_by_kind(sessions):
    id_, other = create(sessions), create(sessions, "other")
    first = add_answer(sessions, id_, text="one")
    add_answer(sessions, other, text="of another session")
    second = add_answer(sessions, id_, "note", text="two")
    assert first < second
    found = sessions.answers(id_)
    assert [(a["kind"], a["text"], a["tokens"]) for a in found] == [("ask", "one", 5), ("note", "two", 5)]
    for key in ("question", "usage", "timing", "sources"):
        assert found[0][key] == answer()[key]
    assert [a["text"] for a in sessions.answers(id_, "note")] == ["two"]
    assert sessions.answers(id_, "summary") == []


def test_removing_a_session_leaves_nothing_of_it(sessions):
    id_, other = create(sessions), create(sessions, "other")
    for session in (id_, other):
        append(sessions, session, 0, [1, 2, 3], [StreamPassage(0, 3, 0, 3)])
        add_answer(sessions, session)
    sessions.database.write(lambda tables: sessions.remove(tables, id_))
    assert sessions.find("s") is None
    assert rows(sessions) == dict.fromkeys(TABLES, 1)
    assert sessions.load(other)[1] == packed(1, 2, 3)
    assert len(sessions.answers(other)) == 1


def test_sessions_are_listed_last_used_first(sessions):
    ids = [create(sessions, name) for name in ("a", "b", "c")]
    update = "update sessions set updated_at = ? where id = ?"
    times = list(zip(("2026-01-02", "2026-01-03", "2026-01-01"), ids, strict=True))
    sessions.database.write(lambda tables: tables.conn.executemany(update, times))
    assert [s.name for s in sessions.all()] == ["b", "a", "c"]
    append(sessions, ids[2], 0, [1])
    assert [s.name for s in sessions.all()] == ["c", "b", "a"]
