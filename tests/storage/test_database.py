"""The file: migrations, refusals, whole transactions, several writers, a full disk."""

import sqlite3
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from longstride.errors import StorageError
from longstride.storage.database import Database


@pytest.fixture
def database(tmp_path):
    opened = Database(tmp_path / "t.db")
    yield opened
    opened.close()


def fail(database, path, reason="reason"):
    """Insert one small row; any table would do."""
    return database.write(
        lambda tables: tables.conn.execute("insert into failures values (?, ?, 'at')", [path, reason])
    )


def paths(database):
    rows = database.read(lambda tables: tables.conn.execute("select path from failures order by path").fetchall())
    return [row[0] for row in rows]


def migrations_of(path):
    connection = sqlite3.connect(path)
    rows = connection.execute("select name, applied_at from _sqlite_migrations order by id").fetchall()
    connection.close()
    return rows


def test_migrations_are_applied_once(tmp_path):
    path = tmp_path / "t.db"
    database = Database(path)
    fail(database, "kept")
    database.close()
    applied = migrations_of(path)
    assert [name for name, _ in applied] == sorted({name for name, _ in applied})
    again = Database(path)
    assert paths(again) == ["kept"]
    assert again.check() == []
    again.close()
    assert migrations_of(path) == applied


def test_many_can_open_a_new_file_at_once(tmp_path):
    path = tmp_path / "t.db"
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: Database(path), range(4)))
    for database in opened:
        assert paths(database) == []
        database.close()
    names = [name for name, _ in migrations_of(path)]
    assert len(names) == len(set(names))


def make_newer(path):
    """A database as a later Longstride would leave it."""
    Database(path).close()
    connection = sqlite3.connect(path)
    connection.execute("insert into _sqlite_migrations values (99, 'longstride', '9999_future', 'tomorrow')")
    connection.commit()
    connection.close()


def test_a_database_of_a_newer_version_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "newer.db"
    make_newer(path)
    before = migrations_of(path)
    with pytest.raises(StorageError, match=r"newer\.db was written by a newer Longstride \(9999_future\)"):
        Database(path)
    assert migrations_of(path) == before


@pytest.mark.parametrize("content", [b"some notes\n", b"SQLite format 3\x00" + bytes(range(256)) * 40])
def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"notes\.txt could not be used: this is not a sound SQLite file"):
        Database(path)
    assert path.read_bytes() == content


def test_a_folder_and_a_missing_folder_are_refused(tmp_path):
    with pytest.raises(StorageError, match="cannot be opened: Is a directory"):
        Database(tmp_path)
    with pytest.raises(StorageError, match="cannot be opened: No such file or directory"):
        Database(tmp_path / "nowhere" / "t.db")


def test_only_the_owner_can_read_the_files(tmp_path, database):
    fail(database, "something in the write-ahead log")
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert found == dict.fromkeys(["t.db", "t.db-wal", "t.db-shm"], 0o600)


def test_a_failing_write_is_rolled_back_whole(database):
    fail(database, "before")

    def change(tables):
        tables.conn.execute("insert into failures values ('half', 'r', 'at')")
        tables.conn.execute("insert into failures values ('before', 'r', 'at')")

    with pytest.raises(sqlite3.IntegrityError):
        database.write(change)

    def interrupt(tables):
        tables.conn.execute("insert into failures values ('half', 'r', 'at')")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        database.write(interrupt)
    assert paths(database) == ["before"]
    fail(database, "after")
    assert paths(database) == ["after", "before"]


async def test_the_asynchronous_faces_do_the_same(database):
    await database.awrite(lambda tables: tables.conn.execute("insert into failures values ('a', 'r', 'at')"))
    query = "select path from failures"
    assert await database.aread(lambda tables: tables.conn.execute(query).fetchall()) == [("a",)]
    with pytest.raises(StorageError, match="no such table"):
        await database.awrite(lambda tables: tables.conn.execute("insert into nowhere values (1)"))


