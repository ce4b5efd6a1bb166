"""Confidence intervals by bootstrap over documents (Efron 1979): what would come out over other documents of a kind.

Targets of one document resemble each other, so whole documents are drawn, never single targets.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ROUNDS = 2000


class Interval(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def mean(sums: Sequence[float], counts: Sequence[float], *, rounds: int = ROUNDS, seed: int = 0) -> Interval:
    """The mean over all targets, of documents that have `sums` over `counts` targets.

    For a difference of two systems give the sums of the differences: it is paired then, which is much narrower.
    """
    s, c = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    if not len(s) or not c.sum():
        raise ValueError("no documents to take a mean of")
    drawn = np.random.default_rng(seed).integers(0, len(s), (rounds, len(s)))
    totals = c[drawn].sum(1)
    means = s[drawn].sum(1)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(s.sum() / c.sum()), float(low), float(high))


def perplexity(losses: Interval) -> Interval:
    """Interval of a mean loss in nats -> of its perplexity (or, for a difference, of the ratio of two)."""
    return Interval(*(float(np.exp(x)) for x in losses))
