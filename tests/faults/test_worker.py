"""What the world does to a worker: brokers that go, disks that fill, clocks that jump, signals at the wrong moment."""

import asyncio
import datetime as dt
import signal
import sqlite3

import pytest

import longstride.storage.jobs as jobs_module
from longstride.engine.runner import ModelRunner
from tests.broker import Broker, peer, until
from tests.service.test_worker import FACTS, opened, working

ROOT = "faults"
TEXT = FACTS * 3


async def ask_and_hear(client, number: int) -> dict:
    await client.send(f"{ROOT}/sessions/s/ask", {"id": f"q{number}", "question": f"What of thing{number}?"})
    (answer,) = await client.wait(lambda: [a for a in client.on("/answers") if a["id"] == f"q{number}"])
    return answer


def kept_text(worker, session) -> str:
    return worker.assistant.model.tokenizer.decode(session.stream)


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("kill", [True, False])
async def test_a_broker_that_went_and_came_back_finds_everything_done(tmp_path, persistent, kill):
    broker = Broker(tmp_path / "broker", persistent=persistent).start()
    try:
        async with working(tmp_path, broker, ROOT) as worker:
            async with peer(broker, ROOT) as client:
                await client.send(f"{ROOT}/sessions/s/feed", {"id": "f", "text": TEXT})
                await client.send(f"{ROOT}/sessions/s/ask", {"id": "q0", "question": "thing3?", "max_tokens": 60})
                await until(lambda: worker.jobs.depth()[0] == 2)  # both are in the inbox
                broker.stop(kill=kill)
            await until(lambda: worker.jobs.depth() == (0, 0))  # the work goes on meanwhile
            assert len(worker.jobs.outgoing(10)) == 1
            broker.start()
            async with peer(broker, ROOT) as client:
                (answer,) = await client.wait(lambda: client.on("/answers"))
                assert answer["id"] == "q0"
                await ask_and_hear(client, 1)  # subscribed again, also where the broker forgot
            session = await worker.assistant.session("s")
            assert kept_text(worker, session) == TEXT + "\n"
    finally:
        broker.stop()


async def test_what_a_broker_holds_waits_for_a_worker_that_is_away(tmp_path):
    broker = Broker(tmp_path / "broker").start()
    try:
        async with working(tmp_path, broker, ROOT):
            pass
        async with peer(broker, ROOT) as client:
            for i in range(20):
                await client.send(f"{ROOT}/sessions/s/feed", f"Line {i}.")
            broker.stop()
        broker.start()
        async with peer(broker, ROOT) as client, working(tmp_path, broker, ROOT) as worker:
            await ask_and_hear(client, 1)
            session = await worker.assistant.session("s")
            assert kept_text(worker, session) == "".join(f"Line {i}.\n" for i in range(20))
    finally:
        broker.stop()


@pytest.fixture
def broker(tmp_path):
    made = Broker(tmp_path / "broker").start()
    yield made
    made.stop()


async def test_a_full_disk_stops_the_intake_and_loses_nothing(tmp_path, broker):
    async with peer(broker, ROOT) as client, working(tmp_path, broker, ROOT) as worker:
        await client.send(f"{ROOT}/sessions/s/feed", {"id": "0", "text": "Before. "})
        await ask_and_hear(client, 0)
        database = worker.jobs.database

        def limit(pages: int):
            return lambda tables: tables.conn.execute(f"PRAGMA max_page_count={pages}").fetchone()

        (pages,) = database.read(lambda tables: tables.conn.execute("PRAGMA page_count").fetchone())
        await database.awrite(limit(pages))
        for i in range(1, 6):
            await client.send(f"{ROOT}/sessions/s/feed", {"id": str(i), "text": f"Full {i}. " * 2000})
        await until(lambda: "disk is full" in worker.problem)
        await database.awrite(limit(1_000_000))
        await ask_and_hear(client, 6)
        session = await worker.assistant.session("s")
        expected = "Before. \n" + "".join(f"Full {i}. " * 2000 + "\n" for i in range(1, 6))
        assert kept_text(worker, session) == expected
        assert worker.jobs.dead() == []
        assert worker.problem == ""


