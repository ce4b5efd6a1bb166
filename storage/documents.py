"""Documents, their passages, and the collections that hold them."""

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from sqlite_utils import Database as Tables

from longstride.errors import BadInput, StorageError
from longstride.storage.checksum import checksum
from longstride.storage.database import Database
from longstride.storage.sessions import now

T = TypeVar("T")
DEFAULT = "default"  # the collection of a document that is added without naming one
# what belongs to no document in a collection: only damage leaves such rows
ORPHANS = (
    "collections where not exists (select 1 from documents where id = document_id)",
    "documents where not exists (select 1 from collections where document_id = documents.id)",
    "passages where not exists (select 1 from documents where id = document_id)",
)
Revision = tuple[int, int]  # memberships, and the largest id among them


def is_collection(name: str) -> bool:
    """Whether a collection can have this name: 1 to 100 printable characters."""
    return bool(name.strip()) and len(name) <= 100 and name.isprintable()


def check_collection(name: str) -> None:
    """Raises `BadInput` unless a collection can have this name."""
    if not is_collection(name):
        raise BadInput(f"a collection needs a name of 1 to 100 printable characters, not {name!r}")


@dataclass(frozen=True)
class StoredDocument:
    """A document in a collection, without its text. Name and path are what it was added under there."""

    id: str
    collection: str
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


@dataclass(frozen=True)
class Members:
    """`passages`: (collection, passage id), of all memberships (`whole`) or of those added since another revision."""

    revision: Revision
    whole: bool
    passages: list[tuple[str, int]]


