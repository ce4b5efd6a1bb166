"""Documents and their passages."""

import hashlib
from dataclasses import dataclass

from sqlite_utils import Database as Tables

from longstride.errors import BadInput
from longstride.storage.database import Database
from longstride.storage.sessions import now


@dataclass(frozen=True)
class StoredDocument:
    """A document's row, without its text."""

    id: str
    name: str
    path: str | None
    characters: int
    passages: int
    added_at: str


@dataclass(frozen=True)
class StoredPassage:
    """A passage with its text and where it stands in its document."""

    id: int
    document_id: str
    document: str
    start: int
    stop: int
    text: str


class Documents:
    """The document tables."""

    def __init__(self, database: Database) -> None:
        self.database = database

    @staticmethod
    def identity(text: str) -> str:
        """A document's id: the hash of its text, so the same text is stored once."""
        return hashlib.sha256(text.encode()).hexdigest()

    def exists(self, id_: str) -> bool:
        """Whether a document with this text is stored."""
        query = "select 1 from documents where id = ?"
        return self.database.read(lambda tables: tables.conn.execute(query, [id_]).fetchone()) is not None

    def add(self, tables: Tables, name: str, path: str | None, text: str, spans: list[tuple[int, int]]) -> list[int]:
        """Store a document and its passages, inside the caller's transaction; returns the passages' ids."""
        id_ = self.identity(text)
        tables.conn.execute(
            "insert into documents values (?, ?, ?, ?, ?, ?)", [id_, name, path, text, len(text), now()]
        )
        insert = "insert into passages (document_id, start, stop) values (?, ?, ?)"
        ids = [int(tables.conn.execute(insert, [id_, a, b]).lastrowid or 0) for a, b in spans]
        if path is not None:
            tables.conn.execute("delete from failures where path = ?", [path])
        return ids

    def fail(self, tables: Tables, path: str, reason: str) -> None:
        """Record a file that could not be added."""
        tables.conn.execute("insert or replace into failures values (?, ?, ?)", [path, reason, now()])

    def failures(self) -> list[tuple[str, str, str]]:
        """(path, reason, when) of files that could not be added."""
        return self.database.read(
            lambda tables: tables.conn.execute("select path, reason, at from failures order by at, path").fetchall()
        )

    def all(self) -> list[StoredDocument]:
        """All documents, oldest first."""
        query = (
            "select d.id, name, path, characters, (select count(*) from passages where document_id = d.id), added_at "
            "from documents d order by added_at, name"
        )
        return [
            StoredDocument(*row) for row in self.database.read(lambda tables: tables.conn.execute(query).fetchall())
        ]

    def find(self, name: str) -> StoredDocument:
        """A document by name or by the beginning of its id; `BadInput` when there is none or several."""
        found = [d for d in self.all() if d.name == name or (len(name) >= 6 and d.id.startswith(name))]
        if len(found) != 1:
            what = "no document" if not found else f"{len(found)} documents"
            raise BadInput(f"{what} named {name!r}; `longstride docs list` shows names and ids")
        return found[0]

    def remove(self, tables: Tables, id_: str) -> None:
        """Delete a document and its passages, inside the caller's transaction."""
        tables.conn.execute("delete from documents where id = ?", [id_])
        tables.conn.execute("delete from indexes")  # it holds the document's words

    def passages(self, after: int = 0) -> list[StoredPassage]:
        """All passages with an id above `after`, in id order."""
        query = "select id, document_id, start, stop from passages where id > ? order by id"
        return self._passages(query, [after])

    def some(self, ids: list[int]) -> dict[int, StoredPassage]:
        """The passages of these ids, as far as they are (still) stored."""
        query = "select id, document_id, start, stop from passages where id = ?"
        return {passage.id: passage for passage in self._passages(query, ids)}

    def _passages(self, query: str, values: list[int]) -> list[StoredPassage]:
        """What `query` gives for each of `values`, with their texts."""

        def read(tables: Tables) -> "list[StoredPassage]":
            # one read transaction, so that all queries see the same documents
            tables.conn.execute("begin")
            try:
                spans = [span for value in values for span in tables.conn.execute(query, [value]).fetchall()]
                wanted = {row[1] for row in spans}
                rows = (
                    tables.conn.execute("select id, name, text from documents where id = ?", [i]).fetchone()
                    for i in wanted
                )
                texts = {row[0]: row[1:] for row in rows}
            finally:
                tables.conn.execute("rollback")
            # sliced here: SQLite's substr stops at a NUL character
            return [
                StoredPassage(id_, document, texts[document][0], a, b, texts[document][1][a:b])
                for id_, document, a, b in spans
            ]

        return self.database.read(read)

    def count(self) -> int:
        """Passages stored."""
        row = self.database.read(lambda tables: tables.conn.execute("select count(*) from passages").fetchone())
        return int(row[0])

    def revision(self) -> tuple[int, int]:
        """(documents, largest passage id): changes whenever a document was added or removed. Cheap."""
        query = "select (select count(*) from documents), (select coalesce(max(id), 0) from passages)"
        row = self.database.read(lambda tables: tables.conn.execute(query).fetchone())
        return int(row[0]), int(row[1])
