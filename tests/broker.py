"""A real Mosquitto for tests, in a folder of its own, on a free port; it can be stopped, killed and started again."""

import asyncio
import json
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiomqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

T = TypeVar("T")
new_properties: Callable[[int], Properties] = Properties  # paho's own has no types
PROGRAM = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Broker:
    """`lines` of configuration come on top. With `persistent` it remembers over `stop` and `start`."""

    def __init__(self, folder: Path, *, persistent: bool = True, lines: tuple[str, ...] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self._config = folder / "mosquitto.conf"
        text = [
            f"listener {self.port} 127.0.0.1", "allow_anonymous true", "max_queued_messages 0", "log_dest none",
            "user root", f"persistence {str(persistent).lower()}", f"persistence_location {folder}/",
            "autosave_interval 1", *lines,
        ]  # fmt: skip
        self._config.write_text("\n".join(text) + "\n")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Broker":
        if PROGRAM is None:
            raise RuntimeError("these tests need Mosquitto: install the package mosquitto (see CONTRIBUTING.md)")
        self._process = subprocess.Popen([PROGRAM, "-c", str(self._config)])
        until = time.monotonic() + 20
        while time.monotonic() < until and self._process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            time.sleep(0.02)
        raise RuntimeError("Mosquitto did not start")

    def stop(self, *, kill: bool = False) -> None:
        if self._process is not None:
            (self._process.kill if kill else self._process.terminate)()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


class Peer:
    """Another program on the broker: asks, and collects what is published."""

    def __init__(self, client: aiomqtt.Client) -> None:
        self.client = client
        self.seen: list[tuple[str, dict[str, Any], bytes | None]] = []  # topic, JSON, correlation data
        self.times: list[float] = []  # when each came
        self._news = asyncio.Condition()

    async def send(
        self, topic: str, payload: Any, *, reply: str | None = None, correlation: bytes | None = None
    ) -> None:
        """Publish, as JSON if it is not bytes or text, until the broker has it."""
        properties = new_properties(PacketTypes.PUBLISH)
        if reply is not None:
            properties.ResponseTopic = reply
        if correlation is not None:
            properties.CorrelationData = correlation
        data = payload if isinstance(payload, bytes | str) else json.dumps(payload)
        await self.client.publish(topic, data, 1, properties=properties, timeout=60)

    async def collect(self) -> None:
        """Note what comes, until cancelled."""
        async for message in self.client.messages:
            correlation = getattr(message.properties, "CorrelationData", None)
            async with self._news:
                self.seen.append((str(message.topic), json.loads(bytes(message.payload)), correlation))
                self.times.append(time.perf_counter())
                self._news.notify_all()

    def on(self, end: str) -> list[dict[str, Any]]:
        """What came on topics that end so."""
        return [data for topic, data, _ in self.seen if topic.endswith(end)]

    async def wait(self, found: Callable[[], T], timeout_s: float = 60.0) -> T:
        """What `found()` gives, as soon as it gives something."""

        async def until() -> None:
            async with self._news:
                await self._news.wait_for(found)

        await asyncio.wait_for(until(), timeout_s)
        return found()


async def until(found: Callable[[], T], timeout_s: float = 60.0) -> T:
    """What `found()` gives, as soon as it gives something; it may block."""
    end = time.monotonic() + timeout_s
    while not (result := await asyncio.to_thread(found)):
        assert time.monotonic() < end, "it did not come true"
        await asyncio.sleep(0.01)
    return result


@asynccontextmanager
async def peer(broker: Broker, root: str = "longstride", name: str | None = None, **login: str) -> AsyncIterator[Peer]:
    """A `Peer` that hears all replies of the worker."""
    client = aiomqtt.Client(
        "127.0.0.1", broker.port, protocol=aiomqtt.ProtocolVersion.V5, identifier=name,
        username=login.get("user"), password=login.get("password"),
    )  # fmt: skip
    async with client:
        made = Peer(client)
        topics = [
            "sessions/+/answers",
            "sessions/+/notes",
            "sessions/+/stream",
            "dead",
            "workers/+/status",
            "replies/#",
        ]
        await client.subscribe([(f"{root}/{topic}", 1) for topic in topics])
        collecting = asyncio.create_task(made.collect())
        try:
            yield made
        finally:
            collecting.cancel()
            await asyncio.gather(collecting, return_exceptions=True)
            if client._disconnected.done():
                client._disconnected.exception()  # a broker that was stopped: asyncio need not tell