class Documents:
    """The document tables. A text is stored once, with its passages, and may be in several collections."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._sound: set[int] = set()  # ids of memberships that were checked

    @staticmethod
    def identity(text: str) -> str:
        """A document's id: the hash of its text, so the same text is stored once."""
        return hashlib.sha256(text.encode()).hexdigest()

    def exists(self, id_: str, collection: str = DEFAULT) -> bool:
        """Whether a document with this text is in the collection."""
        query = "select 1 from collections where document_id = ? and collection = ?"
        row = self.database.read(lambda tables: tables.conn.execute(query, [id_, collection]).fetchone())
        return row is not None

    def add(
        self,
        tables: Tables,
        name: str,
        path: str | None,
        text: str,
        spans: list[tuple[int, int]],
        collection: str = DEFAULT,
    ) -> list[int]:
        """Put a document into a collection, inside the caller's transaction; returns its passages' ids.

        One of the same path there is an older version of it, and goes. A text that another collection holds keeps the
        passages it has.
        """
        id_ = self.identity(text)
        self.replace(tables, id_, path, collection)
        known = tables.conn.execute("select id from collections where document_id = ?", [id_]).fetchall()
        for (membership,) in known:
            self._check(tables, membership)  # or what is damaged would become right by what follows
        if not known:
            tables.conn.execute("delete from documents where id = ?", [id_])  # damaged, or it would be in a collection
            tables.conn.execute("insert into documents (id, text, characters) values (?, ?, ?)", [id_, text, len(text)])
            insert = "insert into passages (document_id, start, stop) values (?, ?, ?)"
            tables.conn.executemany(insert, [(id_, a, b) for a, b in spans])
        added = tables.conn.execute(
            "insert into collections (collection, document_id, name, path, added_at) values (?, ?, ?, ?, ?)",
            [collection, id_, name, path, now()],
        )
        self._seal(tables, int(added.lastrowid or 0))
        if path is not None:
            self.forget(tables, path)
        rows = tables.conn.execute("select id from passages where document_id = ? order by id", [id_])
        return [int(row[0]) for row in rows.fetchall()]

    @staticmethod
    def _seal(tables: Tables, membership: int) -> None:
        """Give a row that was written in this transaction its checksum."""
        seal = checksum("document", *_sealed(tables, membership))
        tables.conn.execute("update collections set checksum = ? where id = ?", [seal, membership])

    @staticmethod
    def versions(tables: Tables, path: str | None, collection: str = DEFAULT) -> list[str]:
        """The ids of a collection's documents that were added from `path`."""
        query = "select document_id from collections where path = ? and collection = ?"
        return [str(row[0]) for row in tables.conn.execute(query, [path, collection]).fetchall()]

    def replace(self, tables: Tables, id_: str, path: str | None, collection: str) -> None:
        """Remove what was added from `path` but this document, inside the caller's transaction."""
        for older in self.versions(tables, path, collection):
            if older != id_:
                self.remove(tables, older, collection)

    def stands_at(self, id_: str, path: str, collection: str) -> bool:
        """Whether all that is known of a file is that it holds this document."""
        failed = "select 1 from failures where path = ?"
        return self.database.read(
            lambda tables: (
                self.versions(tables, path, collection) == [id_]
                and tables.conn.execute(failed, [path]).fetchone() is None
            )
        )

    def found_at(self, tables: Tables, id_: str, name: str, path: str, collection: str) -> None:
        """A collection's document is also what stands at `path`, inside the caller's transaction: an older version that
        was there goes, and the document is called so from now on, as its former path may hold something else."""
        self.replace(tables, id_, path, collection)
        query = "select id from collections where document_id = ? and collection = ?"
        for (membership,) in tables.conn.execute(query, [id_, collection]).fetchall():
            self._check(tables, membership)
            tables.conn.execute("update collections set name = ?, path = ? where id = ?", [name, path, membership])
            self._seal(tables, membership)
        self.forget(tables, path)

    def fail(self, tables: Tables, path: str, reason: str) -> None:
        """Record a file that could not be added."""
        tables.conn.execute("insert or replace into failures values (?, ?, ?)", [path, reason, now()])

    @staticmethod
    def forget(tables: Tables, path: str) -> None:
        """Forget that a file could not be added."""
        tables.conn.execute("delete from failures where path = ?", [path])

    def failures(self) -> list[tuple[str, str, str]]:
        """(path, reason, when) of files that could not be added."""
        return self.database.read(
            lambda tables: tables.conn.execute("select path, reason, at from failures order by at, path").fetchall()
        )

    def all(self, collection: str | None = None) -> list[StoredDocument]:
        """The documents of a collection, oldest first; with None those of all collections, each once a collection."""
        query = (
            # damaged ones too, whatever their types have become, so that they can be removed
            "select cast(c.document_id as text), cast(c.collection as text), cast(c.name as text), "
            "cast(c.path as text), coalesce(cast(d.characters as integer), 0), "
            "(select count(*) from passages where document_id = d.id), cast(c.added_at as text) "
            "from collections c left join documents d on d.id = c.document_id "
            "where ?1 is null or c.collection = ?1 order by c.added_at, c.name, c.collection"
        )
        rows = self.database.read(lambda tables: tables.conn.execute(query, [collection]).fetchall())
        return [StoredDocument(*row) for row in rows]

    def find(self, name: str, collection: str = DEFAULT) -> StoredDocument:
        """A collection's document by path, name or beginning of its id; `BadInput` when there is none or several."""
        documents = self.all(collection)
        found = [d for d in documents if d.path == name] or [
            d for d in documents if d.name == name or (len(name) >= 6 and d.id.startswith(name))
        ]
        if len(found) != 1:
            what = "no document" if not found else f"{len(found)} documents"
            raise BadInput(
                f"{what} named {name!r} in collection {collection!r}; `longstride docs list` shows paths and ids"
            )
        return found[0]

    def remove(self, tables: Tables, id_: str, collection: str = DEFAULT) -> None:
        """Take a document out of a collection, inside the caller's transaction. When it was in no other, it is deleted
        with its passages; a damaged one takes along what belongs to no document any more."""
        unsound = self._unsound(tables, id_, collection)
        if unsound:
            for table in ("collections", "documents", "passages"):
                tables.conn.execute(f"reindex {table}")  # the rows may differ from what the indexes say of them
        tables.conn.execute("delete from collections where document_id = ? and collection = ?", [id_, collection])
        last = "delete from documents where id = ?1 and not exists (select 1 from collections where document_id = ?1)"
        if tables.conn.execute(last, [id_]).rowcount:
            tables.conn.execute("delete from indexes")  # it holds the document's words
        if unsound:
            for what in (*ORPHANS, "indexes"):
                tables.conn.execute(f"delete from {what}")  # noqa: S608

    def passages(self, after: int = 0) -> list[StoredPassage]:
        """All passages with an id above `after`, in id order."""
        query = "select id, document_id, start, stop from passages where id > ? order by id"
        return self._passages(query, [after], None)

    def some(self, ids: list[int], collections: Collection[str] | None = None) -> dict[int, StoredPassage]:
        """The passages of these ids, as far as they are (still) stored in one of `collections` (None: in any).

        A document goes by the name it has there, where it came first.
        """
        query = "select id, document_id, start, stop from passages where id = ?"
        found = {passage.id: passage for passage in self._passages(query, ids, collections)}
        if len(found) < len(ids):
            self.database.snapshot(self._check_all)  # was something removed meanwhile, or is it damaged?
        return found

    def _passages(self, query: str, values: list[int], collections: Collection[str] | None) -> list[StoredPassage]:
        """What `query` gives for each of `values`, with their texts."""
        allowed = None if collections is None else json.dumps(list(collections))
        membership = (
            "select id from collections where document_id = ?1 "
            "and (?2 is null or collection in (select value from json_each(?2))) order by id limit 1"
        )

        def read(tables: Tables) -> "list[StoredPassage]":
            spans = [span for value in values for span in tables.conn.execute(query, [value]).fetchall()]
            wanted = {span[1] for span in spans}
            rows = {id_: tables.conn.execute(membership, [id_, allowed]).fetchone() for id_ in wanted}
            texts = {id_: self._text(tables, row[0]) for id_, row in rows.items() if row is not None}
            if collections is None and len(texts) < len(wanted):
                self._check_all(tables)
            # sliced here: SQLite's substr stops at a NUL character
            return [
                StoredPassage(id_, document_id, texts[document_id][0], a, b, texts[document_id][1][a:b])
                for id_, document_id, a, b in spans
                if document_id in texts
            ]

        return self.database.snapshot(read)

    # --- checking ---

    def _check(self, tables: Tables, membership: int) -> None:
        """Raises `StorageError` if a document is not what was put into a collection; its text apart."""
        if membership in self._sound:
            return
        row = _sealed(tables, membership)
        (seal,) = _row(tables, "checksum", membership)
        if seal != checksum("document", *row):
            raise _damaged(row)
        self._sound.add(membership)

    def _text(self, tables: Tables, membership: int) -> tuple[str, str]:
        """(name, text) of a document in a collection. Raises `StorageError` if it is not what was put there."""
        self._check(tables, membership)
        id_, name, text = _row(tables, "document_id, name, coalesce(cast(text as text), '')", membership)
        if self.identity(text) != id_:
            raise _damaged(_sealed(tables, membership))
        return name, text

    def _check_all(self, tables: Tables) -> None:
        """Raises `StorageError` if any document is damaged, its text apart, or something belongs to none."""
        self._sound.clear()
        for table in ("collections", "passages"):
            # their rows are found by indexes
            if tables.conn.execute(f"pragma integrity_check({table})").fetchall() != [("ok",)]:
                raise _broken(table)
        for (membership,) in tables.conn.execute("select id from collections order by id").fetchall():
            self._check(tables, membership)
        self._check_places(tables)

    def _check_places(self, tables: Tables) -> None:
        if any(tables.conn.execute(f"select 1 from {what} limit 1").fetchone() for what in ORPHANS):  # noqa: S608
            raise StorageError(
                f"a document in {self.database.path} has lost its place in a collection; add again what "
                "`longstride docs list` does not show, or restore a backup"
            )

    def _unsound(self, tables: Tables, id_: str, collection: str) -> bool:
        """Whether a document is not in a collection as it was put there; its text apart."""
        query = "select id from collections where +document_id = ? and collection = ?"  # + : not by index
        found = tables.conn.execute(query, [id_, collection]).fetchall()
        try:
            for (membership,) in found:
                self._check(tables, membership)
        except StorageError:
            return True
        return not found

    def verify(self) -> list[str]:
        """What is damaged, a sentence each; reads all text."""
        self._sound.clear()

        def read(tables: Tables) -> list[str]:
            memberships = tables.conn.execute("select id from collections order by id").fetchall()
            checks: list[Callable[[Tables], object]] = [
                self._check_places,
                *(partial(self._text, membership=row[0]) for row in memberships),
            ]
            return [problem for check in checks if (problem := _problem(check, tables))]

        return self.database.snapshot(read)

    def count(self) -> int:
        """Passages stored."""
        row = self.database.read(lambda tables: tables.conn.execute("select count(*) from passages").fetchone())
        return int(row[0])

    def revision(self) -> Revision:
        """Changes whenever a document was put into a collection or taken out of one. Cheap."""
        return self.database.read(_revision)

    def members(self, since: Revision = (0, 0)) -> Members:
        """Whose the passages are: what was added since `since`, or everything when a document left a collection."""
        added = "select count(*) from collections where id > ?"
        passages = "select collection, p.id from collections c join passages p using (document_id) where c.id > ?"

        def read(tables: Tables) -> Members:
            count, last = since
            revision = _revision(tables)
            whole = revision[0] - tables.conn.execute(added, [last]).fetchone()[0] != count
            if since == (0, 0):
                self._check_all(tables)
            for (membership,) in tables.conn.execute("select id from collections where id > ?", [last]).fetchall():
                self._check(tables, membership)
            rows = tables.conn.execute(passages, [0 if whole else last]).fetchall()
            return Members(revision, whole, rows)

        return self.database.snapshot(read)


