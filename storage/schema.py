"""The schema, as numbered migrations, each with its reason. Never edit one that was released; add another."""

from sqlite_utils import Database as Tables
from sqlite_utils import Migrations

migrations = Migrations("longstride")


@migrations(name="0001_documents")
def documents(tables: Tables) -> None:
    """Documents and the passages retrieval draws on; what could not be read is recorded, not lost."""
    tables.conn.execute(
        """create table documents (
            id text primary key,              -- sha256 of the text
            name text not null,
            path text,
            text text not null,
            characters integer not null,
            added_at text not null
        ) strict"""
    )
    tables.conn.execute(
        # ids are never used twice, so that (count, largest id) changes with every addition and removal
        """create table passages (
            id integer primary key autoincrement,
            document_id text not null references documents(id) on delete cascade,
            start integer not null,           -- characters in the document's text
            stop integer not null
        ) strict"""
    )
    tables.conn.execute("create index passages_document on passages(document_id)")
    tables.conn.execute(
        """create table failures (
            path text primary key,
            reason text not null,
            at text not null
        ) strict"""
    )


@migrations(name="0002_sessions")
def sessions(tables: Tables) -> None:
    """Sessions: token ids in append-only runs (saving is incremental), the stream's passages, answers and sources."""
    tables.conn.execute(
        # ids are never used twice: what still runs for a removed session must not reach a new one
        """create table sessions (
            id integer primary key autoincrement,
            name text not null unique,
            model text not null,
            vocabulary text not null,         -- hash of the vocabulary that the token ids belong to
            settings text not null,           -- JSON
            prompt blob not null,             -- token ids, 32-bit little-endian
            window_start integer not null default 0,  -- first stream token still in the context
            tokens integer not null default 0,
            created_at text not null,
            updated_at text not null
        ) strict"""
    )
    tables.conn.execute(
        """create table runs (
            session_id integer not null references sessions(id) on delete cascade,
            start integer not null,           -- stream tokens before this run
            ids blob not null,
            primary key (session_id, start)
        ) strict, without rowid"""
    )
    tables.conn.execute(
        """create table stream_passages (
            session_id integer not null references sessions(id) on delete cascade,
            start integer not null,           -- stream tokens
            stop integer not null,
            first_char integer not null,      -- characters of the stream's text
            last_char integer not null,
            primary key (session_id, start)
        ) strict, without rowid"""
    )
    tables.conn.execute(
        """create table answers (
            id integer primary key,
            session_id integer not null references sessions(id) on delete cascade,
            kind text not null,               -- ask, note, summary
            question text not null,
            text text not null,
            tokens integer not null,          -- stream tokens read when it was given
            usage text not null,              -- JSON
            timing text not null,             -- JSON
            sources text not null,            -- JSON
            created_at text not null
        ) strict"""
    )
    tables.conn.execute("create index answers_session on answers(session_id)")


@migrations(name="0003_blocks")
def blocks(tables: Tables) -> None:
    """KV blocks, named by content, so sessions with the same beginning share them."""
    tables.conn.execute(
        """create table blocks (
            id blob primary key,
            bytes integer not null,
            used_at real not null,
            fingerprint text not null,
            ids blob not null,
            positions blob not null,
            checksum blob not null,           -- sha256 of data
            data blob not null                -- last: what stands behind it is reached only by reading through it
        ) strict"""
    )
    tables.conn.execute("create index blocks_bytes on blocks(bytes)")  # their sum is read from the index alone
    tables.conn.execute("create index blocks_used on blocks(used_at)")
    tables.conn.execute(
        # blocks hold token ids, so removing a session must find the blocks that were its own
        """create table session_blocks (
            session_id integer not null references sessions(id) on delete cascade,
            block_id blob not null references blocks(id) on delete cascade,
            primary key (session_id, block_id)
        ) strict, without rowid"""
    )
    tables.conn.execute("create index session_blocks_block on session_blocks(block_id)")


@migrations(name="0004_indexes")
def indexes(tables: Tables) -> None:
    """The search index over the documents, so that opening a large database does not read all its text again."""
    tables.conn.execute(
        """create table indexes (
            format text primary key,          -- what data means
            count integer not null,           -- passages in it
            last integer not null,            -- the largest id among them
            checksum blob not null,           -- sha256 of data
            data blob not null
        ) strict"""
    )
