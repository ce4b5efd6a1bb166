"""A short soak; `python -m tests.faults.soak` is the long one."""

import sys

from tests.processes import run


def test_a_worker_killed_again_and_again_loses_and_doubles_nothing():
    command = [sys.executable, "-m", "tests.faults.soak", "--kills", "25", "--messages", "400", "--sessions", "5"]
    done = run(command, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "nothing lost, nothing doubled" in done.stdout
