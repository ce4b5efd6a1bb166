"""`Retriever`: what to retrieve. One index over the documents, one over each session's own stream."""

import asyncio
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from longstride.scheduler.index import PassageIndex, scores
from longstride.storage.documents import Documents, StoredPassage


@dataclass(frozen=True)
class Passage:
    """A retrieved passage. `start`, `stop`: characters in the document (for a stream: in the stream's text).

    `tokens`: its span in the stream, None for a document's passage.
    """

    id: str
    document: str
    start: int
    stop: int
    text: str
    score: float = 0.0
    tokens: tuple[int, int] | None = None


class StreamIndex:
    """The passages of one session's stream, searchable. `text_of` gives the text of a token span."""

    def __init__(self, name: str, text_of: Callable[[int, int], str]) -> None:
        self.name = name
        self.index = PassageIndex()
        self.spans: list[tuple[int, int, int, int]] = []  # tokens from, to; characters from, to
        self._text_of = text_of
        self._lock = threading.Lock()

    def add(self, spans: Sequence[tuple[int, int, int, int]]) -> None:
        """Add passages; blocks (call it in a worker thread)."""
        with self._lock:
            self.spans += spans  # before the index has them: a search never finds one without its span
            self.index.add([self._text_of(a, b) for a, b, _, _ in spans])
        if self.index.merge_due:
            self.index.merge()

    def passage(self, number: int, score: float) -> Passage:
        """Passage `number`, with its text."""
        a, b, c, d = self.spans[number]
        return Passage(f"{self.name}:{a}", self.name, c, d, self._text_of(a, b), score, (a, b))


class DocumentIndex:
    """The passages of the documents in the database, kept up to date with it (another process may add some)."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self._revision = (0, 0)
        self._lock = threading.Lock()
        self.index = PassageIndex()
        self.passages: list[StoredPassage] = []

    def refresh(self) -> tuple[PassageIndex, list[StoredPassage]]:
        """Take in what was added since; start anew when something was removed. Returns the index and its passages,
        which belong together whatever is refreshed later. Blocks."""
        with self._lock:
            self._refresh()
            return self.index, self.passages

    def _refresh(self) -> None:
        count, last = self._documents.revision()
        if (count, last) == self._revision:
            return
        new = self._documents.passages(after=self._revision[1])
        if len(self.passages) + len(new) != count:
            self.index, self.passages = PassageIndex(), []
            new = self._documents.passages()
        self.passages += new  # before the index has them, as above
        self.index.add([passage.text for passage in new])
        self._revision = (len(self.passages), self.passages[-1].id if self.passages else 0)
        if self.index.merge_due:
            self.index.merge()

    @staticmethod
    def passage(stored: StoredPassage, score: float) -> Passage:
        """A stored passage, as found."""
        return Passage(
            f"{stored.document_id[:12]}:{stored.id}",
            stored.document,
            stored.start,
            stored.stop,
            stored.text,
            score,
        )


class Retriever:
    """Searches the documents and a stream together, with one set of statistics."""

    def __init__(self, documents: Documents) -> None:
        self.documents = DocumentIndex(documents)

    async def search(
        self, query: str, count: int, stream: StreamIndex | None = None, visible_from: int = 0
    ) -> list[Passage]:
        """The `count` best passages with a score above 0, best first; in a worker thread.

        Passages of the stream that reach past token `visible_from` are in the context already and left out.
        """
        return await asyncio.to_thread(self._search, query, count, stream, visible_from)

    def _search(self, query: str, count: int, stream: StreamIndex | None, visible_from: int) -> list[Passage]:
        index, passages = self.documents.refresh()
        indexes = [index, *([stream.index] if stream is not None else [])]
        found: list[tuple[float, int, int]] = []
        for s, values in enumerate(scores(indexes, query)):
            if s == 1 and stream is not None:
                spans = stream.spans[: len(values)]
                hidden = _first_reaching(spans, visible_from)
                values = values[:hidden]  # noqa: PLW2901 - the visible end of the stream is cut off
            best = np.flatnonzero(values > 0)
            if len(best) > count:
                best = best[np.argpartition(-values[best], count - 1)[:count]]
            found += [(float(values[i]), s, int(i)) for i in best]
        # equal scores: the order of adding decides, so that a search is repeatable
        found.sort(key=lambda hit: (-hit[0], hit[1], hit[2]))
        return [
            stream.passage(i, value) if s and stream is not None else self.documents.passage(passages[i], value)
            for value, s, i in found[:count]
        ]


def _first_reaching(spans: Iterable[tuple[int, int, int, int]], token: int) -> int:
    """How many leading spans end at or before `token`."""
    return sum(1 for span in spans if span[1] <= token)
