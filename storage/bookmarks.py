"""Bookmarks: how far a file was read into a session, so that reading it again goes on there."""

from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database as Tables

from longstride.errors import StorageError
from longstride.storage.checksum import checksum
from longstride.storage.database import Database

COLUMNS = "session_id, name, characters, tokens, digest, checksum"


@dataclass(frozen=True)
class Bookmark:
    """`characters` of a text were read, and `tokens` of what follows them; `digest` is the hash of both."""

    characters: int
    tokens: int
    digest: bytes


class Bookmarks:
    """The table of bookmarks."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def get(self, session_id: int, name: str) -> Bookmark | None:
        """A session's bookmark in the text called `name`. Raises `StorageError` if one of its bookmarks is damaged."""
        return self.database.read(lambda tables: self.at(tables, session_id, name))

    @staticmethod
    def at(tables: Tables, session_id: int, name: str) -> Bookmark | None:
        """`get`, inside the caller's transaction."""
        found = None
        for row in _rows(tables, session_id):
            if not _sound(row):
                raise StorageError(f"{_damaged(tables, row)}; `longstride read --again` does without it")
            if row[1] == name:
                found = Bookmark(*row[2:5])
        return found

    @staticmethod
    def put(tables: Tables, session_id: int, name: str, bookmark: Bookmark) -> None:
        """Set a bookmark, inside the caller's transaction."""
        row = [session_id, name, bookmark.characters, bookmark.tokens, bookmark.digest]
        tables.conn.execute(
            "insert or replace into bookmarks values (?, ?, ?, ?, ?, ?)", [*row, checksum("bookmark", *row)]
        )

    @staticmethod
    def mend(tables: Tables, session_id: int) -> None:
        """Remove a session's damaged bookmarks, inside the caller's transaction."""
        for row in _rows(tables, session_id):
            if not _sound(row):
                tables.conn.execute("delete from bookmarks where session_id = ? and name is ?", [session_id, row[1]])

    def verify(self) -> list[str]:
        """What is damaged, a sentence each."""

        def check(tables: Tables) -> list[str]:
            return [_damaged(tables, row) for row in _rows(tables) if not _sound(row)]

        return self.database.read(check)


def _rows(tables: Tables, session_id: int | None = None) -> list[tuple[Any, ...]]:
    query = f"select {COLUMNS} from bookmarks where ?1 is null or session_id = ?1"  # noqa: S608
    return tables.conn.execute(query, [session_id]).fetchall()


def _sound(row: tuple[Any, ...]) -> bool:
    return bool(checksum("bookmark", *row[:-1]) == row[-1])


def _damaged(tables: Tables, row: tuple[Any, ...]) -> str:
    session = tables.conn.execute("select name from sessions where id = ?", [row[0]]).fetchone()
    whose = "a session that is not there" if session is None else f"session {session[0]!r}"
    return f"how far {row[1]!r} was read into {whose} is not what was stored"
