"""The examples run."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.broker import Broker
from tests.service.test_worker import working

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str, cwd: Path, given: str = "") -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=cwd, input=given, capture_output=True, text=True, timeout=300, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.real_model
def test_read_and_ask(tmp_path):
    (tmp_path / "harvest.txt").write_text("Wilhelmina said that the harvest was good. " * 5)
    said = run("read_and_ask.py", "harvest.txt", "Who said that the harvest was good?", cwd=tmp_path)
    assert said.startswith("read ")
    assert "Wilhelmina" in said
    again = run("read_and_ask.py", "harvest.txt", "Who said that the harvest was good?", cwd=tmp_path)
    assert again.splitlines()[0] == said.splitlines()[1]  # not read again, and the same answer


@pytest.mark.real_model
def test_engine_alone(tmp_path):
    assert run("engine_alone.py", cwd=tmp_path).strip()


async def test_follow_a_queue(tmp_path):
    broker = Broker(tmp_path / "broker").start()
    try:
        async with working(tmp_path, broker, "longstride") as worker:
            lines = "The same line.\n" * 3
            arguments = ("127.0.0.1", str(broker.port), "log", "What comes?")
            said = await asyncio.to_thread(run, "follow_a_queue.py", *arguments, cwd=tmp_path, given=lines)
            session = await worker.assistant.session("log")
            assert worker.assistant.model.tokenizer.decode(session.stream) == lines
            (answer,) = worker.assistant.sessions.answers(session.id)
            assert said.strip() == answer["text"].strip()
    finally:
        broker.stop()