def _revision(tables: Tables) -> Revision:
    query = "select (select count(*) from collections), (select coalesce(max(id), 0) from collections)"
    count, last = tables.conn.execute(query).fetchone()
    return count, last


def _row(tables: Tables, columns: str, membership: int) -> tuple[Any, ...]:
    """Columns of a document in a collection."""
    query = f"select {columns} from collections c left join documents d on d.id = document_id where c.id = ?"  # noqa: S608
    row: tuple[Any, ...] | None = tables.conn.execute(query, [membership]).fetchone()
    if row is None:  # it was listed a moment ago
        raise _broken("collections")
    return row


def _sealed(tables: Tables, membership: int) -> tuple[Any, ...]:
    """What the checksum of a document in a collection covers. Its id covers its text."""
    row = _row(tables, "c.id, collection, document_id, name, path, added_at, characters", membership)
    spans = "select id, start, stop from passages where document_id = ? order by id"
    return (*row, tables.conn.execute(spans, [row[2]]).fetchall())


def _broken(table: str) -> StorageError:
    return StorageError(f"the table {table} is damaged; restore a backup (`longstride sessions verify` says more)")


def _damaged(sealed: tuple[Any, ...]) -> StorageError:
    _, collection, id_, name, *_ = sealed
    where = "" if collection == DEFAULT else f" --collection {collection!r}"
    return StorageError(
        f"document {name!r} ({str(id_)[:12]}) is damaged; restore a backup, or remove it with "
        f"`longstride docs remove {str(id_)[:12]}{where}` and add it again"
    )


def _problem(check: Callable[[Tables], object], tables: Tables) -> str:
    try:
        check(tables)
    except StorageError as error:
        return str(error)
    return ""