async def test_jumping_clocks_decide_nothing(tmp_path, broker, monkeypatch):
    jumps = iter(range(10_000))
    years = [0, 30, -30, 5, -5]

    def now() -> str:
        at = dt.datetime.now(dt.UTC) + dt.timedelta(days=365 * years[next(jumps) % len(years)])
        return at.isoformat(timespec="seconds")

    monkeypatch.setattr(jobs_module, "now", now)
    async with peer(broker, ROOT) as client, working(tmp_path, broker, ROOT) as worker:
        for i in range(20):
            await client.send(f"{ROOT}/sessions/s/feed", {"id": str(i), "text": f"Line {i}."})
        await ask_and_hear(client, 1)
        session = await worker.assistant.session("s")
        assert kept_text(worker, session) == "".join(f"Line {i}.\n" for i in range(20))
        # a clock that ran ahead makes the worker forget too early, but not what the broker may send again
        await until(lambda: worker.jobs.outbox_counts() == (0, 0))
        forgotten = await worker.jobs.database.awrite(lambda t: worker.jobs.forget(t, "2099-01-01T00:00:00+00:00"))
        assert forgotten == 20
        await client.send(f"{ROOT}/sessions/s/ask", {"id": "q1", "question": "What of thing1?"})
        await ask_and_hear(client, 2)
        assert [answer["id"] for answer in client.on("/answers")] == ["q1", "q2"]


@pytest.mark.parametrize("moment", ["idle", "reading", "answering", "no broker", "replies wait"])
async def test_told_to_stop_it_stops_and_the_next_one_goes_on(tmp_path, broker, moment, monkeypatch):
    forwards = asyncio.Event()
    loop = asyncio.get_running_loop()
    original = ModelRunner.forward

    def forward(self, slices):
        rows = sum(len(piece.ids) for piece in slices)
        if moment == ("reading" if rows > 16 else "answering"):
            loop.call_soon_threadsafe(forwards.set)
        return original(self, slices)

    monkeypatch.setattr(ModelRunner, "forward", forward)
    grace_s = 0 if moment == "answering" else 30
    async with peer(broker, ROOT) as client:  # noqa: SIM117 - the worker stops while the client is there
        async with working(tmp_path, broker, ROOT, grace_s=grace_s) as worker:
            if moment != "idle":
                await client.send(f"{ROOT}/sessions/s/feed", {"id": "f", "text": TEXT})
                question = {"id": "q0", "question": "What of thing0?", "max_tokens": 100}
                await client.send(f"{ROOT}/sessions/s/ask", question)
            if moment in ("reading", "answering"):
                await asyncio.wait_for(forwards.wait(), 30)
            if moment in ("no broker", "replies wait"):
                await until(lambda: worker.jobs.depth()[0] == 2)
                broker.stop()
            if moment == "replies wait":
                await until(lambda: worker.jobs.outgoing(1))
    if moment in ("no broker", "replies wait"):
        broker.start()
    async with peer(broker, ROOT) as client, working(tmp_path, broker, ROOT) as worker:
        if moment == "idle":
            await client.send(f"{ROOT}/sessions/s/feed", {"id": "f", "text": TEXT})
            await client.send(f"{ROOT}/sessions/s/ask", {"id": "q0", "question": "What of thing0?"})
        if moment not in ("reading", "answering"):
            await client.wait(lambda: [a for a in client.on("/answers") if a["id"] == "q0"])
        await ask_and_hear(client, 1)
        session = await worker.assistant.session("s")
        assert kept_text(worker, session) == TEXT + "\n"
        stored = worker.assistant.sessions.answers(session.id)
        assert [a["question"] for a in stored] == ["What of thing0?", "What of thing1?"]
        attempts = worker.jobs.database.read(lambda t: t.conn.execute("select max(attempts) from jobs").fetchone())
        assert attempts == (1,)  # being told to stop is nobody's fault


