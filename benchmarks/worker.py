"""Messages through a real broker with the embedded model: tokens a second, and seconds to an answer, by sessions.

Every session follows a meeting or a log of its own, a message a line, and is asked about it meanwhile. Throughput: all
messages are there at once. Latency: each session gets a line every `--pace` seconds; from sending a question to the
first of its answer's text and to its end.
"""

import argparse
import asyncio
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Row, plot, report, shipped_text
from longstride.engine.model import Model, load_model
from longstride.scheduler.assistant import Assistant
from longstride.service.settings import load_worker_settings
from longstride.service.worker import Worker
from tests.broker import Broker, Peer, peer

LOGS = ("hdfs", "apache", "openssh", "spark")
QUESTIONS = {"meeting": "What are they talking about?", "log": "Which components wrote the last lines?"}
ASK_EVERY = 15  # lines


@dataclass(frozen=True)
class Stream:
    """What one session follows."""

    name: str
    kind: str
    lines: list[str]


def streams(count: int, lines: int, data: Path | None) -> list[Stream]:
    """Meetings and logs in turn from the folder `data`; without it, parts of the shipped chapters."""
    if data is None:
        parts = [line for line in shipped_text().splitlines() if line]
        return [Stream(f"book{i}", "meeting", parts[i * lines : (i + 1) * lines]) for i in range(count)]
    said: dict[str, list[str]] = {}
    for line in (data / "streams" / "qmsum.messages.jsonl").read_text(encoding="utf-8").splitlines():
        message = json.loads(line)
        said.setdefault(message["stream"], []).append(f"{message['speaker']}: {message['text']}")
    meetings = [Stream(name, "meeting", text[:lines]) for name, text in said.items()]
    logs = [
        Stream(name, "log", (data / "streams" / f"log_{name}.txt").read_text(encoding="utf-8").splitlines()[:lines])
        for name in LOGS
    ]
    return [(meetings, logs)[i % 2][i // 2] for i in range(count)]


class Exchange:
    """One run: sends the streams with their questions, and hears the answers."""

    def __init__(self, client: Peer, root: str, tokens: int) -> None:
        self.client = client
        self.root = root
        self.tokens = tokens
        self.asked: dict[str, float] = {}

    async def follow(self, stream: Stream, pace_s: float) -> None:
        """Send one stream, a line every `pace_s` seconds."""
        base = f"{self.root}/sessions/{stream.name}"
        for number, line in enumerate(stream.lines, 1):
            await self.client.send(f"{base}/feed", {"id": str(number), "text": line})
            if number % ASK_EVERY == 0:
                id_ = f"{stream.name} {number}"
                question = {"question": QUESTIONS[stream.kind], "stream": True, "max_tokens": self.tokens}
                self.asked[id_] = time.perf_counter()
                await self.client.send(f"{base}/ask", {"id": id_, **question})
            await asyncio.sleep(pace_s)

    async def answers(self) -> list[dict[str, Any]]:
        """All answers, when they are there."""
        await self.client.wait(lambda: len(self.client.on("/answers")) >= len(self.asked), 3600)
        return self.client.on("/answers")

    def latencies(self) -> tuple[list[float], list[float]]:
        """Seconds to the first text and to the end of each answer."""
        first: dict[str, float] = {}
        whole: dict[str, float] = {}
        for (topic, data, _), at in zip(self.client.seen, self.client.times, strict=True):
            if topic.endswith("/stream"):
                first.setdefault(str(data["id"]), at - self.asked[str(data["id"])])
            elif topic.endswith("/answers"):
                whole[str(data["id"])] = at - self.asked[str(data["id"])]
        return list(first.values()), list(whole.values())


async def one_run(
    model: Model, broker: Broker, folder: Path, chosen: list[Stream], options: argparse.Namespace, pace_s: float
) -> tuple[float, Exchange]:
    """(tokens read and generated a second, what was exchanged) of a fresh worker."""
    root = f"run{time.monotonic_ns()}"
    settings = load_worker_settings(broker=broker.url, topics=root, sessions_at_once=len(chosen))
    async with Assistant.open(folder / f"{root}.db", model=model, window="sinks") as assistant:
        worker = Worker(assistant, settings)
        working = asyncio.create_task(worker.run())
        await worker.connected.wait()
        async with peer(broker, root) as client:
            exchange = Exchange(client, root, options.tokens)
            began = time.perf_counter()
            await asyncio.gather(*(exchange.follow(stream, pace_s) for stream in chosen))
            answers = await exchange.answers()
            elapsed = time.perf_counter() - began
        worker.stop()
        await working
        read = sum(stored.tokens for stored in assistant.sessions.all())
        generated = sum(answer["usage"]["generated"] for answer in answers)
    return (read + generated) / elapsed, exchange


async def measure(model: Model, options: argparse.Namespace, folder: Path) -> list[Row]:
    """Rows by number of sessions."""
    rows = []
    broker = Broker(folder / "broker").start()
    try:
        for n in map(int, options.sessions.split(",")):
            setting = {"length": f"{n} sessions"}
            chosen = streams(n, options.lines, options.data)
            throughput = Row("one-session" if n == 1 else "together", setting, "tokens/s")
            first, whole = Row("first text", setting, "s"), Row("whole answer", setting, "s")
            for _ in range(options.rounds):
                throughput.runs.append((await one_run(model, broker, folder, chosen, options, 0.0))[0])
            _, exchange = await one_run(model, broker, folder, chosen, options, options.pace)
            first.runs, whole.runs = exchange.latencies()
            rows += [throughput, first, whole]
    finally:
        broker.stop()
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="the folder of evaluation texts")
    parser.add_argument("--sessions", default="1,2,4,8")
    parser.add_argument("--lines", type=int, default=45, help="messages a session")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer at most")
    parser.add_argument("--pace", type=float, default=2.0, help="seconds between the lines of a session, for latency")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    model = load_model(options.model)
    with tempfile.TemporaryDirectory() as folder:
        rows = asyncio.run(measure(model, options, Path(folder)))
    throughput = [row for row in rows if row.unit == "tokens/s"]
    ratios = {f"one-session @ {row.setting['length']}": row.median / throughput[0].median for row in throughput[1:]}
    report(rows, ratios, {"dtype": str(model.runner.dtype)}, options.json)
    if options.plot is not None:
        plot(
            [row for row in rows if row.unit == "s"], "Seconds to an answer, by sessions followed at once", options.plot
        )


if __name__ == "__main__":
    main()
