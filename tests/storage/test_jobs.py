"""The inbox and the outbox."""

import time
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from longstride.errors import StorageError
from longstride.storage.database import Database
from longstride.storage.jobs import TOGETHER, Job, JobGone, Jobs, Reply
from longstride.storage.lock import WorkerLock


@pytest.fixture
def jobs(tmp_path):
    database = Database(tmp_path / "j.db")
    yield Jobs(database)
    database.close()


def receive(jobs, session, name, kind="feed", **more):
    job = Job(f"{session}/{kind}/{name}", session, kind, f"t/{session}/{kind}", b"text", **more)
    return jobs.database.write(lambda tables: jobs.receive(tables, job))


def take(jobs, *busy):
    return [job.key for job in jobs.database.write(lambda tables: jobs.take(tables, busy))]


def number(jobs, key):
    return jobs.database.read(lambda t: t.conn.execute("select seq from jobs where key = ?", [key]).fetchone()[0])


def change(jobs, what, key, *values, **named):
    return jobs.database.write(lambda tables: getattr(jobs, what)(tables, number(jobs, key), *values, **named))


def test_sessions_take_turns_by_age_and_a_session_is_worked_on_in_order(jobs):
    for session, name in [("a", 1), ("b", 2), ("a", 3), ("c", 4)]:
        assert receive(jobs, session, name, "ask")
    assert take(jobs) == ["a/ask/1"]
    assert take(jobs, "a") == ["b/ask/2"]
    assert take(jobs, "a", "b") == ["c/ask/4"]
    assert take(jobs, "a", "b", "c") == []
    change(jobs, "finish", "a/ask/1", [])
    assert take(jobs, "b", "c") == ["a/ask/3"]


def test_text_behind_text_comes_along_until_something_else_or_something_that_failed(jobs):
    for name in range(3):
        receive(jobs, "s", name)
    receive(jobs, "other", "between")
    receive(jobs, "s", "q", "ask")
    receive(jobs, "s", "late")
    assert take(jobs, "other") == ["s/feed/0", "s/feed/1", "s/feed/2"]
    for name in range(3):
        change(jobs, "give_back", f"s/feed/{name}", counted=name == 1)
    assert take(jobs, "other") == ["s/feed/0"]  # the next one failed before, so it comes alone
    change(jobs, "finish", "s/feed/0", [])
    assert take(jobs, "other") == ["s/feed/1"]
    change(jobs, "finish", "s/feed/1", [])
    assert take(jobs, "other") == ["s/feed/2"]
    change(jobs, "finish", "s/feed/2", [])
    assert take(jobs, "other") == ["s/ask/q"]
    for name in range(TOGETHER + 5):
        receive(jobs, "many", name)
    assert len(take(jobs, "other", "s")) == TOGETHER


def test_a_repeated_key_is_known_whatever_became_of_it(jobs):
    assert receive(jobs, "s", 1)
    assert not receive(jobs, "s", 1)
    take(jobs)
    change(jobs, "finish", "s/feed/1", [Reply("r", b"done")])
    assert not receive(jobs, "s", 1)
    assert len(jobs.outgoing(9)) == 1
    assert receive(jobs, "s", 1, "ask")
    assert receive(jobs, "t", 1)


def test_what_is_done_is_emptied_and_later_forgotten_but_not_before_its_reply_is_out(jobs):
    receive(jobs, "s", 1)
    take(jobs)
    change(jobs, "finish", "s/feed/1", [Reply("r", b"answer", b"correlation")])
    rows = jobs.database.read(lambda t: t.conn.execute("select state, payload from jobs").fetchall())
    assert rows == [("done", b"")]
    later = "9999-01-01T00:00:00+00:00"
    assert jobs.database.write(lambda tables: jobs.forget(tables, later)) == 0
    ((id_, reply),) = jobs.outgoing(9)
    assert reply == Reply("r", b"answer", b"correlation")
    jobs.database.write(lambda tables: jobs.published(tables, [id_]))
    assert jobs.outgoing(9) == []
    assert jobs.database.write(lambda tables: jobs.forget(tables, "2000-01-01T00:00:00+00:00")) == 0
    assert jobs.database.write(lambda tables: jobs.forget(tables, later)) == 0  # the broker may send the last one again
    receive(jobs, "s", 2)
    assert jobs.database.write(lambda tables: jobs.forget(tables, later)) == 1
    assert jobs.database.read(lambda t: t.conn.execute("select count(*) from outbox").fetchone()) == (0,)


def test_progress_forgives_earlier_attempts(jobs):
    receive(jobs, "s", 1)
    for _ in range(4):
        take(jobs)
        jobs.database.write(jobs.recover)
    (job,) = jobs.database.write(lambda tables: jobs.take(tables, ()))
    assert job.attempts == 5
    change(jobs, "progress", job.key, 7)
    jobs.database.write(jobs.recover)
    (job,) = jobs.database.write(lambda tables: jobs.take(tables, ()))
    assert (job.attempts, job.read) == (2, 7)


