"""The device loop: one thread that runs forwards, shared by all sessions.

Three verbs a step: choose slices, `runner.forward`, each session accepts its rows. Whatever a session wants of the
device (read a chunk, decode a token, re-encode after a cut) is the slices its sequence has due and a function of the
rows that come back; this loop knows none of these kinds. Waiting sequences share a forward, so sessions are batched.
"""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from longstride.engine.attention import Slice
from longstride.engine.runner import ModelRunner
from longstride.engine.sequence import Sequence
from longstride.errors import Busy

T = TypeVar("T")
log = logging.getLogger("longstride")
Accept = Callable[[torch.Tensor | None], Any]
BESIDE = 8  # the part of the budget that a forward may use while someone is being answered
ANSWERING_S = 0.25  # how long after a decoded token that is taken to be so
REGROUP_S = 0.005  # waited at most for those who shared the last forward
PATIENCE = 4  # forwards that a step may be left over before it goes first


@dataclass(eq=False)
class _Step:
    """A sequence's wish for one forward."""

    sequence: Sequence
    accept: Accept
    future: "Future[Any]" = field(default_factory=Future)
    slices: list[Slice] = field(default_factory=list)
    passed: int = 0  # forwards that left it over
    running: bool = False

    @property
    def rows(self) -> int:
        """Rows in the forward."""
        return sum(len(piece.ids) for piece in self.slices)

    @property
    def writes(self) -> bool:
        """Whether it is one token of a text being written, with or without a draft."""
        return self.rows - sum(piece.drafted for piece in self.slices) == 1

    def start(self) -> bool:
        """Whether it still wants to run; from now on it can no longer be withdrawn."""
        if not self.running:
            self.running = self.future.set_running_or_notify_cancel()
        return self.running


