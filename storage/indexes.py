"""Stored search indexes: derived data that saves time, checked before use and rebuilt when it does not fit."""

import hashlib
from dataclasses import dataclass

from sqlite_utils import Database as Tables

from longstride.storage.database import Database

MAX_INDEX_BYTES = 900_000_000  # SQLite's limit for one value is 1,000,000,000 bytes


@dataclass(frozen=True)
class StoredIndex:
    """An index over `count` passages, the last of id `last`. `format` names what `data` means."""

    format: str
    count: int
    last: int
    data: bytes


class Indexes:
    """The table of indexes. The one over the documents goes when a document is removed, as it holds its words."""

    def __init__(self, database: Database) -> None:
        self.database = database

    @staticmethod
    def put(tables: Tables, index: StoredIndex) -> None:
        """Store the documents' index, inside the caller's transaction, if it still fits what is stored."""
        if len(index.data) > MAX_INDEX_BYTES or not Indexes._fits(tables, index):
            return
        checksum = hashlib.sha256(index.data).digest()
        row = [index.format, index.count, index.last, checksum, index.data]
        tables.conn.execute("delete from indexes")
        tables.conn.execute("insert into indexes values (?, ?, ?, ?, ?)", row)

    @staticmethod
    def _fits(tables: Tables, index: StoredIndex) -> bool:
        count = tables.conn.execute("select count(*) from passages where id <= ?", [index.last]).fetchone()[0]
        return bool(count == index.count)

    def get(self, kind: str) -> StoredIndex | None:
        """The documents' index, or None when there is none of this format that is sound and fits what is stored."""

        def query(tables: Tables) -> StoredIndex | None:
            # cast: in a damaged row a value may be of any type
            query = (
                "select format, count, last, coalesce(cast(data as blob), x''), checksum from indexes where format = ?"
            )
            row = tables.conn.execute(query, [kind]).fetchone()
            if row is None or hashlib.sha256(row[3]).digest() != row[4]:
                return None
            index = StoredIndex(*row[:4])
            return index if self._fits(tables, index) else None

        return self.database.read(query)
