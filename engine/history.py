"""`History`: token ids that were seen, searched for the longest earlier occurrence of the last few."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
WINDOW = 32  # a match longer than this is as good as this
LEVELS = (1, 2, 4, 8, 16)  # tokens that are hashed together
CHAIN = 16  # occurrences looked at, a level
PLACES = 6  # matches told of: more of them, shorter and older ones, foretell worse (measured on logs and summaries)
GAP = -1  # stands between texts that do not continue one another
SMALL = 10  # bits of the smallest hash table
FEW = 12  # ids that are entered one by one
WHOLE = (1 << 64) - 1
NOWHERE = np.empty(0, np.int64)
MIX = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)


def hashes(ids: npt.NDArray[np.int32]) -> list[Hashes]:
    """For each level a hash of the last k ids, for every place in `ids` that has k ids up to it."""
    now = (ids.astype(np.int64) + 2).astype(np.uint64) * np.uint64(MIX[0])
    width, found = 1, []
    for level in LEVELS:
        while width < level:
            # arithmetic is modulo 2^64; a longer hash is two shorter ones side by side
            now = now[width:] * np.uint64(MIX[1]) + (now[:-width] ^ (now[:-width] >> np.uint64(29)))
            width *= 2
        found.append((now ^ (now >> np.uint64(32))) * np.uint64(MIX[0]))
    return found


def few_hashes(ids: Sequence[int]) -> list[list[int]]:
    """`hashes` in plain integers: for a few ids, arrays cost more than what they hold."""
    now = [(id_ + 2) * MIX[0] & WHOLE for id_ in ids]
    width, found = 1, []
    for level in LEVELS:
        while width < level:
            pairs = zip(now[width:], now, strict=False)
            now = [(later * MIX[1] + (earlier ^ earlier >> 29)) & WHOLE for later, earlier in pairs]
            width *= 2
        found.append([(hash_ ^ hash_ >> 32) * MIX[0] & WHOLE for hash_ in now])
    return found


def last_hashes(tail: Sequence[int]) -> list[int]:
    """For each level that `tail` is long enough for, the hash of its last k ids."""
    return [found[-1] for found in few_hashes(tail[-LEVELS[-1] :]) if found]


class History:
    """Token ids that grow at the end, each position chained to the last one before it with the same k last tokens.

    One chain for each k of `LEVELS`, as in deflate's matcher: the longest chain key that occurs finds matches at least
    that long, and comparing backwards tells how long they are. An append is O(1) amortised, a look-up O(1). Memory: 4
    bytes for the id and 8 to 12 a level, all with up to half as much again to grow into: under 100 bytes a token.
    """

    def __init__(self, ids: Sequence[int] = ()) -> None:
        self.size = 0
        self._ids = np.empty(0, np.int32)
        self._before = np.empty((len(LEVELS), 0), np.int32)
        self._latest = np.empty((len(LEVELS), 0), np.int32)
        self._bits = 0
        self.extend(ids)

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """What was added so far, a view."""
        return self._ids[: self.size]

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return self._ids.nbytes + self._before.nbytes + self._latest.nbytes

    def extend(self, ids: Sequence[int]) -> None:
        """Add ids at the end."""
        if not len(ids):
            return
        start, size = self.size, self.size + len(ids)
        if size > len(self._ids):
            self._grow(size)
        self._ids[start:size] = ids
        self.size = size
        if self.size > self._latest.shape[1]:
            self._bits = max(SMALL, self.size.bit_length())
            self._latest = np.full((len(LEVELS), 1 << self._bits), -1, np.int32)
            start = 0  # the tables are made anew, for at least as many ids as are in them
        self._chain(start)

    def _grow(self, size: int) -> None:
        used, capacity = self.size, max(1 << SMALL, size + size // 2)
        ids, before = np.empty(capacity, np.int32), np.empty((len(LEVELS), capacity), np.int32)
        ids[:used], before[:, :used] = self._ids[:used], self._before[:, :used]
        self._ids, self._before = ids, before

    def _chain(self, start: int) -> None:
        """Enter positions from `start` on."""
        first = max(0, start - max(LEVELS) + 1)
        if self.size - start <= FEW and start >= max(LEVELS):
            self._chain_few(start, self._ids[first : self.size].tolist())
            return
        for level, found in enumerate(hashes(self._ids[first : self.size])):
            new = self._slots(found[max(0, start - (self.size - len(found))) :])
            if not len(new):
                continue
            before, latest = self._before[level], self._latest[level]
            order = np.argsort(new, kind="stable")
            places, slots = (order + self.size - len(new)).astype(np.int32), new[order]
            before[places] = latest[slots]
            again = np.flatnonzero(slots[1:] == slots[:-1]) + 1
            before[places[again]] = places[again - 1]
            latest[slots] = places  # of equal slots the last assignment stands

    def _chain_few(self, start: int, ids: list[int]) -> None:
        """Enter the last of `ids`."""
        for level, found in enumerate(few_hashes(ids)):
            before, latest = self._before[level], self._latest[level]
            for place, hash_ in enumerate(found[start - self.size :], start):
                slot = hash_ >> (64 - self._bits)
                before[place] = latest[slot]
                latest[slot] = place

    def _slots(self, found: Hashes) -> Ints:
        return (found >> np.uint64(64 - self._bits)).astype(np.int64)

    def matches(self, tail: Sequence[int], keys: Sequence[int] | None = None) -> tuple[Ints, Ints]:
        """Where the end of `tail` occurs, longest first and then latest first, at most PLACES: (place after it, length
        up to WINDOW). `keys`: `last_hashes`, where they are at hand.

        Occurrences at the very end, which nothing follows, are left out; at most `CHAIN` are looked at for each level,
        so a match of k tokens for any k of `LEVELS` is found if there is one.
        """
        if not self.size:
            return NOWHERE, NOWHERE
        wanted = np.asarray(tail[-WINDOW:], np.int32)
        keys = last_hashes(tail) if keys is None else keys
        places: dict[int, None] = {}
        for level in range(len(keys) - 1, -1, -1):
            before, place = self._before[level], int(self._latest[level, keys[level] >> (64 - self._bits)])
            for _ in range(CHAIN):
                if place < 0:
                    break
                places[place] = None
                place = int(before[place])
        ends = np.fromiter((p for p in places if p + 1 < self.size), np.int64)
        if not len(ends):
            return NOWHERE, NOWHERE
        back = ends[:, None] - np.arange(len(wanted))
        same = (self._ids[np.maximum(back, 0)] == wanted[::-1]) & (back >= 0)
        lengths = np.where(same.all(1), len(wanted), np.argmin(same, 1))
        order = np.lexsort((-ends, -lengths))
        order = order[lengths[order] >= LEVELS[0]][:PLACES]
        return ends[order] + 1, lengths[order]

    def continuations(self, places: Ints, count: int, *, live: bool) -> npt.NDArray[np.int32]:
        """The `count` ids from each place on [places, count], `GAP` after the end of a text.

        `live`: the history's end is where the drafted text will stand, so a continuation that reaches it goes on with
        its own beginning, as a text that has begun to repeat itself does.
        """
        steps = np.arange(count)
        at = places[:, None] + (steps % (self.size - places)[:, None] if live else steps)
        found = np.where(at < self.size, self._ids[np.minimum(at, self.size - 1)], GAP)
        return np.where(np.logical_or.accumulate(found == GAP, 1), GAP, found).astype(np.int32)
