"""Confidence intervals over documents: what would come out over other documents of a kind.

Targets of one document resemble each other, so whole documents are what is counted, never single targets. The intervals
are Student's, of a ratio of sums (Cochran 1977, 2.11): a bootstrap over as few documents as an evaluation here has is
much too sure of itself (over four, its 95 % hold the truth four times in five).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

# 97.5 % quantiles of Student's t for 1 degree of freedom and up
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Interval(NamedTuple):
    """A value and the ends of its 95 % interval; None where one document says nothing of others."""

    value: float
    low: float | None
    high: float | None

    @property
    def known(self) -> tuple[float, float]:
        """The ends; the value itself where they are not known."""
        return (self.value, self.value) if self.low is None or self.high is None else (self.low, self.high)

    def shown(self, form: str) -> str:
        """For people: the value and its ends, each as `form` has it."""
        ends = "-" if self.low is None else ", ".join(format(end, form) for end in self.known)
        return f"{self.value:{form}} [{ends}]"


def by_document(names: Iterable[str], values: Iterable[float]) -> list[float]:
    """Sums of values by the document each is of, in the order of the documents' first."""
    sums: dict[str, float] = {}
    for name, value in zip(names, values, strict=True):
        sums[name] = sums.get(name, 0.0) + value
    return list(sums.values())


def mean(sums: Sequence[float], counts: Sequence[float]) -> Interval:
    """The mean over all targets, of documents that have `sums` over `counts` targets.

    For a difference of two systems give the sums of the differences: it is paired then, which is much narrower.
    """
    s, c = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    s, c = s[c > 0], c[c > 0]
    if not len(s):
        raise ValueError("no documents to take a mean of")
    value, free = float(s.sum() / c.sum()), len(s) - 1
    if free < 1:
        return Interval(value, None, None)
    error = math.sqrt(float(((s - value * c) ** 2).sum()) * len(s) / free) / float(c.sum())
    far = error * (STUDENT[free - 1] if free <= len(STUDENT) else 1.96 + 2.4 / free)
    return Interval(value, value - far, value + far)


def perplexity(losses: Interval) -> Interval:
    """Interval of a mean loss in nats -> of its perplexity (or, for a difference, of the ratio of two)."""
    return scaled(losses, math.exp)


def scaled(interval: Interval, by: Callable[[float], float]) -> Interval:
    """The interval of a growing function of the value."""
    value, low, high = interval
    return Interval(by(value), None if low is None else by(low), None if high is None else by(high))
