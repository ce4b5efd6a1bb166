"""A short run; `python -m tests.faults.backpressure` is the long one."""

import sys

from tests.processes import run


def test_a_producer_far_faster_than_the_worker_is_held_back_by_the_broker():
    command = [sys.executable, "-m", "tests.faults.backpressure", "--seconds", "15"]
    done = run(command)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "nothing dropped, memory flat" in done.stdout