class Device:
    """Runs steps of sequences and calls in order on its own thread. `budget_tokens`: new tokens a forward."""

    def __init__(self, runner: ModelRunner, *, budget_tokens: int = 512, max_waiting: int = 256) -> None:
        self.runner = runner
        self.budget_tokens = budget_tokens
        self.max_waiting = max_waiting
        self._waiting: deque[_Step] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._together = 0  # steps that shared the last forward or were left over by it
        self._answered = -math.inf  # when a token was last decoded
        self._writer: Sequence | None = None  # the text it was for, None when there were several
        self._thread = threading.Thread(target=self._loop, name="longstride-device", daemon=True)
        self._thread.start()

    async def step(self, sequence: Sequence, accept: Callable[[torch.Tensor | None], T]) -> T:
        """Give `sequence` one forward; `accept` gets the logits of its last row and of its draft
        [1 + drafted rows, vocabulary] on the device thread, or None when more of it is still due; returns its result.

        Cancelling waits for a forward under way (one step at most) and leaves the sequence usable. Raises `Busy`
        at the queue's bound.
        """
        step = _Step(sequence, accept)
        with self._wake:
            if self._closing:
                raise RuntimeError("the device was closed")
            if len(self._waiting) >= self.max_waiting:
                raise Busy(f"{self.max_waiting} steps are waiting for the device; try again later")
            self._waiting.append(step)
            self._wake.notify()
        result: T = await _settled(step.future)
        return result

    async def call(self, work: Callable[[], T]) -> T:
        """Run `work` on the device thread between forwards (copies of rows)."""
        future: Future[T] = Future()
        with self._wake:
            if self._closing:
                raise RuntimeError("the device was closed")
            self._calls.append((work, future))
            self._wake.notify()
        return await _settled(future)

    def close(self) -> None:
        """Finish the forward under way and stop; whatever still waits is cancelled."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        for step in self._waiting:
            if not step.future.cancel():
                step.future.set_exception(RuntimeError("the device was closed"))
        for _, future in self._calls:
            future.cancel()

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._calls or self._closing)
                # who shared the last forward is about to ask for the next; together they cost little more than one
                self._wake.wait_for(self._regrouped, REGROUP_S)
                if self._closing:
                    return
                calls, self._calls = list(self._calls), deque()
                steps, self._waiting = list(self._waiting), deque()
            for work, future in calls:
                if future.set_running_or_notify_cancel():
                    _settle(future, work)
            self._together = self._forward([step for step in steps if step.start()])

    def _regrouped(self) -> bool:
        return len(self._waiting) >= self._together or bool(self._calls) or self._closing

    def _forward(self, steps: list[_Step]) -> int:
        """One forward for as many steps as the budget holds; the rest goes back to the front of the queue.

        Returns how many steps shared it or wait for the next.
        """
        # small ones first: a token of an answer is not kept waiting by a book, and the book gets what is left;
        # who has been left over a few times goes first
        steps.sort(key=lambda step: step.sequence.pending if step.passed < PATIENCE else -step.passed)
        left = self.budget_tokens
        writers = [step.sequence for step in steps if step.sequence.pending == 1]
        if writers:
            self._answered = time.monotonic()
            self._writer = writers[0] if len(writers) == 1 else None
        alone = len(steps) == 1 and steps[0].sequence is self._writer  # then nobody else waits
        if time.monotonic() - self._answered < ANSWERING_S and not alone:
            left = max(left // BESIDE, len(steps))  # someone waits for tokens: whoever reads takes small bites
        # who reads leaves half to drafts, which take no more of what the others have due
        drafts = max(left // 2, left - sum(step.sequence.pending for step in steps))
        chosen: list[_Step] = []
        for at, step in enumerate(steps):
            if left <= 0:
                for passed in steps[at:]:
                    passed.passed += 1
                with self._wake:
                    self._waiting.extendleft(reversed(steps[at:]))
                break
            try:
                step.slices = step.sequence.take(max(1, left - (len(steps) - at - 1)), drafts=drafts)
            except Exception as error:  # noqa: BLE001 - whatever it is belongs to this session alone
                step.future.set_exception(error)
                continue
            left -= step.rows
            drafts -= sum(piece.drafted for piece in step.slices)
            chosen.append(step)
        try:
            self._run(chosen)
        except Exception as error:  # noqa: BLE001 - reported to the session it belongs to
            if len(chosen) == 1:
                chosen[0].future.set_exception(error)
                return 0
            for step in chosen:  # one of them is at fault; the others must not suffer for it
                try:
                    self._run([step])
                except Exception as own:  # noqa: BLE001
                    step.future.set_exception(own)
        return len(steps)

    def _run(self, steps: list[_Step]) -> None:
        """The forward itself; hands every step its rows."""
        slices = [piece for step in steps for piece in step.slices]
        rows = iter(self.runner.forward(slices) if slices else [])
        written = sum(step.writes for step in steps)
        total = sum(step.rows for step in steps)
        for step in steps:
            last = None
            for _ in step.slices:
                last = next(rows)
            logits = last if last is not None and last.shape[0] else None
            step.sequence.company = (written - step.writes, total - step.rows)
            _settle(step.future, partial(self._accept, step, logits))

    @staticmethod
    def _accept(step: _Step, logits: torch.Tensor | None) -> Any:
        step.sequence.accept(step.slices)
        return step.accept(logits)


def _settle(future: "Future[Any]", work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except Exception as error:  # noqa: BLE001 - carried to whoever awaits it
        future.set_exception(error)


async def ended(future: "asyncio.Future[T]") -> None:
    """Wait until `future` is done, however often this is cancelled meanwhile."""
    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([future])


async def finished(work: Awaitable[T]) -> T:
    """Await `work` to its end even when cancelled meanwhile; the cancellation is raised afterwards."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await ended(task)
        if not task.cancelled() and task.exception() is not None:
            log.warning("a cancelled session could not be saved: %s", task.exception())
        raise


async def _settled(future: "Future[T]") -> T:
    """Await `future`; when cancelled, withdraw it if it still waits, else let it finish first."""
    waiter = asyncio.wrap_future(future)
    try:
        return await asyncio.shield(waiter)
    except asyncio.CancelledError:
        if not future.cancel():
            await ended(waiter)  # the device is busy with this sequence for at most one step
            if not waiter.cancelled():
                waiter.exception()  # the caller has gone; the sequence stays usable
        raise
