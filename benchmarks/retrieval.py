"""BM25 over many passages: adding, searching while others are added, merging, and opening what is stored."""

import argparse
import asyncio
import random
import statistics
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import bm25s

from benchmarks.common import Row, report, shipped_text
from longstride.scheduler.retriever import Retriever
from longstride.storage.database import Database
from longstride.storage.documents import Documents

WORDS = 90  # of a passage of 128 tokens


def passages_of(texts: list[Path], count: int) -> list[str]:
    """`count` passages of real text; when it is too short, windows at other places of it."""
    if texts:
        words = " ".join(path.read_text(encoding="utf-8", errors="replace") for path in texts).split()
    else:
        words = shipped_text().split()
    step = max(1, min(WORDS, (len(words) - WORDS) // count))
    starts = [i * step % max(1, len(words) - WORDS) for i in range(count)]
    return [" ".join(words[start : start + WORDS]) for start in starts]


async def measure(passages: list[str], queries: list[str], folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """The rows, and figures that are no rows."""
    setting = {"passages": len(passages)}
    database = Database(folder / "r.db")
    documents = Documents(database)
    began = time.perf_counter()
    for at in range(0, len(passages), 1000):
        part = passages[at : at + 1000]
        text = "\n".join(part)
        spans, place = [], 0
        for passage in part:
            spans.append((place, place + len(passage)))
            place += len(passage) + 1
        database.write(partial(documents.add, name=f"d{at}", path=None, text=text, spans=spans))
    stored = time.perf_counter() - began
    building, opening = Row("first search: builds the index", dict(setting), "s"), Row("open", dict(setting), "s")
    for row in (building, opening, opening, opening):
        retriever = Retriever(documents)
        began = time.perf_counter()
        await retriever.search(queries[0], 3)
        row.runs.append(time.perf_counter() - began)
        database.write(lambda _tables: None)  # the index is stored behind the search
    alone = Row("search", dict(setting), "ms")
    for query in queries:
        began = time.perf_counter()
        await retriever.search(query, 3)
        alone.runs.append(1000 * (time.perf_counter() - began))
    beside = Row("search while passages are added", dict(setting), "ms")
    stop = threading.Event()
    added = 0

    def add() -> None:
        nonlocal added
        while not stop.is_set():
            text = f"{added} {passages[added % len(passages)]}"
            database.write(partial(documents.add, name=f"new {added}", path=None, text=text, spans=[(0, len(text))]))
            added += 1
            stop.wait(0.02)

    thread = threading.Thread(target=add)
    thread.start()
    for query in queries:
        began = time.perf_counter()
        await retriever.search(query, 3)
        beside.runs.append(1000 * (time.perf_counter() - began))
    stop.set()
    thread.join()
    peer = Row("bm25s, built anew", dict(setting), "s")
    began = time.perf_counter()
    index = bm25s.BM25(method="lucene")
    index.index(bm25s.tokenize(passages, stopwords="english", show_progress=False), show_progress=False)
    peer.runs.append(time.perf_counter() - began)
    search = Row("bm25s, search", dict(setting), "ms")
    for query in queries:
        began = time.perf_counter()
        tokens = bm25s.tokenize([query], stopwords="english", show_progress=False)
        index.retrieve(tokens, k=3, show_progress=False)
        search.runs.append(1000 * (time.perf_counter() - began))
    database.close()
    figures = {"stored_passages_s": len(passages) / stored, "added_meanwhile": added}
    for row in (alone, beside, search):
        figures[f"{row.system}, p99 ms"] = statistics.quantiles(row.runs, n=100)[98]
    return [building, opening, alone, beside, peer, search], figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="text files; the shipped chapters else")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    passages = passages_of(options.texts, options.passages)
    draw = random.Random(0)
    queries = []
    for _ in range(options.queries):
        words = draw.choice(passages).split()
        at = draw.randrange(max(1, len(words) - 24))
        queries.append(" ".join(words[at : at + 24]))  # about 32 tokens
    with tempfile.TemporaryDirectory() as folder:
        rows, figures = asyncio.run(measure(passages, queries, Path(folder)))
    by = {row.system: row for row in rows}
    ratios = {
        "bm25s @ search": by["bm25s, search"].median / by["search"].median,
        "bm25s @ index": by["bm25s, built anew"].median / by["first search: builds the index"].median,
    }
    report(rows, ratios, figures, options.json)
    for name, value in figures.items():
        print(f"{name}: {value:.1f}")


if __name__ == "__main__":
    main()
