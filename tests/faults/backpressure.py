"""`python -m tests.faults.backpressure`: a producer far faster than the worker; the broker holds the rest.

Memory stays flat, the connection lives, and at the end every message is either in the database or still at the broker.
"""

import argparse
import asyncio
import json
import os
import signal
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

import aiomqtt
import torch
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from longstride import Assistant
from longstride.service.settings import load_worker_settings
from longstride.service.worker import Worker
from tests.broker import Broker, peer
from tests.faults.soak import SETTINGS, children, ended, fork, kill
from tests.tiny import tiny_assistant_model

ROOT, LIMIT, KEEPALIVE_S = "pressure", 200, 5


def live(db: Path, url: str) -> None:
    """Be a worker until told to stop. Never returns."""
    code = 1
    try:
        torch.set_num_threads(1)

        async def work() -> None:
            # caches that are full early on, and no texts kept for drafts, so that what grows is something else
            caches = {"pieces_limit_bytes": 1 << 20, "blocks_limit_bytes": 1 << 22, "drafting": "off"}
            async with Assistant.open(db, model=tiny_assistant_model(), **SETTINGS, **caches) as assistant:
                settings = load_worker_settings(
                    broker=url, topics=ROOT, inbox_limit=LIMIT, keepalive_s=KEEPALIVE_S, grace_s=5
                )
                worker = Worker(assistant, settings)
                asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
                await worker.run()

        asyncio.run(work())
        code = 0
    finally:
        os._exit(code)


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def waiting(db: Path) -> tuple[int, int]:
    """(done, waiting) messages in the database."""
    with sqlite3.connect(db) as base:
        states = dict(base.execute("select state, count(*) from jobs group by state"))
    base.close()
    return states.get("done", 0), states.get("queued", 0) + states.get("working", 0)


async def press(
    broker: Broker, db: Path, pid: int, seconds: float, times: float
) -> tuple[list[str], list[float], list[str]]:
    """Send for a while; returns the ids that were sent, the worker's memory by second, and its announcements."""
    sent: list[str] = []
    memory: list[float] = []
    async with peer(broker, ROOT) as client:
        await client.wait(lambda: client.on("/status"))
        await client.send(f"{ROOT}/sessions/s/feed", {"id": "first", "text": "Something to be asked about. " * 10})
        sent.append("first")
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            done, _ = await asyncio.to_thread(waiting, db)
            elapsed = time.monotonic() - started
            # so many times what the worker has done by now, and enough to begin with
            target = max(20 * elapsed, times * done)
            while len(sent) < target and time.monotonic() - started < elapsed + 1:
                kind, what = ("feed", "text") if len(sent) % 10 == 0 else ("ask", "question")
                await client.send(f"{ROOT}/sessions/s/{kind}", {"id": f"n{len(sent)}", what: f"What of {len(sent)}?"})
                sent.append(f"n{len(sent)}")
            memory.append(resident_mb(pid))
            await asyncio.sleep(max(0.0, started + len(memory) - time.monotonic()))
        return sent, memory, [status["state"] for status in client.on("/status")]


async def what_is_left(broker: Broker) -> set[str]:
    """Take what the broker still holds for the worker."""
    properties = Properties(PacketTypes.CONNECT)
    properties.SessionExpiryInterval = 600
    client = aiomqtt.Client(
        "127.0.0.1", broker.port, identifier=f"{ROOT}-worker", protocol=aiomqtt.ProtocolVersion.V5, clean_start=False,
        properties=properties,
    )  # fmt: skip
    left: set[str] = set()
    async with client:
        messages = aiter(client.messages)
        while True:
            try:
                message = await asyncio.wait_for(anext(messages), 5)
            except TimeoutError:
                return left
            left.add(json.loads(message.payload)["id"])


def run(folder: Path, seconds: float, times: float) -> list[str]:
    db = folder / "pressure.db"
    broker = Broker(folder / "broker").start()
    wrong = []
    try:
        worker = fork(lambda: live(db, broker.url))
        sent, memory, states = asyncio.run(press(broker, db, worker, seconds, times))
        done, waits = waiting(db)
        os.kill(worker, signal.SIGTERM)
        if ended(worker, 60) != 0:
            wrong.append("the worker did not stop cleanly")
        with sqlite3.connect(db) as base:
            stored = {key.rpartition(" ")[2] for (key,) in base.execute("select key from jobs")}
        base.close()
        left = asyncio.run(what_is_left(broker))
    finally:
        while children:  # something went wrong
            kill(children[-1])
        broker.stop()
    print("memory, MB:", " ".join(f"{mb:.0f}" for mb in memory[:: max(1, len(memory) // 20)]))
    part = max(1, len(memory) // 5)
    early, late = max(memory[part : 2 * part]), max(memory[-part:])
    often = len(sent) / max(1, done)
    print(f"{seconds:.0f} s: {len(sent):,} sent, {done:,} done ({often:.1f} times as many), {waits} waiting")
    print(f"{len(stored):,} in the database, {len(left):,} at the broker; {early:.0f} MB early, {late:.0f} MB late")
    if set(sent) != stored | left:
        wrong.append(f"{len(set(sent) - stored - left)} messages were lost")
    if waits > LIMIT + 1:
        wrong.append(f"{waits} messages wait in the database, {LIMIT} may")
    if late > early * 1.05 + 10:
        wrong.append("memory grows")
    if states != ["online"]:
        wrong.append(f"the connection did not hold: {states}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--times", type=float, default=20, help="messages sent for each one that is done")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wrong = run(Path(folder), given.seconds, given.times)
    for line in wrong:
        print(f"WRONG: {line}")
    print("nothing dropped, memory flat, the connection held" if not wrong else f"{len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