async def test_a_message_that_always_fails_is_dead_after_its_attempts_and_the_next_goes_on(
    tmp_path, broker, monkeypatch
):
    def forward(self, slices):
        if any(ord("!") in piece.ids for piece in slices):
            raise RuntimeError("secret words of a user")
        return original(self, slices)

    original = ModelRunner.forward
    monkeypatch.setattr(ModelRunner, "forward", forward)
    monkeypatch.setattr("longstride.service.worker.backoff_s", lambda _failures: 0.01)
    async with peer(broker, ROOT) as client, working(tmp_path, broker, ROOT, attempts=3) as worker:
        await client.send(f"{ROOT}/sessions/s/feed", {"id": "good", "text": "Good."})
        await client.send(f"{ROOT}/sessions/s/feed", {"id": "bad", "text": "Bad!"})
        await client.send(f"{ROOT}/sessions/s/feed", {"id": "next", "text": "Next."})
        await ask_and_hear(client, 1)
        (letter,) = client.on("/dead")
        assert letter["id"] == "bad"
        assert letter["attempts"] == 3
        assert letter["reason"] == "internal error (RuntimeError)"
        session = await worker.assistant.session("s")
        assert kept_text(worker, session) == "Good.\nNext.\n"


async def test_a_message_that_kills_the_worker_is_dead_after_its_attempts(tmp_path, broker):
    async with opened(tmp_path) as assistant:
        jobs = jobs_module.Jobs(assistant.database)
        job = jobs_module.Job(f"s/feed/{signal.SIGKILL}", "s", "feed", f"{ROOT}/sessions/s/feed", b"text")
        jobs.database.write(lambda tables: jobs.receive(tables, job))
        for _ in range(2):  # two lives that ended while it was worked on
            jobs.database.write(lambda tables: jobs.take(tables, set()))
            jobs.database.write(jobs.recover)
    async with peer(broker, ROOT) as client, working(tmp_path, broker, ROOT, attempts=2):
        (letter,) = await client.wait(lambda: client.on("/dead"))
        assert "tried 2 times" in letter["reason"]


async def test_a_nearly_full_disk_is_waited_for_and_blamed_on_no_message(tmp_path, broker, monkeypatch):
    monkeypatch.setattr("longstride.service.worker.backoff_s", lambda _failures: 0.01)
    async with peer(broker, ROOT) as client, working(tmp_path, broker, ROOT, attempts=2) as worker:
        await client.send(f"{ROOT}/sessions/s/feed", {"id": "0", "text": "Before. "})
        await ask_and_hear(client, 0)
        sessions, append, tries = worker.assistant.sessions, worker.assistant.sessions.append, []

        def full(tables, *args):
            tries.append(1)
            if len(tries) < 8:  # what is small fits, what is large does not
                raise sqlite3.OperationalError("database or disk is full")
            return append(tables, *args)

        monkeypatch.setattr(sessions, "append", full)
        await client.send(f"{ROOT}/sessions/s/feed", {"id": "1", "text": "Large."})
        await client.send(f"{ROOT}/sessions/s/feed", {"id": "2", "text": "Next."})
        await until(lambda: "disk is full" in worker.problem)
        await ask_and_hear(client, 1)
        assert client.on("/dead") == []
        session = await worker.assistant.session("s")
        assert kept_text(worker, session) == "Before. \nLarge.\nNext.\n"


async def test_told_to_stop_with_a_full_disk_it_stops(tmp_path, broker):
    async with peer(broker, ROOT) as client, working(tmp_path, broker, ROOT, grace_s=0) as worker:
        await client.send(f"{ROOT}/sessions/s/feed", {"id": "0", "text": "Before. "})
        await client.send(f"{ROOT}/sessions/s/ask", {"id": "q", "question": "what?", "max_tokens": 200})
        await until(lambda: worker._running and "ask" in {task.get_name() for task in worker._running.values()})
        database = worker.jobs.database
        (pages,) = database.read(lambda tables: tables.conn.execute("PRAGMA page_count").fetchone())
        await database.awrite(lambda tables: tables.conn.execute(f"PRAGMA max_page_count={pages}").fetchone())
    async with peer(broker, ROOT) as client, working(tmp_path, broker, ROOT) as worker:  # with room on the disk
        (answer,) = await client.wait(lambda: client.on("/answers"))
        assert answer["id"] == "q"
        assert answer["usage"]["generated"]


