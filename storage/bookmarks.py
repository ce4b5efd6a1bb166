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
        found = None
        for row in self._rows("where session_id = ?", [session_id]):
            if not _sound(row):
                raise StorageError(f"{_damaged(row)}; `longstride read --again` does without it")
            if row[1] == name:
                found = Bookmark(*row[2:5])
        return found

    @staticmethod
    def put(tables: Tables, session_id: int, name: str, bookmark: Bookmark) -> None:
        """Set a bookmark, inside the caller's transaction."""
        row = [session_id, name, bookmark.characters, bookmark.tokens, bookmark.digest]
        tables.conn.execute(
            "insert or replace into bookmarks values (?, ?, ?, ?, ?, ?)",
            [*row, checksum("bookmark", *row)],
        )

    def verify(self) -> list[str]:
        """What is damaged, a sentence each."""
        return [_damaged(row) for row in self._rows() if not _sound(row)]

    def _rows(self, which: str = "", values: list[int] | None = None) -> list[tuple[Any, ...]]:
        query = f"select {COLUMNS} from bookmarks {which}"  # noqa: S608
        return self.database.read(lambda tables: tables.conn.execute(query, values or []).fetchall())


def _sound(row: tuple[Any, ...]) -> bool:
    return bool(checksum("bookmark", *row[:-1]) == row[-1])


def _damaged(row: tuple[Any, ...]) -> str:
    return f"how far {row[1]!r} was read into session number {row[0]} is not what was stored"
