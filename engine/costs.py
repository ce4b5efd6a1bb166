"""What a forward costs on this device, learned from the forwards that were run."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from longstride.engine.attention import Slice

Floats = npt.NDArray[np.float64]


class StepCosts:
    """Seconds of a forward as once + more than one row + rows + further rows + further passes + keys + (row, key)
    pairs, fitted by least squares of relative errors.

    The terms are the weights read once, what it costs that there are several rows at all, what each row costs besides,
    the products of rows beyond the first `free`, by row and by pass (up to `free` rows share one over the weights), the
    keys and values read once, and the scores. The first pass is done while the weights are on their way.
    Older forwards are forgotten with a memory of about `MEMORY`. For what was not tried lately the proportions are a
    guess: one that suits a small model on a CPU, or what was `measured`.
    """

    START = np.array([15.0, 0.3, 0.3, 1.0, 5.0, 1.8, 0.6])  # ms; see `terms`
    WEIGHT = 0.4  # of each guessed point, where an observation has 1; it enters squared
    MEMORY = 64.0
    MOST_ROWS = 96  # forwards that read text say little about drafts
    OUTLIER = 3.0
    ANEW = 4  # observations after which the terms are fitted anew, once there are many or they were measured

    def __init__(self, free: int = 5) -> None:
        self.free = free
        self._start: Floats = self.START / 1000
        self._guessed = np.array(
            [self._point(n, n * keys, keys) for keys in (0, 4) for n in (1, 2, free, free + 1, 3 * free)]
        )
        self._seen = -1  # the first forward of a process is slower than all others and says nothing
        self._fitted = 0
        self._scale = 1.0
        self._known = False  # whether the guess was measured here
        self._matrix = np.zeros((len(self.START), len(self.START)))
        self._vector = np.zeros(len(self.START))
        self._terms = self._start

    def _point(self, rows: int, pairs: float, keys: float) -> list[float]:
        beyond, passes = max(0, rows - self.free), (rows - 1) // self.free
        return [1.0, float(rows > 1), float(rows), float(beyond), float(passes), keys, pairs]

    def observe(self, slices: Sequence[Slice], seconds: float) -> None:
        """A forward over `slices` took so long."""
        rows = sum(len(piece.ids) for piece in slices)
        if not 0 < rows <= self.MOST_ROWS or seconds <= 0:
            return
        keys = sum(piece.stop for piece in slices) / 1000
        point = np.array(self._point(rows, sum(len(piece.ids) * piece.stop for piece in slices) / 1000, keys))
        self._seen += 1
        if self._seen == 0:
            return
        if self._seen > 1:
            seconds = min(seconds, self.OUTLIER * float(point @ self._terms))
        self._scale += (seconds / float(point @ self._start) - self._scale) / min(self._seen, self.MEMORY)
        weighted = point / seconds
        self._matrix = self._matrix * (1 - 1 / self.MEMORY) + np.outer(weighted, weighted)
        self._vector = self._vector * (1 - 1 / self.MEMORY) + weighted

    @property
    def terms(self) -> Floats:
        """Seconds: once, for several rows, a row, a row beyond the free ones, a pass beyond the first,
        1,000 keys, a row over 1,000 keys."""
        if self._seen >= self._fitted + (self.ANEW if self._known or self._seen > self.MEMORY else 1):
            start = self.WEIGHT * self._guessed / (self._guessed @ self._start * self._scale)[:, None]
            self._terms = _solved(self._matrix + start.T @ start, self._vector + self.WEIGHT * start.sum(0))
            self._fitted = self._seen
        return self._terms

    def measured(self, points: Sequence[tuple[int, int, float]]) -> None:
        """Forwards of (rows, keys, seconds), of all kinds, that were run to find out: they replace the guess."""
        found = np.array([self._point(rows, rows * keys / 1000, keys / 1000) for rows, keys, _ in points])
        weighted = found / np.array([[seconds] for *_, seconds in points])
        self._start, self._scale, self._known = _solved(weighted.T @ weighted, weighted.sum(0)), 1.0, True
        self._terms, self._fitted = self._start, self._seen

    def curve(self, rows: int, keys: int) -> Callable[[int], float]:
        """What a forward of `rows` rows, of which some are of a sequence over `keys` keys, takes in seconds with
        so many further rows of that sequence."""
        once, some, row, beyond, turn, key, pair = (float(term) for term in self.terms)
        fixed, more = once + row * rows + (key + pair) * keys / 1000, row + pair * keys / 1000
        free = self.free

        def cost(further: int) -> float:
            whole = rows + further
            later = beyond * max(0, whole - free) + turn * ((whole - 1) // free)
            return fixed + some * (whole > 1) + more * further + later

        return cost


def _solved(matrix: Floats, vector: Floats) -> Floats:
    """Least squares without negative terms: those that would be are left out, one after the other."""
    kept = list(range(len(vector)))
    while True:
        fitted = np.linalg.solve(matrix[np.ix_(kept, kept)], vector[kept])
        if fitted.min() >= 0 or len(kept) == 1:
            break
        del kept[int(fitted.argmin())]
    terms = np.zeros(len(vector))
    terms[kept] = fitted
    terms[0] = max(terms[0], 1e-9)
    return np.maximum(terms, 0.0)
