"""`verify`: everything that is stored, checked as far as a database can tell by itself."""

from collections.abc import Callable
from contextlib import closing
from functools import partial

from sqlite_utils import Database as Tables

from longstride.errors import StorageError
from longstride.storage.blocks import Blocks
from longstride.storage.bookmarks import Bookmarks
from longstride.storage.database import Database
from longstride.storage.documents import Documents
from longstride.storage.schema import migrations
from longstride.storage.sessions import Sessions


def verify(database: Database) -> list[str]:
    """What is damaged, a sentence each; empty when all is sound. Reads the whole file."""
    checks = (
        database.check,
        partial(_check_schema, database),
        Sessions(database).verify,
        Bookmarks(database).verify,
        Documents(database).verify,
        Blocks(database, 0).verify,
    )
    return [problem for check in checks for problem in _problems(check)]


def _problems(check: Callable[[], list[str]]) -> list[str]:
    try:
        return check()
    except StorageError as error:  # damage to SQLite's structure ends a check half way
        return [str(error)]


def _check_schema(database: Database) -> list[str]:
    """SQLite takes any schema for right that it can read."""
    new = Tables(memory=True)
    with closing(new.conn):
        migrations.apply(new)
        wrong = {str(column[0]) for column in database.read(_columns) ^ _columns(new)}
    return [f"the table {table} is not as it was created; restore a backup" for table in sorted(wrong)]


def _columns(tables: Tables) -> set[tuple[object, ...]]:
    """Every column of every table, and what it refers to."""
    query = (
        "select t.name, p.* from sqlite_schema t, {}(t.name) p where t.type = 'table' and t.name not like '%sqlite%'"
    )
    columns = tables.conn.execute(query.format("pragma_table_info"))
    references = tables.conn.execute(query.format("pragma_foreign_key_list"))
    return {*columns, *references}
