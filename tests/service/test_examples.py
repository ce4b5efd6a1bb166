"""The example that sends lines to a worker."""

import asyncio
import subprocess
import sys
from pathlib import Path

from tests.service.test_worker import working

EXAMPLE = Path(__file__).parents[2] / "examples" / "follow_a_queue.py"


async def test_follow_a_queue(tmp_path, broker):
    async with working(tmp_path, broker, "longstride") as worker:
        lines = "The same line.\n" * 3
        command = [sys.executable, str(EXAMPLE), "127.0.0.1", str(broker.port), "log", "What comes?"]
        options = {"input": lines, "capture_output": True, "text": True, "timeout": 60, "check": True}
        done = await asyncio.to_thread(subprocess.run, command, **options)
        session = await worker.assistant.session("log")
        assert worker.assistant.model.tokenizer.decode(session.stream) == lines
        (answer,) = worker.assistant.sessions.answers(session.id)
        assert done.stdout.strip() == answer["text"].strip()
