"""`Retriever`: what to retrieve. One index over the documents, one over each session's own stream."""

import asyncio
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

    def add(self, spans: Sequence[tuple[int, int, int, int]]) -> None:
        """Add passages; blocks (call it in a worker thread)."""
        self.index.add([self._text_of(a, b) for a, b, _, _ in spans])
        self.spans += spans
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
        self.index = PassageIndex()
        self.passages: list[StoredPassage] = []

    def refresh(self) -> None:
        """Take in what was added since; start anew when something was removed. Blocks."""
        count, last = self._documents.revision()
        if (count, last) == self._revision:
            return
        new = self._documents.passages(after=self._revision[1])
        if len(self.passages) + len(new) != count:
            self.index, self.passages = PassageIndex(), []
            new = self._documents.passages()
        self.index.add([passage.text for passage in new])
        self.passages += new
        self._revision = (len(self.passages), self.passages[-1].id if self.passages else 0)
        if self.index.merge_due:
            self.index.merge()

    def passage(self, number: int, score: float) -> Passage:
        """Passage `number`."""
        stored = self.passages[number]
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
        self.documents.refresh()
        sources: list[DocumentIndex | StreamIndex] = [
            self.documents,
            *([stream] if stream is not None else []),
        ]
        found: list[tuple[float, int, int]] = []
        for s, values in enumerate(scores([source.index for source in sources], query)):
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
        return [sources[s].passage(i, value) for value, s, i in found[:count]]


def _first_reaching(spans: Iterable[tuple[int, int, int, int]], token: int) -> int:
    """How many leading spans end at or before `token`."""
    return sum(1 for span in spans if span[1] <= token)
