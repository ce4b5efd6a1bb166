"""Sessions and their answers: token ids are the truth, so every row of it has a checksum."""

import datetime as dt
import json
import sqlite3
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlite_utils import Database as Tables

from longstride.errors import BadInput, StorageError
from longstride.storage.checksum import checksum
from longstride.storage.database import Database

SEALED = "id, name, model, vocabulary, settings, prompt, window_start, tokens"  # what decides an answer
COLUMNS = f"{SEALED}, created_at, updated_at, checksum"
ANSWER = "session_id, kind, question, text, tokens, usage, timing, sources, created_at"
CHILDREN = ("runs", "stream_passages", "answers", "session_blocks", "bookmarks")


def now() -> str:
    """UTC time, as stored."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def damaged(name: str, what: str) -> StorageError:
    """The refusal of a session that is not what was stored."""
    return StorageError(
        f"session {name!r} is damaged: {what}; restore a backup, or remove the session with "
        f"`longstride sessions remove {name!r}`"
    )


@dataclass(frozen=True)
class StoredSession:
    """A session's row. Of a damaged one (not `sound`) there are only the id and what is left of the name."""

    id: int
    name: str
    model: str
    vocabulary: str
    settings: dict[str, Any]
    prompt: bytes
    window_start: int
    tokens: int
    created_at: str
    updated_at: str
    sound: bool = True


def _stored(row: tuple[Any, ...]) -> StoredSession:
    *sealed, created_at, updated_at, seal = row
    if checksum("session", *sealed) != seal:
        return StoredSession(row[0], str(row[1]), "", "", {}, b"", 0, 0, "", "", sound=False)
    id_, name, model, vocabulary, settings, prompt, window_start, tokens = sealed
    return StoredSession(
        id_, name, model, vocabulary, json.loads(settings), prompt, window_start, tokens,
        str(created_at), str(updated_at),
    )  # fmt: skip


@dataclass(frozen=True)
class StreamPassage:
    """A span of the stream: tokens, and characters of the stream's text."""

    start: int
    stop: int
    first_char: int
    last_char: int


