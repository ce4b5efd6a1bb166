"""The device loop: who shares a forward, and how much of it a reader gets beside an answer."""

import asyncio
import threading

import pytest

from longstride.engine.context import Context, Placement
from longstride.engine.draft import Node, ordered
from longstride.engine.sequence import Sequence
from longstride.scheduler.device import BESIDE, Device
from tests.tiny import tiny_model

BUDGET = 128


class Recorder:
    """A runner that notes the slices' sizes of each forward."""

    def __init__(self, runner):
        self.runner, self.forwards = runner, []

    def forward(self, slices):
        self.forwards.append([len(piece.ids) for piece in slices])
        return self.runner.forward(slices)


@pytest.fixture
def device():
    device = Device(Recorder(tiny_model("llama")[1]), budget_tokens=BUDGET)
    yield device
    device.close()


def sequence(due, done=0):
    """A sequence with `done` rows computed and `due` more wanted."""
    runner = tiny_model("llama")[1]
    context = Context([1, 2], placement=Placement.END, limit=1024, reserved=0)
    made = Sequence(runner, context, max_rows=1024)
    context.append([3] * done)
    made.run(runner)
    context.append([4] * due)
    return made


async def run_together(device, *sequences):
    """Let all ask for a step before the device takes the first."""
    release = threading.Event()
    held = asyncio.create_task(device.call(lambda: release.wait(30)))
    await asyncio.sleep(0)
    tasks = [asyncio.create_task(device.step(one, lambda logits: logits)) for one in sequences]
    await asyncio.sleep(0)  # each has queued its step
    release.set()
    await held
    return await asyncio.gather(*tasks)


async def test_sessions_that_decode_together_share_a_forward(device):
    rows = await run_together(device, *(sequence(1, done) for done in (5, 9, 30)))
    assert device.runner.forwards == [[1, 1, 1]]
    assert all(row.shape[0] == 1 for row in rows)


async def test_who_reads_beside_an_answer_takes_small_bites(device):
    reading = sequence(500, 10)
    await run_together(device, reading, sequence(1, 20))
    assert device.runner.forwards == [[1, BUDGET // BESIDE - 1]]
    assert reading.pending == 500 - (BUDGET // BESIDE - 1)


async def test_who_reads_alone_takes_the_whole_budget(device):
    await run_together(device, sequence(500, 10))
    assert device.runner.forwards == [[BUDGET]]


async def test_a_draft_leaves_a_reader_half_of_the_bite(device):
    reading, writing = sequence(500, 10), sequence(1, 20)
    root = parent = Node(-1, None, 0, 1.0, [])
    nodes = []
    for token in range(20):
        parent = Node(token, parent, parent.depth + 1, 1.0, [])
        nodes.append(parent)
    writing.draft = ordered(root, nodes)
    bite = BUDGET // BESIDE
    rows, _ = await run_together(device, writing, reading)
    assert device.runner.forwards == [[1 + bite // 2, bite - 1 - bite // 2]]
    assert rows.shape[0] == 1 + bite // 2
    assert writing.company == (0, bite - 1 - bite // 2)
    assert reading.company == (1, 1 + bite // 2)


async def test_the_next_question_on_a_text_does_not_wait_for_its_own_last_answer(device):
    """Small bites are for others: where nobody else is answered, a prompt is read at once."""
    one = sequence(1, 20)
    await run_together(device, one)
    one.context.append([5] * 300)
    await run_together(device, one)
    assert device.runner.forwards == [[1], [BUDGET]]