async def test_a_message_that_kills_the_worker_takes_no_other_with_it(tmp_path, broker):
    """Each life takes what it may, and dies while the guilty message is among it."""
    async with opened(tmp_path) as assistant:
        jobs = jobs_module.Jobs(assistant.database)
        for name in "abcdef":
            job = jobs_module.Job(f"{name}/feed/1", name, "feed", f"{ROOT}/sessions/{name}/feed", b"text")
            jobs.database.write(lambda tables, job=job: jobs.receive(tables, job))
        for _ in range(30):
            busy: set[str] = set()
            while True:
                # as the worker's dispatch does
                taken = jobs.database.write(
                    lambda t, busy=busy: [] if busy and jobs.suspects(t) else jobs.take(t, busy)
                )
                if not taken:
                    break
                busy.add(taken[0].session)
                if taken[0].session == "c" and taken[0].attempts <= 5:
                    continue
                if len(busy) == 1:  # alone, an innocent one ends
                    end = jobs.bury if taken[0].attempts > 5 else jobs.finish
                    reason = ("guilty",) if end == jobs.bury else ()
                    jobs.database.write(lambda t, job=taken[0], end=end, r=reason: end(t, job.seq, *r, []))
                    busy.clear()
            jobs.database.write(jobs.recover)
        states = jobs.database.read(lambda t: dict(t.conn.execute("select session, state from jobs").fetchall()))
        assert states == {**dict.fromkeys("abdef", "done"), "c": "dead"}


async def test_a_session_that_another_process_fed_is_opened_again(tmp_path, broker, monkeypatch):
    monkeypatch.setattr("longstride.service.worker.backoff_s", lambda _failures: 0.01)
    async with peer(broker, ROOT) as client, working(tmp_path, broker, ROOT) as worker:
        await client.send(f"{ROOT}/sessions/s/feed", {"id": "0", "text": "Mine."})
        await ask_and_hear(client, 0)
        async with opened(tmp_path) as other:
            await (await other.session("s")).feed("Theirs.\n")
        answer = await ask_and_hear(client, 1)
        assert "error" not in answer
        session = await worker.assistant.session("s")
        assert kept_text(worker, session) == "Mine.\nTheirs.\n"


async def test_removing_a_session_does_not_remove_replies_that_are_not_out(tmp_path, broker):
    async with working(tmp_path, broker, ROOT) as worker:
        async with peer(broker, ROOT) as client:
            await client.send(f"{ROOT}/sessions/s/feed", {"id": "0", "text": "Text."})
            await client.send(f"{ROOT}/sessions/s/ask", {"id": "q", "question": "what?"})
            await client.send(f"{ROOT}/sessions/s/close", {"id": "c", "remove": True})
            await until(lambda: worker.jobs.depth()[0] > 1)
            broker.stop()
        await until(lambda: worker.jobs.depth() == (0, 0))
        broker.start()
        async with peer(broker, ROOT) as client:
            (answer,) = await client.wait(lambda: client.on("/answers"))
            assert answer["id"] == "q"


async def test_a_session_at_work_is_not_closed_for_others(tmp_path, broker):
    limits = {"sessions_open": 1, "sessions_at_once": 4}
    async with peer(broker, ROOT) as client, working(tmp_path, broker, ROOT, **limits) as worker:
        for name in "abcd":
            await client.send(f"{ROOT}/sessions/{name}/feed", {"id": "f", "text": TEXT, "notes_every": 300})
            await client.send(f"{ROOT}/sessions/{name}/ask", {"id": name, "question": "what?"})
        await client.wait(lambda: len(client.on("/answers")) == 4)
        attempts = worker.jobs.database.read(lambda t: t.conn.execute("select max(attempts) from jobs").fetchone())
        assert attempts == (1,)
        assert len(worker.assistant._open) <= 2
