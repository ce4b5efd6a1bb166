"""What a forward costs on this device, learned from the forwards that were run."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from longstride.engine.attention import Slice

Floats = npt.NDArray[np.float64]


class StepCosts:
    """Seconds of a forward as fixed + a row + a key + a (row, key) pair, fitted by least squares of relative errors.

    The four terms are the weights read once, the products of each row, the keys and values read once, and the scores.
    The first `FREE` rows count as so many in any case: their products are done while the weights are on their way.
    Older forwards are forgotten with a memory of about `MEMORY`. Before the first one, and for what was not tried yet,
    the proportions are a guess that suits a small model on a CPU.
    """

    START = np.array([5.0, 2.2, 1.8, 0.6])  # ms: once, a row, 1,000 keys, a row over 1,000 keys
    FREE = 5
    POINTS = np.array([[1.0, FREE, 0.0, 0.0], [1.0, 16.0, 0.0, 0.0], [1.0, FREE, 4.0, 4.0], [1.0, 16.0, 4.0, 64.0]])
    WEIGHT = 0.3  # of each point, where an observation has 1; it enters squared
    MEMORY = 64.0
    MOST_ROWS = 96  # forwards that read text say little about drafts
    OUTLIER = 3.0

    def __init__(self) -> None:
        self._seen = -1  # the first forward of a process is slower than all others and says nothing
        self._scale = 1e-3
        self._matrix = np.zeros((4, 4))
        self._vector = np.zeros(4)
        self.terms: Floats = self.START / 1000

    def observe(self, slices: Sequence[Slice], seconds: float) -> None:
        """A forward over `slices` took so long."""
        rows = sum(len(piece.ids) for piece in slices)
        if not 0 < rows <= self.MOST_ROWS or seconds <= 0:
            return
        keys = sum(piece.stop for piece in slices) / 1000
        pairs = sum(len(piece.ids) * piece.stop for piece in slices) / 1000
        point = np.array([1.0, max(rows, self.FREE), keys, pairs])
        self._seen += 1
        if self._seen == 0:
            return
        if self._seen > 1:
            seconds = min(seconds, self.OUTLIER * float(point @ self.terms))
        scale = seconds / float(point @ self.START)
        self._scale += (scale - self._scale) / min(self._seen, self.MEMORY)
        weighted = point / seconds
        self._matrix = self._matrix * (1 - 1 / self.MEMORY) + np.outer(weighted, weighted)
        self._vector = self._vector * (1 - 1 / self.MEMORY) + weighted
        start = self.WEIGHT * self.POINTS / (self.POINTS @ self.START * self._scale)[:, None]
        self.terms = _solved(self._matrix + start.T @ start, self._vector + self.WEIGHT * start.sum(0))

    def curve(self, rows: int, keys: int) -> Callable[[int], float]:
        """What a forward of `rows` rows, of which some are of a sequence over `keys` keys, takes in seconds with
        so many further rows of that sequence."""
        once, row, key, pair = (float(term) for term in self.terms)
        fixed, more = once + (key + pair) * keys / 1000, pair * keys / 1000
        return lambda further: fixed + row * max(rows + further, self.FREE) + more * further


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
    return np.maximum(terms, [1e-9, 0.0, 0.0, 0.0])
