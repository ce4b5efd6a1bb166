"""What commands share: input that is waited for."""

import asyncio
import os
import threading

import pytest

from longstride.cli.common import arriving


async def taken(items):
    return [item async for item in arriving(items)]


async def test_items_arrive_in_order_and_end():
    assert await taken(iter(range(50))) == list(range(50))
    assert await taken(iter([])) == []


async def test_an_error_is_raised_where_the_items_are_awaited():
    def items():
        yield 1
        raise OSError("gone")

    arrived = arriving(items())
    assert await anext(arrived) == 1
    with pytest.raises(OSError, match="gone"):
        await anext(arrived)


async def test_no_more_than_needed_is_made_ahead():
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    arrived = arriving(items())
    assert await anext(arrived) == 0
    await asyncio.sleep(0.1)
    assert len(made) <= 3
    await arrived.aclose()


async def test_whoever_makes_items_ends_when_nobody_wants_them():
    arrived = arriving(iter(int, 1))  # without end
    assert await anext(arrived) == 0
    await arrived.aclose()
    for _ in range(100):
        if not any(thread.name == "longstride-input" for thread in threading.enumerate()):
            break
        await asyncio.sleep(0.02)
    assert not any(thread.name == "longstride-input" for thread in threading.enumerate())


async def test_waiting_for_input_can_be_cancelled():
    """As Ctrl-C does while a quiet pipe is read."""
    reading, writing = os.pipe()
    task = asyncio.create_task(taken(iter(lambda: os.read(reading, 10), b"")))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    os.close(writing)
