"""KV blocks: content-addressed rows with a byte budget. A cache: a bad or missing block only costs time."""

import hashlib
import shutil
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import xxhash
from sqlite_utils import Database as Tables

from longstride.storage.database import Database

MAX_BLOCK_BYTES = 900_000_000  # SQLite's limit for one value is 1,000,000,000 bytes
FREE_DISK_BYTES = 1 << 30  # never fill a disk below this with a cache
TOUCH_AFTER_S = 60.0


@dataclass(frozen=True)
class Block:
    """Rows to store. `id` names all that decided their values; `ids` and `positions` are packed 32-bit numbers."""

    id: bytes
    fingerprint: str
    ids: bytes
    positions: bytes
    data: bytes | memoryview


class Blocks:
    """The block table."""

    def __init__(self, database: Database, limit_bytes: int, free_disk_bytes: int = FREE_DISK_BYTES) -> None:
        self.database = database
        self.limit_bytes = limit_bytes
        self.free_disk_bytes = free_disk_bytes

    def put(
        self,
        tables: Tables,
        blocks: Iterable[Block],
        session_id: int | None = None,
        keep: Collection[bytes] | None = None,
    ) -> int:
        """Store blocks that are not there yet, inside the caller's transaction; returns how many were stored.

        `session_id`: whose text they hold; they go when the last session that holds them is removed. `keep`: which must
        not make room for them; without it none of that session's.

        The budget is checked before each write; least recently used blocks go first. A block that fits neither the
        budget nor the disk is left out.
        """
        exists = "select 1 from sessions where id = ?"
        if session_id is not None and tables.conn.execute(exists, [session_id]).fetchone() is None:
            return 0  # removed meanwhile: its text must not come back
        stored = 0
        used = self._used(tables)
        for block in blocks:
            size = len(block.data)
            if tables.conn.execute("select 1 from blocks where id = ?", [block.id]).fetchone():
                self._own(tables, session_id, [block.id])
                continue
            if size > min(self.limit_bytes, MAX_BLOCK_BYTES):
                continue
            if shutil.disk_usage(self.database.path.parent).free < self.free_disk_bytes + 2 * size:
                break
            used -= self._evict(tables, used + size - self.limit_bytes, session_id, keep)
            if used + size > self.limit_bytes:
                break  # what is left is this session's own beginning, worth more than its end
            row = [
                block.id, size, time.time(), block.fingerprint, block.ids, block.positions,
                xxhash.xxh3_128_digest(block.data), block.data,
            ]  # fmt: skip
            tables.conn.execute("insert into blocks values (?, ?, ?, ?, ?, ?, ?, ?)", row)
            self._own(tables, session_id, [block.id])
            used += size
            stored += 1
        return stored

    @staticmethod
    def _used(tables: Tables) -> int:
        return int(tables.conn.execute("select coalesce(sum(bytes), 0) from blocks").fetchone()[0])

    @staticmethod
    def _evict(tables: Tables, excess: int, session_id: int | None, keep: Collection[bytes] | None) -> int:
        """Delete least recently used blocks, none of `keep` (or of `session_id`'s own); returns the bytes freed."""
        if excess <= 0:
            return 0
        freed = 0
        oldest = (
            "select id, bytes from blocks where ? or id not in "
            "(select block_id from session_blocks where session_id is ?) order by used_at, rowid"
        )
        going = []
        for id_, size in tables.conn.execute(oldest, [keep is not None, session_id]):
            if freed >= excess:
                break
            if keep is None or id_ not in keep:
                going.append([id_])
                freed += size
        tables.conn.executemany("delete from blocks where id = ?", going)
        return freed

    def get(self, id_: bytes, fingerprint: str, ids: bytes, positions: bytes, size: int) -> tuple[bytes | None, str]:
        """(rows, "") of a sound block, else (None, what is wrong with it: "missing" or a reason to report)."""
        row = self.database.read(
            # cast: in a damaged row a value may be of any type
            lambda tables: tables.conn.execute(
                "select cast(fingerprint as blob), ids, positions, coalesce(cast(data as blob), x''), checksum "
                "from blocks where id = ?", [id_],
            ).fetchone()
        )  # fmt: skip
        if row is None:
            return None, "missing"
        problems = (
            (row[0] != fingerprint.encode(), "was made by another model"),
            (row[1] != ids, "holds other token ids"),
            (row[2] != positions, "holds other positions"),
            (len(row[3]) != size, f"has {len(row[3])} bytes instead of {size}"),
            (not _sound(row[3], row[4]), "fails its checksum"),
        )
        for wrong, why in problems:
            if wrong:
                return None, f"block {id_.hex()[:12]} {why}"
        return row[3], ""

    @staticmethod
    def _own(tables: Tables, session_id: int | None, ids: Iterable[bytes]) -> None:
        # session and block may have gone meanwhile; then there is nothing to own
        insert = (
            "insert or ignore into session_blocks "
            "select s.id, b.id from sessions s, blocks b where s.id = ? and b.id = ?"
        )
        tables.conn.executemany(insert, [(session_id, i) for i in ids])

    def touch(self, tables: Tables, ids: list[bytes], session_id: int | None = None) -> None:
        """Mark blocks as used now, and by `session_id`, inside the caller's transaction."""
        now = time.time()
        self._own(tables, session_id, ids)
        tables.conn.executemany(
            "update blocks set used_at = ? where id = ? and used_at < ?",
            [(now, i, now - TOUCH_AFTER_S) for i in ids],
        )

    def release(self, tables: Tables, ids: list[bytes], session_id: int) -> None:
        """`session_id` will not need these: delete those that no other session holds, in the caller's transaction."""
        tables.conn.executemany(
            "delete from session_blocks where session_id = ? and block_id = ?", [(session_id, i) for i in ids]
        )
        tables.conn.executemany(
            "delete from blocks where id = ?1 and not exists (select 1 from session_blocks where block_id = ?1)",
            [(i,) for i in ids],
        )

    def drop(self, tables: Tables, ids: Iterable[bytes]) -> None:
        """Delete blocks (unsound ones, so that sound ones can take their place)."""
        tables.conn.executemany("delete from blocks where id = ?", [(i,) for i in ids])

    def has(self, ids: list[bytes]) -> set[bytes]:
        """Which of `ids` are stored."""

        def query(tables: Tables) -> set[bytes]:
            found = (tables.conn.execute("select id from blocks where id = ?", [i]).fetchone() for i in ids)
            return {row[0] for row in found if row is not None}

        return self.database.read(query)

    def verify(self) -> list[str]:
        """What is wrong with any stored block, a sentence each."""

        def query(tables: Tables) -> list[str]:
            wrong = []
            rows = "select hex(id), coalesce(cast(data as blob), x''), checksum, bytes from blocks"
            for id_, data, checksum, size in tables.conn.execute(rows):
                if len(data) != size or not _sound(data, checksum):
                    name = id_.lower()[:12]
                    wrong.append(f"block {name} fails its checksum; it will be computed again when needed")
            return wrong

        return self.database.read(query)

    def usage(self) -> tuple[int, int]:
        """(blocks, bytes) stored."""
        row = self.database.read(
            lambda tables: tables.conn.execute("select count(*), coalesce(sum(bytes), 0) from blocks").fetchone()
        )
        return int(row[0]), int(row[1])


def _sound(data: bytes, checksum: object) -> bool:
    """Whether `checksum` is that of `data`: xxh3, an eighth of the work of the sha256 that earlier versions stored."""
    return xxhash.xxh3_128_digest(data) == checksum or hashlib.sha256(data).digest() == checksum