def test_two_databases_on_one_file_both_write(tmp_path):
    one, two = Database(tmp_path / "t.db"), Database(tmp_path / "t.db")
    count = 40

    def read_then_write(database, name):
        """A read before the write is what makes a deferred transaction fail."""

        def change(tables):
            tables.conn.execute("select count(*) from failures").fetchone()
            tables.conn.execute("insert into failures values (?, 'r', 'at')", [name])

        database.write(change)

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(read_then_write, d, f"{k} {i:02}") for i in range(count) for k, d in ((1, one), (2, two))]
        for job in jobs:
            job.result()
    assert len(paths(one)) == 2 * count
    assert paths(one) == paths(two)
    one.close()
    two.close()


def test_a_writer_waits_for_another_process(tmp_path, database):
    holder = sqlite3.connect(tmp_path / "t.db", isolation_level=None)
    holder.execute("begin immediate")
    late = database.submit(lambda tables: tables.conn.execute("insert into failures values ('late', 'r', 'at')"))
    with pytest.raises(TimeoutError):
        late.result(timeout=0.3)
    holder.execute("commit")
    holder.close()
    late.result()
    assert paths(database) == ["late"]


def test_a_writer_that_waits_too_long_says_so(tmp_path, database):
    database.write(lambda tables: tables.conn.execute("PRAGMA busy_timeout = 50"))
    holder = sqlite3.connect(tmp_path / "t.db", isolation_level=None)
    holder.execute("begin immediate")
    with pytest.raises(StorageError, match="another process has been writing"):
        fail(database, "late")
    holder.close()
    assert paths(database) == []


def test_a_full_disk_says_so_and_harms_nothing(database):
    fail(database, "before", "x" * 5000)
    set_limit = "PRAGMA max_page_count = {}"
    pages = database.read(lambda tables: tables.conn.execute("PRAGMA page_count").fetchone()[0])
    database.write(lambda tables: tables.conn.execute(set_limit.format(pages + 2)))
    with pytest.raises(StorageError, match=r"t\.db could not be used: the disk is full"):
        fail(database, "too much", "x" * 100_000)
    assert paths(database) == ["before"]
    assert database.check() == []
    fail(database, "small")
    database.write(lambda tables: tables.conn.execute(set_limit.format(1 << 30)))
    fail(database, "too much", "x" * 100_000)
    assert paths(database) == ["before", "small", "too much"]


def test_a_closed_database_refuses(tmp_path):
    database = Database(tmp_path / "t.db")
    queued = [database.submit(lambda tables: tables.conn.execute("select 1").fetchone()) for _ in range(5)]
    paths(database)
    database.close()
    database.close()
    assert [future.result() for future in queued] == [(1,)] * 5
    with pytest.raises(StorageError, match="closed"):
        fail(database, "late")
    with pytest.raises(StorageError, match="closed"):
        paths(database)
    with ThreadPoolExecutor(1) as pool, pytest.raises(StorageError, match="closed"):
        pool.submit(paths, database).result()


def test_closing_breaks_off_what_other_threads_read(tmp_path):
    """A connection that is closed under a running statement is a crash of the process, no error."""
    database = Database(tmp_path / "t.db")
    endless = "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n"
    reading = threading.Event()

    def read(tables):
        reading.set()
        return tables.conn.execute(endless).fetchone()

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(database.read, read)
        reading.wait()
        database.close()
        with pytest.raises(StorageError, match="closed"):
            found.result()


def test_a_file_that_must_be_there_is_not_made(tmp_path):
    with pytest.raises(StorageError, match="no database"):
        Database(tmp_path / "t.db", create=False)
    assert not list(tmp_path.iterdir())


def test_a_snapshot_is_of_one_moment(database):
    def twice(tables):
        before = tables.conn.execute("select count(*) from failures").fetchone()
        fail(database, "meanwhile")
        return before, tables.conn.execute("select count(*) from failures").fetchone()

    assert database.snapshot(twice) == ((0,), (0,))
    assert paths(database) == ["meanwhile"]