def test_a_job_that_was_removed_cannot_be_ended(jobs):
    receive(jobs, "s", 1)
    take(jobs)
    (job,) = [number(jobs, "s/feed/1")]
    jobs.database.write(lambda tables: tables.conn.execute("delete from jobs"))
    for ending in (
        lambda t: jobs.finish(t, job, []),
        lambda t: jobs.progress(t, job, 1),
        lambda t: jobs.bury(t, job, "why", []),
        lambda t: jobs.give_back(t, job, counted=True),
    ):
        with pytest.raises(JobGone):
            jobs.database.write(ending)
    assert jobs.outgoing(9) == []


@pytest.mark.parametrize("column", ["key", "session", "kind", "topic", "payload", "reply_topic", "correlation"])
def test_a_damaged_message_says_so(jobs, column):
    receive(jobs, "s", 1, reply_topic="r", correlation=b"c")
    value = b"other" if column in ("payload", "correlation") else "other"
    jobs.database.write(lambda t: t.conn.execute(f"update jobs set {column} = ?", [value]))  # noqa: S608
    (job,) = jobs.database.write(lambda tables: jobs.take(tables, ()))
    assert job.damaged


def test_a_long_line_is_found_quickly(jobs):
    rows = [
        (f"k{i}", f"s{i % 7}", "feed", "t", b"x", b"", "queued", "2026-01-01T00:00:00+00:00") for i in range(200_000)
    ]
    insert = (
        "insert into jobs (key, session, kind, topic, payload, digest, state, received_at) "
        "values (?, ?, ?, ?, ?, ?, ?, ?)"
    )
    jobs.database.write(lambda tables: tables.conn.executemany(insert, rows))
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    def counted(tables):
        tables.conn.set_progress_handler(count, 1000)  # called after every 1,000 instructions of SQLite
        try:
            return jobs.take(tables, ["s0", "s1"])
        finally:
            tables.conn.set_progress_handler(None, 0)

    began = time.perf_counter()
    assert jobs.database.write(counted)[0].session == "s2"
    assert steps < 20, f"{steps} thousand instructions, {time.perf_counter() - began:.3f} s"


def test_one_worker_a_database(jobs):
    with WorkerLock(jobs.database), pytest.raises(StorageError, match="another worker"), WorkerLock(jobs.database):
        pass
    with WorkerLock(jobs.database):
        pass


class Line(RuleBasedStateMachine):
    """Against a plain model: each session a queue; nothing is lost, doubled or out of order."""

    @initialize(folder=st.uuids())
    def open(self, folder):
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.jobs = Jobs(Database(f"{self.folder.name}/l.db"))
        self.queues: dict[str, deque[str]] = {}
        self.taken: dict[str, list[str]] = {}
        self.ended: list[str] = []
        self.count = 0

    def teardown(self):
        if hasattr(self, "jobs"):
            self.jobs.database.close()
            self.folder.cleanup()

    @rule(session=st.sampled_from("abc"), kind=st.sampled_from(["feed", "feed", "ask"]))
    def receive(self, session, kind):
        self.count += 1
        assert receive(self.jobs, session, self.count, kind)
        self.queues.setdefault(session, deque()).append(f"{session}/{kind}/{self.count}")

    @rule()
    def take(self):
        got = take(self.jobs, *self.taken)
        free = [s for s, queue in self.queues.items() if queue and s not in self.taken]
        assert bool(got) == bool(free)
        if got:
            session = got[0][0]
            assert got == [self.queues[session][i] for i in range(len(got))]
            self.taken[session] = got

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), counted=st.booleans())
    def end_some(self, data, counted):
        session = data.draw(st.sampled_from(sorted(self.taken)))
        keys = self.taken.pop(session)
        done = data.draw(st.integers(0, len(keys)))
        for key in keys[:done]:
            change(self.jobs, "finish", key, [Reply("r", key.encode())])
            assert self.queues[session].popleft() == key
            self.ended.append(key)
        for key in keys[done:]:
            change(self.jobs, "give_back", key, counted=counted)

    @rule()
    def die(self):
        path = self.jobs.database.path
        self.jobs.database.close()
        self.jobs = Jobs(Database(path))
        interrupted = sum(len(keys) for keys in self.taken.values())
        assert self.jobs.database.write(self.jobs.recover) == interrupted
        self.taken = {}

    @invariant()
    def replies_are_those_of_what_ended(self):
        if hasattr(self, "jobs"):
            assert [reply.payload.decode() for _, reply in self.jobs.outgoing(1000)] == self.ended


TestLine = Line.TestCase
TestLine.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
