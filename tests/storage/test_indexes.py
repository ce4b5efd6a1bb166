"""The stored search index: used when it fits, never when it does not."""

import pytest

from longstride.scheduler import retriever
from longstride.scheduler.index import PassageIndex
from longstride.scheduler.retriever import DocumentIndex, Retriever
from longstride.storage.database import Database
from longstride.storage.documents import Documents


@pytest.fixture
def documents(tmp_path, monkeypatch):
    monkeypatch.setattr(retriever, "SAVE_AFTER", 300)
    database = Database(tmp_path / "i.db")
    yield Documents(database)
    database.close()


def add(documents, name, count):
    parts = [f"{name} speaks of thing{i} and of the sea" for i in range(count)]
    text, spans, at = "\n".join(parts), [], 0
    for part in parts:
        spans.append((at, at + len(part)))
        at += len(part) + 1
    documents.database.write(lambda tables: documents.add(tables, name, None, text, spans))


async def found(documents, query="thing7 sea alpha"):
    passages = await Retriever(documents).search(query, 4)
    documents.database.write(lambda _tables: None)  # what was queued before has been written
    return [(passage.id, passage.text, round(passage.score, 4)) for passage in passages]


async def test_the_next_process_loads_the_index_and_adds_only_what_is_new(documents, monkeypatch):
    add(documents, "alpha", 400)
    first = await found(documents)
    assert first[0][1].startswith("alpha speaks of thing7")
    add(documents, "beta", 3)
    fresh = DocumentIndex(documents)
    added = []
    real = PassageIndex.add
    monkeypatch.setattr(PassageIndex, "add", lambda self, texts: (added.append(len(texts)), real(self, texts)))
    fresh.refresh()
    assert added == [3]
    monkeypatch.undo()
    anew = Retriever(documents)
    anew.documents._load = lambda: None  # without the stored one
    assert [(p.id, p.text, round(p.score, 4)) for p in await anew.search("thing7 sea alpha", 4)] == await found(
        documents
    )


@pytest.mark.parametrize(
    "damage",
    [
        "update indexes set data = cast(substr(data, 2) || x'00' as blob)",
        "update indexes set checksum = cast(substr(checksum, 2) || x'00' as blob)",
        "update indexes set count = 399",
        "update indexes set last = 17",
        "update indexes set format = 'another'",
    ],
)
async def test_a_damaged_or_foreign_index_is_not_used(documents, damage):
    add(documents, "alpha", 400)
    expected = await found(documents)
    documents.database.write(lambda tables: tables.conn.execute(damage))
    assert await found(documents) == expected


async def test_removing_a_document_removes_the_index_with_its_words(documents, tmp_path):
    add(documents, "alphaword", 400)
    add(documents, "beta", 2)
    await found(documents)
    assert documents.database.read(lambda tables: tables.conn.execute("select count(*) from indexes").fetchone()) == (
        1,
    )
    id_ = documents.find("alphaword").id
    documents.database.write(lambda tables: documents.remove(tables, id_))
    assert [text for _, text, _ in await found(documents, "alphaword sea")] == [
        "beta speaks of thing0 and of the sea",
        "beta speaks of thing1 and of the sea",
    ]
    documents.database.read(lambda tables: tables.conn.execute("pragma wal_checkpoint(truncate)").fetchall())
    assert b"alphaword" not in (tmp_path / "i.db").read_bytes()
