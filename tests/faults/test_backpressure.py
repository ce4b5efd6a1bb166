"""A short run; `python -m tests.faults.backpressure` is the long one."""

import subprocess
import sys


def test_a_producer_far_faster_than_the_worker_is_held_back_by_the_broker():
    command = [sys.executable, "-m", "tests.faults.backpressure", "--seconds", "15"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "nothing dropped, memory flat" in done.stdout
