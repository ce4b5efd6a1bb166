"""Messages to be worked off and what is sent back: an inbox and an outbox in the database.

A message is stored before it is acknowledged; its answer is stored, in one transaction with what it changed, before it
is published. So whatever dies in between, each key is worked off once and its replies are sent at least once.
"""

import datetime as dt
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from sqlite_utils import Database as Tables

from longstride.errors import LongstrideError
from longstride.storage.checksum import checksum
from longstride.storage.database import Database
from longstride.storage.sessions import now

TOGETHER = 64  # texts read in one go at most
TOGETHER_BYTES = 1 << 16
SHOWN = 1000  # dead jobs listed at most
COLUMNS = "key, session, kind, topic, payload, reply_topic, correlation, seq, attempts, read, reason, received_at"


class JobGone(LongstrideError):
    """The job was removed, with its session, while it was worked on."""


@dataclass(frozen=True)
class Reply:
    """A message to be published."""

    topic: str
    payload: bytes
    correlation: bytes | None = None


@dataclass(frozen=True)
class Job:
    """A received message. `key` makes it the same as its repetitions; `read`: tokens of its text already read."""

    key: str
    session: str
    kind: str
    topic: str
    payload: bytes
    reply_topic: str | None = None
    correlation: bytes | None = None
    seq: int = 0
    attempts: int = 0
    read: int = 0
    reason: str = ""
    received_at: str = field(default_factory=now)
    damaged: bool = False  # it is not what was stored

    @property
    def age_s(self) -> float:
        """Seconds since it was received."""
        return _seconds_since(self.received_at)

    @property
    def digest(self) -> bytes:
        """A hash of all that was received."""
        return checksum(
            "job", self.key, self.session, self.kind, self.topic, self.payload, self.reply_topic, self.correlation
        )


