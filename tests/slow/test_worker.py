"""The `longstride worker` command with the embedded model: logs, a clean stop, a second start."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.broker import Broker, peer

pytestmark = pytest.mark.real_model
NAME, PASSWORD = "Wilhelmina", "sesame"
QUESTION = "Who said that the harvest was good?"


@pytest.fixture
def broker(tmp_path):
    lines = (f"password_file {tmp_path}/passwords", "allow_anonymous false")
    folder = tmp_path / "broker"
    subprocess.run(["mosquitto_passwd", "-c", "-b", f"{tmp_path}/passwords", "me", PASSWORD], check=True)
    made = Broker(folder, lines=lines).start()
    yield made
    made.stop()


def start(folder, broker) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "longstride.cli.main", "worker", "--broker", broker.url, "--user", "me"]
    return subprocess.Popen(
        [*command, "--password-file", "password", "--health-file", "health.json"],
        cwd=folder, env={**os.environ, "LONGSTRIDE_MAX_TOKENS": "24"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def stop(process) -> list[dict]:
    """End it with SIGTERM; returns what it logged."""
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert PASSWORD not in said
    assert NAME not in said
    return [json.loads(line) for line in said.splitlines()]


async def test_the_command_follows_a_queue_stops_cleanly_and_goes_on(tmp_path, broker):
    (tmp_path / "password").write_text(PASSWORD + "\n")
    worker = start(tmp_path, broker)
    async with peer(broker, user="me", password=PASSWORD) as client:
        await client.wait(lambda: client.on("/status"), 120)
        for i in range(5):
            await client.send("longstride/sessions/talk/feed", f"{NAME} said on day {i} that the harvest was good.")
        await client.send("longstride/sessions/talk/ask", {"id": "1", "question": QUESTION})
        (answer,) = await client.wait(lambda: client.on("/answers"))
        assert NAME in answer["text"]
        log = stop(worker)
        messages = [line["message"] for line in log]
        assert messages[0] == "started"
        assert messages[-1] == "stopped"
        arrived = [line["request"] for line in log if line["message"] == "received"]
        worked = ", ".join(line["request"] for line in log if line["message"] == "done").split(", ")
        assert arrived == worked  # each can be followed from its arrival to its end
        assert arrived[-1] == "talk/ask/id 1"

        worker = start(tmp_path, broker)
        await client.wait(lambda: [s["state"] for s in client.on("/status")][-2:] == ["stopped", "online"], 120)
        await client.send("longstride/sessions/talk/ask", {"id": "2", "question": QUESTION})
        answers = await client.wait(lambda: len(client.on("/answers")) == 2 and client.on("/answers"))
        assert answers[1]["text"] == answer["text"]
        assert stop(worker)[0]["waiting"] == 0
