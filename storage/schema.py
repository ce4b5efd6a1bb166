"""The schema, as numbered migrations, each with its reason. Never edit one that was released; add another."""

from sqlite_utils import Database as Tables
from sqlite_utils import Migrations

from longstride.storage.checksum import checksum

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
            checksum blob not null,           -- of data, see `Blocks`
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


@migrations(name="0005_collections")
def collections(tables: Tables) -> None:
    """Documents belong to collections. What a document is called and where it came from is said per collection, so that
    a collection shows nothing of another one that holds the same text."""
    tables.conn.execute(
        # ids are never used twice, so that (count, largest id) changes with every addition and removal
        """create table collections (
            id integer primary key autoincrement,
            collection text not null,
            document_id text not null references documents(id) on delete cascade,
            name text not null,
            path text,
            added_at text not null,
            unique (document_id, collection)
        ) strict"""
    )
    tables.conn.execute(
        "insert into collections (collection, document_id, name, path, added_at) "
        "select 'default', id, name, path, added_at from documents order by rowid"
    )
    tables.conn.execute("alter table documents drop column name")
    tables.conn.execute("alter table documents drop column path")
    tables.conn.execute("alter table documents drop column added_at")


@migrations(name="0006_jobs")
def jobs(tables: Tables) -> None:
    """Messages: an inbox that is worked off, and an outbox that is published, so that no crash loses or doubles one."""
    tables.conn.execute(
        # seq is the order of arrival; it is never used twice
        """create table jobs (
            seq integer primary key autoincrement,
            key text not null unique,         -- the same for all repetitions of a message
            session text not null,            -- a name: the session may not exist yet
            kind text not null,               -- feed, ask, close
            topic text not null,
            payload blob not null,            -- as received; emptied when done
            digest blob not null,             -- sha256 of all that was received
            reply_topic text,
            correlation blob,
            state text not null,              -- queued, working, done, dead
            attempts integer not null default 0,
            read integer not null default 0,  -- tokens of its text that are in the stream
            reason text not null default '',  -- why it is dead
            received_at text not null,
            ended_at text
        ) strict"""
    )
    tables.conn.execute("create index jobs_line on jobs(state, session, seq)")
    tables.conn.execute("create index jobs_session on jobs(session)")
    tables.conn.execute(
        "create index jobs_suspects on jobs(seq) where state in ('queued', 'working') and attempts >= 2"
    )
    tables.conn.execute(
        """create table outbox (
            id integer primary key autoincrement,
            seq integer not null references jobs(seq) on delete cascade,
            topic text not null,
            payload blob not null,            -- emptied when published
            correlation blob,
            published_at text,
            refused text                      -- why the broker does not take it
        ) strict"""
    )
    tables.conn.execute("create index outbox_waiting on outbox(id) where published_at is null")
    tables.conn.execute("create index outbox_job on outbox(seq)")


@migrations(name="0007_checksums")
def checksums(tables: Tables) -> None:
    """Checksums of what cannot be computed again: what is damaged is refused, never answered from."""
    for table in ("sessions", "runs", "answers", "collections"):
        tables.conn.execute(f"alter table {table} add column checksum blob not null default x''")
    # stream passages that a run completed: its checksum covers them
    tables.conn.execute("alter table runs add column passages integer not null default 0")
    sealed = "id, name, model, vocabulary, settings, prompt, window_start, tokens"
    for row in tables.conn.execute(f"select {sealed} from sessions").fetchall():  # noqa: S608
        tables.conn.execute("update sessions set checksum = ? where id = ?", [checksum("session", *row), row[0]])
    sealed = "session_id, kind, question, text, tokens, usage, timing, sources, created_at"
    for row in tables.conn.execute(f"select id, {sealed} from answers").fetchall():  # noqa: S608
        tables.conn.execute("update answers set checksum = ? where id = ?", [checksum("answer", *row[1:]), row[0]])
    _seal_runs(tables)
    _seal_documents(tables)


@migrations(name="0008_bookmarks")
def bookmarks(tables: Tables) -> None:
    """How far each file was read into a session: a reading that was broken off goes on there, as does that of a file
    which has grown."""
    tables.conn.execute(
        """create table bookmarks (
            session_id integer not null references sessions(id) on delete cascade,
            name text not null,               -- the file's path
            characters integer not null,      -- of its text, read
            tokens integer not null,          -- of what follows them, read
            digest blob not null,             -- sha256 of both
            checksum blob not null,
            primary key (session_id, name)
        ) strict, without rowid"""
    )


def _seal_runs(tables: Tables) -> None:
    """Which run completed which passages is not known any more: the last one answers for them all."""
    last: dict[int, int] = dict(tables.conn.execute("select session_id, max(start) from runs group by session_id"))
    spans = "select start, stop, first_char, last_char from stream_passages where session_id = ? order by start"
    for session_id, start in tables.conn.execute("select session_id, start from runs").fetchall():
        key = [session_id, start]
        (ids,) = tables.conn.execute("select ids from runs where session_id = ? and start = ?", key).fetchone()
        own = tables.conn.execute(spans, [session_id]).fetchall() if start == last[session_id] else []
        tables.conn.execute(
            "update runs set passages = ?, checksum = ? where session_id = ? and start = ?",
            [len(own), checksum("run", session_id, start, ids, own), *key],
        )


def _seal_documents(tables: Tables) -> None:
    """A document's id covers its text; what it is called in a collection, and its passages, are covered there."""
    query = (
        "select c.id, collection, document_id, name, path, added_at, characters "
        "from collections c join documents d on d.id = document_id"
    )
    spans = "select id, start, stop from passages where document_id = ? order by id"
    for row in tables.conn.execute(query).fetchall():
        seal = checksum("document", *row, tables.conn.execute(spans, [row[2]]).fetchall())
        tables.conn.execute("update collections set checksum = ? where id = ?", [seal, row[0]])