class Sessions:
    """The session tables."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(
        self, tables: Tables, name: str, model: str, vocabulary: str, settings: dict[str, Any], prompt: bytes
    ) -> int:
        """Insert a session inside the caller's transaction; returns its id. Raises `StorageError` for a name in use."""
        at = now()
        row = [name, model, vocabulary, json.dumps(settings), prompt, at, at]
        try:
            cursor = tables.conn.execute(
                "insert into sessions (name, model, vocabulary, settings, prompt, created_at, updated_at) "
                "values (?, ?, ?, ?, ?, ?, ?)", row,
            )  # fmt: skip
        except sqlite3.IntegrityError as error:
            raise StorageError(
                f"a session {name!r} is there already: another process has just created it, then open it again; or it "
                "is damaged, then `longstride sessions verify` says so"
            ) from error
        id_ = int(cursor.lastrowid or 0)
        self._seal(tables, id_)
        return id_

    @staticmethod
    def _seal(tables: Tables, session_id: int) -> None:
        """Give a row that was written in this transaction its checksum."""
        query = f"select {SEALED} from sessions where id = ?"  # noqa: S608
        seal = checksum("session", *tables.conn.execute(query, [session_id]).fetchone())
        tables.conn.execute("update sessions set checksum = ? where id = ?", [seal, session_id])

    @staticmethod
    def _row(tables: Tables, session_id: int) -> StoredSession | None:
        """A session by id, if it is (still) there. Raises `StorageError` if its row is damaged."""
        query = f"select {COLUMNS} from sessions where id = ?"  # noqa: S608
        row = tables.conn.execute(query, [session_id]).fetchone()
        stored = None if row is None else _stored(row)
        if stored is not None and not stored.sound:
            raise damaged(stored.name, "its name, settings, prompt or length is not what was stored")
        return stored

    def find(self, name: str) -> StoredSession | None:
        """A session by name, damaged or not."""
        query = f"select {COLUMNS} from sessions"  # noqa: S608

        def search(tables: Tables) -> StoredSession | None:
            # by its id, or SQLite would take the name from its index and not from the row
            by_id = f"{query} where id = (select id from sessions where name = ?)"  # noqa: S608
            row = tables.conn.execute(by_id, [name]).fetchone()
            if row is not None and row[1] == name:
                return _stored(row)
            # the index over the names may be damaged: before a name counts as unknown, all rows are looked at
            return next((_stored(row) for row in tables.conn.execute(query) if row[1] == name), None)

        return self.database.read(search)

    def get(self, name: str) -> StoredSession:
        """A session by name; `BadInput` names those that exist."""
        found = self.find(name)
        if found is None:
            names = [session.name for session in self.all()][:5]
            known = f"there are: {', '.join(names)}" if names else "there are none yet"
            raise BadInput(f"no session {name!r} in {self.database.path}; {known}")
        return found

    def all(self) -> list[StoredSession]:
        """All sessions, last used first, damaged ones too."""
        query = f"select {COLUMNS} from sessions order by updated_at desc, id desc"  # noqa: S608
        return [_stored(row) for row in self.database.read(lambda tables: tables.conn.execute(query).fetchall())]

    def append(
        self,
        tables: Tables,
        session_id: int,
        start: int,
        ids: bytes,
        passages: list[StreamPassage],
        window_start: int,
    ) -> None:
        """Add a run of stream tokens and the passages it completed, inside the caller's transaction.

        Raises `StorageError` if the stream is not `start` tokens long: another process has fed this session.
        """
        spans = [(p.start, p.stop, p.first_char, p.last_char) for p in passages]
        if spans and not ids:
            raise ValueError("passages are stored with the tokens that completed them")
        stored = self._row(tables, session_id)
        if stored is None or stored.tokens != start:
            raise StorageError("this session was changed or removed by another process; open it again")
        tables.conn.execute(
            "update sessions set tokens = ?, window_start = ?, updated_at = ? where id = ?",
            [start + len(ids) // 4, window_start, now(), session_id],
        )
        self._seal(tables, session_id)
        run = [session_id, start, ids, len(spans), checksum("run", session_id, start, ids, spans)]
        try:
            if ids:
                insert = "insert into runs (session_id, start, ids, passages, checksum) values (?, ?, ?, ?, ?)"
                tables.conn.execute(insert, run)
            insert = "insert into stream_passages values (?, ?, ?, ?, ?)"
            tables.conn.executemany(insert, [(session_id, *span) for span in spans])
        except sqlite3.IntegrityError as error:
            raise damaged(stored.name, f"there is something behind its last token, {start}, already") from error

    def load(self, session_id: int) -> tuple[StoredSession, bytes, list[StreamPassage]]:
        """A session with its stream's token ids, packed, and its passages, all as of one moment.

        Raises `StorageError` if anything of it is damaged or missing.
        """

        return self.database.snapshot(lambda tables: self._load(tables, session_id))

    def _load(self, tables: Tables, session_id: int) -> tuple[StoredSession, bytes, list[StreamPassage]]:
        stored = self._row(tables, session_id)
        if stored is None:
            raise StorageError(
                "this session was removed by another process, or its table is damaged (`longstride sessions verify`)"
            )
        columns = "select start, stop, first_char, last_char from stream_passages where session_id = ? order by start"
        spans = tables.conn.execute(columns, [session_id]).fetchall()
        # cast: a damaged row's number may be of any type
        runs = (
            "select start, ids, coalesce(cast(passages as integer), 0), checksum from runs where session_id = ? "
            "order by start"
        )
        packed, at, taken = [], 0, 0
        for start, ids, count, seal in tables.conn.execute(runs, [session_id]):
            if start != at:
                break
            if seal != checksum("run", session_id, start, ids, spans[taken : taken + count]):
                raise damaged(stored.name, f"what was read from token {at} on is not what was stored")
            packed.append(ids)
            at += len(ids) // 4
            taken += count
        if at != stored.tokens:
            raise damaged(stored.name, f"its stream has a gap at token {at}")
        if taken != len(spans):
            raise damaged(stored.name, f"it has {len(spans)} passages instead of {taken}")
        return stored, b"".join(packed), [StreamPassage(*span) for span in spans]

    def add_answer(self, tables: Tables, session_id: int, kind: str, tokens: int, answer: dict[str, Any]) -> int:
        """Store an answer with its sources, inside the caller's transaction; returns its id."""
        if tables.conn.execute("select 1 from sessions where id = ?", [session_id]).fetchone() is None:
            raise StorageError("this session was removed meanwhile; its answer is not stored")
        row = [
            session_id, kind, answer["question"], answer["text"], tokens,
            json.dumps(answer["usage"]), json.dumps(answer["timing"]), json.dumps(answer["sources"]), now(),
        ]  # fmt: skip
        cursor = tables.conn.execute(
            f"insert into answers ({ANSWER}, checksum) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
            [*row, checksum("answer", *row)],
        )
        return int(cursor.lastrowid or 0)

    def answers(self, session_id: int, kind: str | None = None) -> list[dict[str, Any]]:
        """Stored answers, oldest first. Raises `StorageError` if one is damaged."""
        return self.database.read(lambda tables: self._answers(tables, session_id, kind))

    @staticmethod
    def _answers(tables: Tables, session_id: int, kind: str | None = None) -> list[dict[str, Any]]:
        query = (
            f"select {ANSWER}, checksum from answers where session_id = ? and (? is null or kind = ?) "  # noqa: S608
            "order by id"
        )
        rows = tables.conn.execute(query, [session_id, kind, kind]).fetchall()
        if not all(_sound_answer(row) for row in rows):
            name = tables.conn.execute("select name from sessions where id = ?", [session_id]).fetchone()
            raise damaged(str((name or [session_id])[0]), "one of its answers is not what was stored")
        return [_answer(row) for row in rows]

    @staticmethod
    def has_answer(tables: Tables, session_id: int, kind: str, tokens: int) -> bool:
        """Whether an answer of this kind was given when `tokens` tokens were read."""
        query = "select 1 from answers where session_id = ? and kind = ? and tokens = ?"
        return tables.conn.execute(query, [session_id, kind, tokens]).fetchone() is not None

    def last_texts(self, session_id: int, count: int) -> list[str]:
        """The texts of the last `count` answers that are sound, oldest first."""
        query = f"select {ANSWER}, checksum from answers where session_id = ? order by id desc limit ?"  # noqa: S608
        rows = self.database.read(lambda tables: tables.conn.execute(query, [session_id, count]).fetchall())
        return [row[3] for row in reversed(rows) if _sound_answer(row)]

    def last_answer(self, session_id: int, kind: str) -> str | None:
        """The text of the last answer of a kind, if there is one. Raises `StorageError` if it is damaged."""
        query = f"select {ANSWER}, checksum from answers where session_id = ? and kind = ? order by id desc limit 1"  # noqa: S608
        row = self.database.read(lambda tables: tables.conn.execute(query, [session_id, kind]).fetchone())
        if row is not None and not _sound_answer(row):
            raise damaged(str(session_id), "the notes that stand for its beginning are not what was stored")
        return None if row is None else str(row[3])

    def problems(self, tables: Tables, session_id: int) -> list[str]:
        """What is damaged of a session and its answers, a sentence each."""
        found = []
        for check in (self._load, self._answers):
            try:
                check(tables, session_id)
            except StorageError as error:
                found.append(str(error))
        return found

    def verify(self) -> list[str]:
        """What is damaged of all sessions, a sentence each."""
        found = [self.database.read(partial(self.problems, session_id=session.id)) for session in self.all()]
        return [problem for problems in found for problem in problems]

    def change(self, tables: Tables, session_id: int, settings: dict[str, Any]) -> None:
        """Store changed settings, inside the caller's transaction."""
        if self._row(tables, session_id) is None:
            raise StorageError("this session was removed by another process")
        tables.conn.execute("update sessions set settings = ? where id = ?", [json.dumps(settings), session_id])
        self._seal(tables, session_id)

    def remove(self, tables: Tables, session_id: int, *, jobs_before: int | None = None) -> None:
        """Delete a session, its text, the blocks no other session holds and its messages, inside the caller's

        transaction. `jobs_before`: only messages received before that one, whose replies are out.
        """
        tables.conn.execute(
            "delete from jobs where session = (select name from sessions where id = ?1) and (?2 is null or (seq < ?2 "
            "and not exists (select 1 from outbox o where o.seq = jobs.seq and o.published_at is null)))",
            [session_id, jobs_before],
        )
        unsound = bool(self.problems(tables, session_id))
        if unsound:
            # its rows may differ from what the indexes say of them
            for table in ("sessions", "answers"):
                tables.conn.execute(f"reindex {table}")
        tables.conn.execute(
            "delete from blocks where id in (select block_id from session_blocks where session_id = ?1) and not exists "
            "(select 1 from session_blocks s where s.block_id = blocks.id and s.session_id != ?1)",
            [session_id],
        )
        tables.conn.execute("delete from sessions where id = ?", [session_id])
        if unsound:
            # and say that they belong to a session that never was
            for table in CHILDREN:
                tables.conn.execute(f"delete from {table} where session_id not in (select id from sessions)")  # noqa: S608


def _sound_answer(row: tuple[Any, ...]) -> bool:
    return bool(checksum("answer", *row[:-1]) == row[-1])


def _answer(row: tuple[Any, ...]) -> dict[str, Any]:
    """A row of the columns `ANSWER` as its reader wants it, without the session's id."""
    names = ANSWER.split(", ")
    return {
        name: json.loads(value) if name in ("usage", "timing", "sources") else value
        for name, value in zip(names[1:], row[1:-1], strict=True)
    }
