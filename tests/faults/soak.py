"""`python -m tests.faults.soak`: a worker is killed again and again; nothing may be lost, doubled or changed.

One process is the nursery: it has imported everything, computes nothing, and forks a worker for each life (a fresh
start takes seconds, a fork none). Another one sends messages and collects replies over a real Mosquitto.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import longstride.engine.runner as runner_module
import longstride.scheduler.turn as turn_module
import longstride.service.mqtt as mqtt_module
import longstride.storage.jobs as jobs_module
from longstride import Assistant
from longstride.service.settings import load_worker_settings
from longstride.service.worker import Worker
from tests.broker import Broker, peer
from tests.tiny import tiny_assistant_model

SETTINGS = {
    "system": "s", "passage_tokens": 24, "passages": 2, "refresh": 8, "stride": 4, "max_tokens": 10, "block_tokens": 16,
    "budget_tokens": 64, "context_tokens": 768, "window": "sinks",
}  # fmt: skip
WINDOWS = ("sinks", "separators", "cascade", "anchors", "anchors-added", "rollup")  # sessions have them in turn
ROOT = "soak"
OUTSTANDING = 40  # messages without a reply at most, so that there is something to take in for every life


def messages(count: int, sessions: int) -> list[tuple[str, str, dict]]:
    """(session, kind, payload) of the whole run; the same every time."""
    rng = random.Random(5)
    out = []
    for number in range(count):
        session = f"s{rng.randrange(sessions)}"
        if rng.random() < 0.6 or number < 2 * sessions:
            session = f"s{number % sessions}" if number < sessions else session
            words = " ".join(f"word{rng.randrange(400)}" for _ in range(rng.choice([3, 10, 60])))
            out.append((session, "feed", {"id": str(number), "text": f"Line {number} says {words}."}))
        else:
            question = f"What of word{rng.randrange(400)} and word{rng.randrange(400)}?"
            out.append((session, "ask", {"id": str(number), "question": question, "remember": rng.random() < 0.2}))
    return out


def window(session: str) -> dict:
    return {"window": WINDOWS[int(session[1:]) % len(WINDOWS)], "recent_tokens": 48, "span_tokens": 16}


async def prepare(db: Path, sessions: int) -> None:
    async with Assistant.open(db, model=tiny_assistant_model(), **SETTINGS) as assistant:
        for number in range(sessions):
            await assistant.session(f"s{number}", **window(f"s{number}"))


# --- one life of the worker ---


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(owner, name: str, count: int, *, after_start: bool = False) -> None:
    """Let the process kill itself in the `count`-th call of a method; with `after_start`, once that is under way."""
    original, calls = getattr(owner, name), Counter()

    def call(*args, **named):
        calls[name] += 1
        if calls[name] == count and not after_start:
            die()
        result = original(*args, **named)
        if calls[name] == count:
            asyncio.get_running_loop().call_later(0, die)
        return result

    setattr(owner, name, call)


def kill_in_prefill(count: int) -> None:
    original, seen = runner_module.ModelRunner.forward, Counter()

    def forward(self, slices):
        seen["long"] += sum(len(piece.ids) for piece in slices) >= 32
        if seen["long"] == count:
            die()
        return original(self, slices)

    runner_module.ModelRunner.forward = forward


POINTS = {
    "before a message's commit": lambda n: kill_at(jobs_module.Jobs, "receive", n),
    "after it, before the acknowledgement": lambda n: kill_at(mqtt_module.Link, "acknowledge", n),
    "during prefill": kill_in_prefill,
    "mid-answer": lambda n: kill_at(turn_module.Turn, "_take", 3 * n),
    "before the answer's commit": lambda n: kill_at(jobs_module.Jobs, "finish", n),
    "after it, before the publication": lambda n: kill_at(mqtt_module.Link, "publish", n),
    "after that, before its acknowledgement": lambda n: kill_at(mqtt_module.Link, "publish", n, after_start=True),
}


def live(db: Path, url: str, point: str | None, count: int) -> None:
    """Be a worker until told to stop, or until `point` is reached for the `count`-th time. Never returns."""
    code = 1
    try:
        if point is not None:
            POINTS[point](count)
        torch.set_num_threads(1)

        async def work() -> None:
            async with Assistant.open(db, model=tiny_assistant_model(), **SETTINGS) as assistant:
                worker = Worker(assistant, load_worker_settings(broker=url, topics=ROOT, attempts=50, grace_s=5))
                asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
                await worker.run()

        asyncio.run(work())
        code = 0
    finally:
        os._exit(code)


# --- the other side ---


async def exchange(broker: Broker, plan: list[tuple[str, str, dict]]) -> tuple[list[dict], list[dict]]:
    """Send the plan, never more than `OUTSTANDING` ahead of the replies; returns the replies and the dead letters."""
    async with peer(broker, ROOT, "soak-client") as client:

        def heard() -> set[str]:
            return {data["id"] for data in client.on("/replies/all")}

        await client.wait(lambda: client.on("/status"))  # the broker keeps messages from the first subscription on
        for sent, (session, kind, payload) in enumerate(plan):
            await client.wait(lambda sent=sent: len(heard()) > sent - OUTSTANDING, 600)
            await client.send(f"{ROOT}/sessions/{session}/{kind}", payload, reply=f"{ROOT}/replies/all")
        await client.wait(lambda: len(heard()) == len(plan), 600)
        await asyncio.sleep(1)  # for what would come twice
        return client.on("/replies/all"), client.on("/dead")


async def unbroken(db: Path, plan: list[tuple[str, str, dict]]) -> tuple[dict[str, str], dict[str, list[int]]]:
    """The answers and the streams of a run that nothing interrupts, one session after the other."""
    answers, streams = {}, {}
    async with Assistant.open(db, model=tiny_assistant_model(), **SETTINGS) as assistant:
        for name in sorted({session for session, _, _ in plan}):
            session = await assistant.session(name, **window(name))
            for of, kind, payload in plan:
                if of == name and kind == "feed":
                    await session.feed(payload["text"] + "\n")
                elif of == name:
                    answer = await session.answer(payload["question"], remember=payload["remember"])
                    answers[payload["id"]] = answer.text
            streams[name] = session.stream.tolist()
    return answers, streams


def check(db: Path, plan: list, replies: list[dict], dead: list[dict], expected: dict, streams: dict) -> list[str]:
    """What is wrong; empty when all is well."""
    wrong = [f"{len(dead)} dead letters: {dead[:2]}"] if dead else []
    by_key: dict[str, list[dict]] = {}
    for reply in replies:
        by_key.setdefault(reply["id"], []).append(reply)
    for _, kind, payload in plan:
        got = by_key.get(payload["id"], [])
        if not got:
            wrong.append(f"{payload['id']} was never answered")
        elif any(reply != got[0] for reply in got):
            wrong.append(f"{payload['id']} was answered in different ways")
        elif kind == "ask" and got[0]["text"] != expected[payload["id"]]:
            wrong.append(f"{payload['id']} was answered otherwise than in an unbroken run")
    for name in streams:
        first = list(dict.fromkeys(reply["id"] for reply in replies if reply["session"] == name))
        if first != [payload["id"] for session, _, payload in plan if session == name]:
            wrong.append(f"the replies of {name} are out of order")
    with sqlite3.connect(db) as base:
        if base.execute("PRAGMA integrity_check").fetchone() != ("ok",):
            wrong.append("the database fails its integrity check")
        states = dict(base.execute("select state, count(*) from jobs group by state"))
        if states != {"done": len(plan)}:
            wrong.append(f"jobs: {states} instead of {len(plan)} done")
        answers = base.execute("select count(*) from answers where kind = 'ask'").fetchone()[0]
        if answers != len(expected):
            wrong.append(f"{answers} answers are stored instead of {len(expected)}")
        for name, ids in streams.items():
            rows = base.execute(
                "select ids from runs join sessions on id = session_id where name = ? order by start", [name]
            )
            if b"".join(row[0] for row in rows) != torch.tensor(ids, dtype=torch.int32).numpy().tobytes():
                wrong.append(f"the stream of {name} is not what was sent, in order and once")
    base.close()
    return wrong


children: list[int] = []  # that were not seen to end


def fork(work) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        children.append(child)
        return child
    work()
    os._exit(0)


def ended(child: int, timeout_s: float) -> int | None:
    """The exit status of a child, or None if it still runs after a while."""
    until = time.monotonic() + timeout_s
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            children.remove(child)
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.005)


def kill(child: int) -> None:
    """At once, and wait until it is gone."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    children.remove(child)


