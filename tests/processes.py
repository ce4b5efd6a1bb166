"""Processes that tests start: however a test ends, they are gone, and so is whatever they started themselves."""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own, which is killed at the end."""
    with subprocess.Popen(command, text=True, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run(
    command: list[str], *, timeout: float = 300, given: str = "", **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run to the end; `given` is its standard input. Raises `subprocess.TimeoutExpired` after `timeout` seconds.

    What it writes goes to files: a pipe would be waited for as long as anything that it started lives.
    """
    with tempfile.TemporaryFile("w+") as into, tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        into.write(given)
        into.seek(0)
        with started(command, stdin=into, stdout=out, stderr=err, **options) as process:
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired as error:
                err.seek(0)
                error.add_note(f"it said: {err.read()[-4000:]}")
                raise
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), err.read())
