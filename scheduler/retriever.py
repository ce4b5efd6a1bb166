"""`Retriever`: what to retrieve. One index over the documents, one over each session's own stream."""

import asyncio
import io
import logging
import threading
from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from longstride.scheduler.index import Mask, PassageIndex, Selection, scores
from longstride.storage.documents import Documents, Revision
from longstride.storage.indexes import Indexes, StoredIndex

log = logging.getLogger("longstride")
FORMAT = "documents 1"
SAVE_AFTER = 1000  # passages not in the stored index; a twentieth of a large one
SELECTIONS = 64  # kept; one is made anew in about a millisecond


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
    """The passages of the documents in the database, kept up to date with it (another process may add some).

    What was indexed is stored now and then, so that the next process need not read all text again.
    """

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self._stored = Indexes(documents.database)
        self._revision: Revision | None = None
        self._saved = 0
        self._lock = threading.Lock()
        self.index = PassageIndex()
        self.ids = array("q")  # passage ids in the database, by number in the index
        self._members: dict[str, array[int]] = {}  # passage ids by collection
        self._selections: dict[frozenset[str] | None, Selection] = {}  # by collections; of this revision

    def refresh(self, collections: Collection[str] | None = None) -> tuple[Selection, "array[int]"]:
        """Take in what was added since; start anew when something was removed. Returns the passages of documents in
        `collections` (None: all) and the ids of all, which belong together whatever is refreshed later. Blocks."""
        with self._lock:
            self._refresh()
            return self._select(None if collections is None else frozenset(collections)), self.ids

    def _select(self, collections: frozenset[str] | None) -> Selection:
        selection = self._selections.get(collections)
        if selection is None:
            if len(self._selections) >= SELECTIONS:
                self._selections.pop(next(iter(self._selections)))
            selection = self.index.select(None if collections is None else self._mask(collections))
            self._selections[collections] = selection
        return selection

    def _mask(self, collections: frozenset[str]) -> Mask:
        """Which of the index's passages are in one of `collections`."""
        ids = np.array(self.ids, np.int64)
        allowed = np.zeros(ids[-1] + 1 if len(ids) else 0, np.bool_)  # by id; ids grow with the numbers
        for name in collections:
            members = np.array(self._members.get(name, ()), np.int64)
            allowed[members[members < len(allowed)]] = True
        return allowed[ids]

    def _refresh(self) -> None:
        if self._documents.revision() == self._revision:
            return
        if self._revision is None:
            self._load()
        self._selections.clear()
        # before the passages: what happens in between changes the revision, and is taken in at the next search
        members = self._documents.members(since=self._revision or (0, 0))
        new = self._documents.passages(after=self.ids[-1] if self.ids else 0)
        if len(self.ids) + len(new) != self._documents.count():
            self.index, self.ids, self._saved = PassageIndex(), array("q"), 0
            new = self._documents.passages()
        self.ids.extend(passage.id for passage in new)  # before the index has them, as above
        self.index.add([passage.text for passage in new])
        if members.whole:
            self._members = {}
        for name, passage in members.passages:
            self._members.setdefault(name, array("q")).append(passage)
        self._revision = members.revision
        if self.index.merge_due:
            self.index.merge()
        if len(self.ids) - self._saved > max(SAVE_AFTER, len(self.ids) // 20):
            self._save()

    def _load(self) -> None:
        stored = self._stored.get(FORMAT)
        if stored is None:
            return
        with np.load(io.BytesIO(stored.data), allow_pickle=False) as arrays:
            self.index = PassageIndex.load(arrays)
            self.ids = array("q", arrays["ids"].tobytes())
        self._saved = len(self.ids)

    def _save(self) -> None:
        data = io.BytesIO()
        arrays: dict[str, Any] = {"ids": np.array(self.ids, np.int64), **self.index.dump()}
        np.savez(data, **arrays)
        index = StoredIndex(FORMAT, len(self.ids), self.ids[-1], data.getvalue())
        self._saved = len(self.ids)
        self._documents.database.submit(lambda tables: self._stored.put(tables, index)).add_done_callback(_report)

    def passages(self, found: dict[int, float], collections: Collection[str] | None = None) -> dict[int, Passage]:
        """The passages of these ids with their scores, without those that left `collections` meanwhile."""
        stored = self._documents.some(list(found), collections) if found else {}
        return {
            id_: Passage(f"{p.document_id[:12]}:{id_}", p.document, p.start, p.stop, p.text, found[id_])
            for id_, p in stored.items()
        }


def _report(stored: "Future[None]") -> None:
    error = stored.exception()
    if error is not None:
        log.warning("the search index could not be stored and will be built again: %s", error)


class Retriever:
    """Searches the documents and a stream together, with one set of statistics."""

    def __init__(self, documents: Documents) -> None:
        self.documents = DocumentIndex(documents)
        # its own threads: while the index is built for the first search others wait for it, and must not hold what
        # everything else runs in
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="longstride-search")

    def close(self) -> None:
        """Begin no further search; one that runs ends with its database."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def search(
        self,
        query: str,
        count: int,
        stream: StreamIndex | None = None,
        visible_from: int = 0,
        collections: Collection[str] | None = None,
    ) -> list[Passage]:
        """The `count` best passages with a score above 0, best first; in a worker thread.

        Passages of the stream that reach past token `visible_from` are in the context already and left out. Documents
        outside `collections` (None: all) change nothing, neither the passages nor their scores.
        """
        search = partial(self._search, query, count, stream, visible_from, collections)
        return await asyncio.get_running_loop().run_in_executor(self._threads, search)

    def _search(
        self,
        query: str,
        count: int,
        stream: StreamIndex | None,
        visible_from: int,
        collections: Collection[str] | None,
    ) -> list[Passage]:
        selection, ids = self.documents.refresh(collections)
        selections = [selection, *([stream.index.select()] if stream is not None else [])]
        found: list[tuple[float, int, int]] = []
        for s, values in enumerate(scores(selections, query)):
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
        best_found = found[:count]
        documents = self.documents.passages({ids[i]: value for value, s, i in best_found if s == 0}, collections)
        passages = [
            stream.passage(i, value) if s and stream is not None else documents.get(ids[i])
            for value, s, i in best_found
        ]
        return [passage for passage in passages if passage is not None]


def _first_reaching(spans: Iterable[tuple[int, int, int, int]], token: int) -> int:
    """How many leading spans end at or before `token`."""
    return sum(1 for span in spans if span[1] <= token)