class Jobs:
    """The job tables. One worker a database at a time (see `WorkerLock`); others may look, retry and drop."""

    def __init__(self, database: Database) -> None:
        self.database = database

    # --- inbox ---

    def receive(self, tables: Tables, job: Job, problem: str = "", replies: Iterable[Reply] = ()) -> bool:
        """Store a message inside the caller's transaction; False if its key is known. With a `problem` it is dead."""
        row = [
            job.key, job.session, job.kind, job.topic, job.payload, job.digest, job.reply_topic, job.correlation,
            "dead" if problem else "queued", problem, job.received_at,
        ]  # fmt: skip
        cursor = tables.conn.execute(
            "insert into jobs (key, session, kind, topic, payload, digest, reply_topic, correlation, state, "
            "reason, received_at) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) on conflict(key) do nothing", row,
        )  # fmt: skip
        if cursor.rowcount == 0:
            return False
        self._send(tables, int(cursor.lastrowid or 0), replies)
        return True

    def recover(self, tables: Tables) -> int:
        """Queue again what a worker that died was working on; returns how many. Only for the worker, at its start."""
        tables.conn.execute("update outbox set refused = null where refused is not null")
        return int(tables.conn.execute("update jobs set state = 'queued' where state = 'working'").rowcount)

    def take(self, tables: Tables, busy: Collection[str]) -> list[Job]:
        """Lease the oldest first-in-line job of the sessions that are not `busy`: one more attempt is counted.

        Text that waits right behind text comes along, to be read in one go; not where something was tried before, so
        that what fails is found to be the one that does.
        """
        # from one session to the next by index, however many jobs each has
        first = """
            with recursive waiting(session) as (
                select min(session) from jobs where state = 'queued'
                union all
                select (select min(session) from jobs where state = 'queued' and session > waiting.session)
                from waiting where waiting.session is not null
            )
            select session, (select min(seq) from jobs where state = 'queued' and session = waiting.session)
            from waiting where session is not null
        """
        heads = [(seq, session) for session, seq in tables.conn.execute(first) if session not in busy]
        if not heads:
            return []
        taken = self._together(tables, *min(heads))
        change = "update jobs set state = 'working', attempts = attempts + 1 where seq = ?"
        tables.conn.executemany(change, [(job.seq,) for job in taken])
        return [replace(job, attempts=job.attempts + 1) for job in taken]

    @staticmethod
    def _together(tables: Tables, first: int, session: str) -> list[Job]:
        query = (
            f"select {COLUMNS}, digest from jobs where state = 'queued' and session = ? and seq >= ? "  # noqa: S608
            "order by seq limit ?"
        )
        taken: list[Job] = []
        size = 0
        for row in tables.conn.execute(query, [session, first, TOGETHER]):
            job = Job(*row[:-1])
            size += len(job.payload)
            if taken and (
                taken[0].attempts or job.attempts or {taken[0].kind, job.kind} != {"feed"} or size > TOGETHER_BYTES
            ):
                break
            taken.append(job if row[-1] == job.digest else replace(job, damaged=True))
        return taken

    def progress(self, tables: Tables, seq: int, read: int) -> None:
        """So many tokens of a job's text are in the stream now; inside the transaction that puts them there.

        Whoever gets on is not stuck: earlier attempts no longer count.
        """
        self._move(tables, seq, "working", "attempts = 1, read = ?", [read])

    def finish(self, tables: Tables, seq: int, replies: Iterable[Reply]) -> None:
        """A job is done: its text is emptied, its replies wait to be published."""
        # the key stays, so that a repetition is known; the text is no longer needed
        change = "state = 'done', payload = x'', ended_at = ?"
        self._move(tables, seq, "working", change, [now()])
        self._send(tables, seq, replies)

    def give_back(self, tables: Tables, seq: int, *, counted: bool) -> None:
        """A job is not done; it goes back to its place in line. Not `counted`: the attempt was not its fault."""
        self._move(tables, seq, "working", "state = 'queued', attempts = attempts - ?", [0 if counted else 1])

    def bury(self, tables: Tables, seq: int, reason: str, replies: Iterable[Reply]) -> None:
        """A job cannot be done; it stays, with the reason, until somebody retries or drops it."""
        self._move(tables, seq, "working", "state = 'dead', reason = ?, ended_at = ?", [reason, now()])
        self._send(tables, seq, replies)

    @staticmethod
    def _move(tables: Tables, seq: int, state: str, change: str, values: list[object]) -> None:
        # `change` is one of this class's own literals
        query = f"update jobs set {change} where seq = ? and state = ?"  # noqa: S608
        if tables.conn.execute(query, [*values, seq, state]).rowcount != 1:
            raise JobGone(f"message {seq} was removed from the inbox meanwhile")

    def suspects(self, tables: Tables) -> bool:
        """Whether something that waits failed twice or more: it is to be found out by itself, not among others."""
        query = "select 1 from jobs where state in ('queued', 'working') and attempts >= 2 limit 1"
        return tables.conn.execute(query).fetchone() is not None

    def depth(self) -> tuple[int, int]:
        """(messages, bytes) that wait or are worked on."""
        query = "select count(*), coalesce(sum(length(payload)), 0) from jobs where state in ('queued', 'working')"
        row = self.database.read(lambda tables: tables.conn.execute(query).fetchone())
        return int(row[0]), int(row[1])

    def oldest_s(self) -> float:
        """Seconds since the first message that still waits was received; 0 when none waits."""
        query = "select min(received_at) from jobs where state = 'queued'"
        row = self.database.read(lambda tables: tables.conn.execute(query).fetchone())
        return 0.0 if row[0] is None else _seconds_since(row[0])

    # --- outbox ---

    @staticmethod
    def _send(tables: Tables, seq: int, replies: Iterable[Reply]) -> None:
        tables.conn.executemany(
            "insert into outbox (seq, topic, payload, correlation) values (?, ?, ?, ?)",
            [(seq, reply.topic, reply.payload, reply.correlation) for reply in replies],
        )

    def send(self, tables: Tables, seq: int, reply: Reply) -> None:
        """Have a message published for a job that goes on; inside the caller's transaction."""
        self._send(tables, seq, [reply])

    def outgoing(self, count: int) -> list[tuple[int, Reply]]:
        """The first `count` messages that were not published yet, in order, each with its number."""
        query = (
            "select id, topic, payload, correlation from outbox where published_at is null and refused is null "
            "order by id limit ?"
        )
        rows = self.database.read(lambda tables: tables.conn.execute(query, [count]).fetchall())
        return [(row[0], Reply(*row[1:])) for row in rows]

    def published(self, tables: Tables, ids: Iterable[int]) -> None:
        """The broker has these: mark them, and empty them."""
        tables.conn.executemany(
            "update outbox set published_at = ?, payload = x'' where id = ?", [(now(), id_) for id_ in ids]
        )

    def refuse(self, tables: Tables, id_: int, reason: str) -> None:
        """The broker does not take this one: keep it, out of the others' way, until the worker starts again."""
        tables.conn.execute("update outbox set refused = ? where id = ?", [reason, id_])

    def outbox_counts(self) -> tuple[int, int]:
        """(messages to be published, messages that the broker refused)."""
        query = "select count(*) - count(refused), count(refused) from outbox where published_at is null"
        row = self.database.read(lambda tables: tables.conn.execute(query).fetchone())
        return int(row[0]), int(row[1])

    # --- the dead, and the past ---

    def dead(self, seq: int | None = None) -> list[Job]:
        """What could not be done, oldest first; or the one of that number, if it is among it."""
        query = f"select {COLUMNS} from jobs where state = 'dead' and ? in (seq, 0) order by seq limit ?"  # noqa: S608
        return [Job(*row) for row in self.database.read(lambda t: t.conn.execute(query, [seq or 0, SHOWN]).fetchall())]

    def dead_count(self) -> int:
        """How many could not be done."""
        query = "select count(*) from jobs where state = 'dead'"
        return int(self.database.read(lambda tables: tables.conn.execute(query).fetchone())[0])

    def retry(self, tables: Tables, seq: int | None = None) -> int:
        """Queue a dead job again, or all of them; returns how many."""
        query = "update jobs set state = 'queued', attempts = 0, reason = '' where state = 'dead' and ? in (seq, 0)"
        return int(tables.conn.execute(query, [seq or 0]).rowcount)

    def drop(self, tables: Tables, seq: int | None = None) -> int:
        """Delete a dead job, or all of them; returns how many."""
        return int(tables.conn.execute("delete from jobs where state = 'dead' and ? in (seq, 0)", [seq or 0]).rowcount)

    def forget(self, tables: Tables, before: str) -> int:
        """Delete what was done and published before a time; its keys are no longer known then."""
        query = (
            "delete from jobs where state = 'done' and ended_at < ? "
            "and not exists (select 1 from outbox o where o.seq = jobs.seq and published_at is null "
            "and refused is null) "
            # whatever the clock says: the last one may be on its way here again
            "and seq < (select max(seq) from jobs)"
        )
        return int(tables.conn.execute(query, [before]).rowcount)


def _seconds_since(at: str) -> float:
    return max(0.0, (dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(at)).total_seconds())
