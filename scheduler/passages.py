"""Splitting text into passages: at sentence ends, at most so many tokens each."""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from longstride.engine.tokenizer import REPLACEMENT, Tokenizer

_SENTENCE = re.compile(r"[^.!?\n]*(?:[.!?]+[\"'”’)\]]*(?=\s|$)\s*|[.!?]+|\n\s*|$)")


def split_text(text: str, tokenizer: Tokenizer, limit: int) -> list[tuple[int, int]]:
    """Character spans covering all that is not blank; a sentence longer than `limit` tokens is cut at a space."""
    spans: list[tuple[int, int]] = []
    start = stop = tokens = 0
    for a, b in _pieces(text, tokenizer, limit):
        size = len(tokenizer.encode(text[a:b]))
        # blanks at a passage's end are trimmed, so they do not count against it
        if tokens and tokens + size > limit and tokens + len(tokenizer.encode(text[a:b].rstrip())) > limit:
            spans.append((start, stop))
            tokens = 0
        if not tokens:
            start = a
        stop = b
        tokens += size
    if tokens:
        spans.append((start, stop))
    return [trimmed for span in spans if (trimmed := _trim(text, *span)) is not None]


def _trim(text: str, start: int, stop: int) -> tuple[int, int] | None:
    body = text[start:stop]
    if not body.strip():
        return None
    return start + len(body) - len(body.lstrip()), stop - (len(body) - len(body.rstrip()))


def _pieces(text: str, tokenizer: Tokenizer, limit: int) -> Iterator[tuple[int, int]]:
    """Spans of sentences, and of parts of sentences that are too long."""
    for match in _SENTENCE.finditer(text):
        if match.end() > match.start():
            yield from _halves(text, match.start(), match.end(), tokenizer, limit)


def _halves(text: str, start: int, stop: int, tokenizer: Tokenizer, limit: int) -> Iterator[tuple[int, int]]:
    # a token is at least one byte, so a short span needs no count
    if (
        stop - start <= limit // 4
        or stop - start == 1
        or (stop - start <= 64 * limit and len(tokenizer.encode(text[start:stop].rstrip())) <= limit)
    ):
        yield start, stop
        return
    middle = (start + stop) // 2
    spaces = [at + 1 for at in (text.rfind(" ", start, middle), text.find(" ", middle, stop - 1)) if at >= 0]
    cut = min(spaces, key=lambda at: abs(at - middle), default=middle)
    yield from _halves(text, start, cut, tokenizer, limit)
    yield from _halves(text, cut, stop, tokenizer, limit)


class StreamSplitter:
    """Splits a growing stream of token ids into passages as it arrives.

    A passage ends after the last sentence-ending token in the second half of its `limit` tokens, else at `limit`.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int, start: int = 0) -> None:
        self.limit = limit
        self.start = start  # stream index of the first token not yet in a passage
        self._tokenizer = tokenizer
        self._ends = lru_cache(maxsize=65536)(self._ends_sentence)

    def _ends_sentence(self, token: int) -> bool:
        text = self._tokenizer.decode([token])
        return "\n" in text or text.rstrip("\"'”’)] ").endswith((".", "!", "?"))

    def _whole(self, ids: Sequence[int]) -> bool:
        return not self._tokenizer.decode(ids).endswith(REPLACEMENT)

    def take(self, stream: Sequence[int]) -> list[tuple[int, int]]:
        """Token spans that `stream` (all of it so far) has completed since the last call."""
        spans: list[tuple[int, int]] = []
        while len(stream) - self.start >= self.limit:
            stop = self.start + self.limit
            floor = self.start + self.limit // 2
            best = next((i + 1 for i in range(stop - 1, floor, -1) if self._ends(stream[i])), stop)
            # not in the middle of a character, which has four tokens at most
            ends = (end for end in range(best, max(best - 4, floor), -1) if self._whole(stream[self.start : end]))
            best = next(ends, best)
            spans.append((self.start, best))
            self.start = best
        return spans