def run(folder: Path, kills: int, count: int, sessions: int, seed: int) -> list[str]:
    """The whole soak; returns what went wrong."""
    rng = random.Random(seed)
    plan, db, heard = messages(count, sessions), folder / "soak.db", folder / "replies.json"
    broker = Broker(folder / "broker").start()
    started = time.monotonic()
    where: Counter[str] = Counter()
    try:
        if ended(fork(lambda: asyncio.run(prepare(db, sessions))), 60) != 0:
            return ["the sessions could not be made"]
        client = fork(lambda: heard.write_text(json.dumps(asyncio.run(exchange(broker, plan)))))
        for _ in range(kills):
            point = rng.choice([None, None, *POINTS])
            child = fork(lambda p=point: live(db, broker.url, p, rng.randint(1, 6)))
            # a named point kills from within; a worker that does not come by it for a while is killed at random too
            status = ended(child, rng.uniform(0.05, 1.2) if point is None else 4)
            if status is None:
                kill(child)
                point = None
            elif status != -signal.SIGKILL:
                return [f"a worker ended by itself with {status}"]
            where[point or "at random"] += 1
            if ended(client, 0) is not None:
                return [f"all was answered after {sum(where.values())} kills; send more messages"]
        last = fork(lambda: live(db, broker.url, None, 0))
        if ended(client, 900) != 0:
            return ["not everything was answered"]
        os.kill(last, signal.SIGTERM)
        if ended(last, 30) != 0:
            return ["the worker did not stop cleanly"]
    finally:
        while children:  # something went wrong
            kill(children[-1])
        broker.stop()
    replies, dead = json.loads(heard.read_text())
    torch.set_num_threads(1)
    expected, streams = asyncio.run(unbroken(folder / "unbroken.db", plan))
    print(f"{kills} kills, {count} messages, {sessions} sessions, {time.monotonic() - started:.0f} s")
    for name, number in where.most_common():
        print(f"  {number:4d}  {name}")
    print(f"  {len(replies) - len({r['id'] for r in replies})} replies came twice over the wire, each time the same")
    return check(db, plan, replies, dead, expected, streams)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--messages", type=int, default=2000)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wrong = run(Path(folder), given.kills, given.messages, given.sessions, given.seed)
    for line in wrong:
        print(f"WRONG: {line}")
    print("nothing lost, nothing doubled, every text as in an unbroken run" if not wrong else f"{len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
