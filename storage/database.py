"""One SQLite file: opening, migrations, the single writer thread, per-thread readers, errors in words."""

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from sqlite_utils import Database as Tables

from longstride.errors import StorageError, StorageUnavailable
from longstride.storage.schema import migrations

T = TypeVar("T")
BUSY_S = 10.0
UNAVAILABLE = ("full", "locked", "busy", "readonly", "disk I/O", "unable to open")  # in SQLite's words


class Database:
    """The file. Writes go through one thread, each as one immediate transaction; reads through a connection a thread.

    `write` and `read` take a function of a sqlite-utils database. A write either happens whole or not at all;
    `StorageError` says why not.
    """

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path = Path(path).expanduser()
        self._local = threading.local()
        self._connections: list[tuple[Tables, threading.RLock]] = []
        self._opening = threading.Lock()
        self._closed = False
        if not create and not self.path.exists():
            raise StorageError(f"there is no database {self.path}")
        try:
            # created by hand, so that nobody else can read it for even a moment
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise StorageError(f"the database {self.path} cannot be opened: {error.strerror}") from error
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="longstride-writer")
        try:
            self.write(self._migrate)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _migrate(self, tables: Tables) -> None:
        known = {migration.name for migration in migrations.pending(Tables(memory=True))}
        try:
            newer = {applied.name for applied in migrations.applied(tables)} - known
        except KeyError as error:  # sqlite-utils misses a column of its own table
            raise sqlite3.DatabaseError(f"malformed: no column {error}") from error
        if newer:
            raise StorageError(
                f"the database {self.path} was written by a newer Longstride ({', '.join(sorted(map(str, newer)))}); "
                "upgrade Longstride or name another file with --db"
            )
        migrations.apply(tables)

    def _tables(self) -> tuple[Tables, threading.RLock]:
        """This thread's connection, and the lock that keeps it from being closed while it is used."""
        own: tuple[Tables, threading.RLock] | None = getattr(self._local, "own", None)
        if own is None:
            with self._opening:
                if self._closed:
                    raise self._gone()
                own = self._local.own = self._connect(), threading.RLock()
                self._connections.append(own)
        return own

    def _connect(self) -> Tables:
        # each thread has its own connection; check_same_thread is off only so that close() can close them all
        connection = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        # damaged text is text that fails its checksum, and is not refused by Python before that can be said
        connection.text_factory = partial(str, encoding="utf-8", errors="replace")
        # blocks are megabytes, and a large value is a chain of pages; decides only how a new file is laid out
        connection.execute("PRAGMA page_size=16384")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA secure_delete=ON")
        return Tables(connection)

    def _gone(self) -> StorageError:
        return StorageError(f"the database {self.path} was closed")

    def _transaction(self, change: Callable[[Tables], T]) -> T:
        with self._words():
            tables, _ = self._tables()  # `close` waits for this thread
            # immediate: a deferred transaction that reads first fails at once when another process wrote meanwhile
            tables.conn.execute("BEGIN IMMEDIATE")
            try:
                result = change(tables)
                tables.conn.execute("COMMIT")
            except BaseException:
                if tables.conn.in_transaction:
                    tables.conn.execute("ROLLBACK")
                raise
            return result

    def submit(self, change: Callable[[Tables], T]) -> "Future[T]":
        """Queue a transaction on the writer thread."""
        if self._closed:
            raise self._gone()
        return self._writer.submit(self._transaction, change)

    def write(self, change: Callable[[Tables], T]) -> T:
        """Run a transaction and wait for it."""
        return self.submit(change).result()

    async def awrite(self, change: Callable[[Tables], T]) -> T:
        """The same without blocking the event loop; cancelling the wait does not undo the write."""
        return await asyncio.shield(asyncio.wrap_future(self.submit(change)))

    def read(self, query: Callable[[Tables], T]) -> T:
        """Run a query on this thread's connection. `StorageError` if the database is closed meanwhile."""
        with self._words():
            tables, lock = self._tables()
            with lock:
                if self._closed:
                    raise self._gone()
                try:
                    return query(tables)
                except sqlite3.OperationalError as error:
                    if self._closed:  # and interrupted for it
                        raise self._gone() from error
                    raise

    def snapshot(self, query: Callable[[Tables], T]) -> T:
        """`read` in one transaction: all that the query sees is of one moment."""

        def at_once(tables: Tables) -> T:
            tables.conn.execute("begin")
            try:
                return query(tables)
            finally:
                if tables.conn.in_transaction:
                    tables.conn.execute("rollback")

        return self.read(at_once)

    async def aread(self, query: Callable[[Tables], T]) -> T:
        """The same in a worker thread."""
        return await asyncio.to_thread(self.read, query)

    def _words(self) -> "_Words":
        return _Words(self.path)

    def check(self) -> list[str]:
        """SQLite's own checks: what is wrong, a sentence each, empty when sound."""

        def query(tables: Tables) -> list[str]:
            broken = [row[0] for row in tables.conn.execute("PRAGMA integrity_check") if row[0] != "ok"]
            lost = {(row[0], row[2]) for row in tables.conn.execute("PRAGMA foreign_key_check")}
            return [
                *(f"SQLite finds damage ({' '.join(text.split())}); restore a backup" for text in broken),
                *(f"rows of {child} belong to nothing in {parent}; restore a backup" for child, parent in sorted(lost)),
            ]

        return self.read(query)

    def close(self) -> None:
        """Finish queued writes, break off reads that other threads are at, and close all connections."""
        with self._opening:
            if self._closed:
                return
            self._closed = True
        self._writer.shutdown(wait=True)
        for tables, lock in self._connections:
            # closing a connection that another thread is using is a crash, not an error
            while not lock.acquire(timeout=0.02):
                tables.conn.interrupt()
            tables.conn.close()
            lock.release()


class _Words:
    """Turns SQLite's errors into `StorageError` sentences; that something is there already is the caller's affair."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, UnicodeDecodeError):
            # from Python's sqlite3, when what SQLite says quotes a damaged schema
            error = sqlite3.DatabaseError("malformed")
        foreign = isinstance(error, sqlite3.IntegrityError) and "FOREIGN KEY" in str(error)
        if foreign or (isinstance(error, sqlite3.Error) and not isinstance(error, sqlite3.IntegrityError)):
            text, kind = str(error), StorageError
            if any(words in text for words in UNAVAILABLE):
                kind = StorageUnavailable
            if foreign:
                hint = "what this belongs to was removed meanwhile, or is damaged (`longstride sessions verify` tells)"
            elif "full" in text:
                hint = "the disk is full; free some space and try again (what was saved before is unharmed)"
            elif "locked" in text or "busy" in text:
                hint = f"another process has been writing for more than {BUSY_S:.0f} s; try again"
            elif any(words in text for words in ("not a database", "malformed", "unsupported file format")):
                hint = "this is not a sound SQLite file; restore a backup or name another file with --db"
            elif "readonly" in text:
                hint = "the file is read-only; change its permissions or name another file with --db"
            else:
                hint = f"{text}; if it was in order before, it is damaged: restore a backup or name another with --db"
            raise kind(f"the database {self.path} could not be used: {hint}") from error
