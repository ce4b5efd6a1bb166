"""Sessions and their answers: token ids are the truth."""

import datetime as dt
import json
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database as Tables

from longstride.errors import BadInput, StorageError
from longstride.storage.database import Database


def now() -> str:
    """UTC time, as stored."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class StoredSession:
    """A session's row."""

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
        """Insert a session inside the caller's transaction; returns its id."""
        at = now()
        row = [name, model, vocabulary, json.dumps(settings), prompt, at, at]
        cursor = tables.conn.execute(
            "insert into sessions (name, model, vocabulary, settings, prompt, created_at, updated_at) "
            "values (?, ?, ?, ?, ?, ?, ?)", row,
        )  # fmt: skip
        return int(cursor.lastrowid or 0)

    def find(self, name: str) -> StoredSession | None:
        """A session by name."""
        return next(iter(self._select("where name = ?", [name])), None)

    def get(self, name: str) -> StoredSession:
        """A session by name; `BadInput` names those that exist."""
        found = self.find(name)
        if found is None:
            names = [session.name for session in self.all()][:5]
            known = f"there are: {', '.join(names)}" if names else "there are none yet"
            raise BadInput(f"no session {name!r} in {self.database.path}; {known}")
        return found

    def all(self) -> list[StoredSession]:
        """All sessions, last used first."""
        return self._select("order by updated_at desc, id desc", [])

    def _select(self, rest: str, values: list[Any]) -> list[StoredSession]:
        columns = "id, name, model, vocabulary, settings, prompt, window_start, tokens, created_at, updated_at"
        # `rest` is one of this class's own literals
        query = f"select {columns} from sessions {rest}"  # noqa: S608
        rows = self.database.read(lambda tables: tables.conn.execute(query, values).fetchall())
        return [StoredSession(row[0], row[1], row[2], row[3], json.loads(row[4]), *row[5:]) for row in rows]

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
        count = len(ids) // 4
        moved = tables.conn.execute(
            "update sessions set tokens = ?, window_start = ?, updated_at = ? where id = ? and tokens = ?",
            [start + count, window_start, now(), session_id, start],
        )
        if moved.rowcount != 1:
            raise StorageError("this session was changed or removed by another process; open it again")
        if ids:
            tables.conn.execute("insert into runs values (?, ?, ?)", [session_id, start, ids])
        tables.conn.executemany(
            "insert into stream_passages values (?, ?, ?, ?, ?)",
            [(session_id, p.start, p.stop, p.first_char, p.last_char) for p in passages],
        )

    def stream(self, session_id: int) -> bytes:
        """All stream token ids, packed. Raises `StorageError` if a run is missing."""

        def query(tables: Tables) -> tuple[list[tuple[int, bytes]], int]:
            runs = "select start, ids from runs where session_id = ? order by start"
            length = "select tokens from sessions where id = ?"
            tables.conn.execute("begin")
            try:
                rows = tables.conn.execute(runs, [session_id]).fetchall()
                return rows, int((tables.conn.execute(length, [session_id]).fetchone() or [0])[0])
            finally:
                tables.conn.execute("rollback")

        rows, tokens = self.database.read(query)
        packed = b"".join(row[1] for row in rows)
        at = 0
        for start, ids in rows:
            if start != at:
                raise StorageError(f"the stream of session {session_id} has a gap at token {at}; restore a backup")
            at += len(ids) // 4
        if at != tokens:
            raise StorageError(f"the stream of session {session_id} has a gap at token {at}; restore a backup")
        return packed

    def passages(self, session_id: int) -> list[StreamPassage]:
        """The stream's passages, in order."""
        rows = self.database.read(
            lambda tables: tables.conn.execute(
                "select start, stop, first_char, last_char from stream_passages where session_id = ? order by start",
                [session_id],
            ).fetchall()
        )
        return [StreamPassage(*row) for row in rows]

    def add_answer(self, tables: Tables, session_id: int, kind: str, tokens: int, answer: dict[str, Any]) -> int:
        """Store an answer with its sources, inside the caller's transaction; returns its id."""
        if tables.conn.execute("select 1 from sessions where id = ?", [session_id]).fetchone() is None:
            raise StorageError("this session was removed meanwhile; its answer is not stored")
        row = [
            session_id, kind, answer["question"], answer["text"], tokens,
            json.dumps(answer["usage"]), json.dumps(answer["timing"]), json.dumps(answer["sources"]), now(),
        ]  # fmt: skip
        cursor = tables.conn.execute(
            "insert into answers (session_id, kind, question, text, tokens, usage, timing, sources, created_at) "
            "values (?, ?, ?, ?, ?, ?, ?, ?, ?)", row,
        )  # fmt: skip
        return int(cursor.lastrowid or 0)

    def answers(self, session_id: int, kind: str | None = None) -> list[dict[str, Any]]:
        """Stored answers, oldest first."""
        rows = self.database.read(
            lambda tables: tables.conn.execute(
                "select kind, question, text, tokens, usage, timing, sources, created_at from answers "
                "where session_id = ? and (? is null or kind = ?) order by id",
                [session_id, kind, kind],
            ).fetchall()
        )
        names = ("kind", "question", "text", "tokens", "usage", "timing", "sources", "created_at")
        return [
            {
                name: json.loads(value) if name in ("usage", "timing", "sources") else value
                for name, value in zip(names, row, strict=True)
            }
            for row in rows
        ]

    def last_texts(self, session_id: int, count: int) -> list[str]:
        """The texts of the last `count` answers, oldest first."""
        query = "select text from answers where session_id = ? order by id desc limit ?"
        rows = self.database.read(lambda tables: tables.conn.execute(query, [session_id, count]).fetchall())
        return [row[0] for row in reversed(rows)]

    def change(self, tables: Tables, session_id: int, settings: dict[str, Any]) -> None:
        """Store changed settings, inside the caller's transaction."""
        tables.conn.execute("update sessions set settings = ? where id = ?", [json.dumps(settings), session_id])

    def remove(self, tables: Tables, session_id: int) -> None:
        """Delete a session, its text and the blocks no other session holds, inside the caller's transaction."""
        tables.conn.execute(
            "delete from blocks where id in (select block_id from session_blocks where session_id = ?1) and not exists "
            "(select 1 from session_blocks s where s.block_id = blocks.id and s.session_id != ?1)",
            [session_id],
        )
        tables.conn.execute("delete from sessions where id = ?", [session_id])
