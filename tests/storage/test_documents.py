"""Documents: their text stored once whatever collections hold it, passages as slices of it, failures, and a revision
that tells of every change."""

import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longstride.errors import BadInput
from longstride.storage.database import Database
from longstride.storage.documents import Documents, check_collection

TEXT = "Call me Ishmael. Some years ago — never mind how long — I went to sea 🐋."


@pytest.fixture
def documents(tmp_path):
    database = Database(tmp_path / "t.db")
    yield Documents(database)
    database.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """For hypothesis: one file for all examples."""
    database = Database(tmp_path_factory.mktemp("documents") / "t.db")
    yield Documents(database)
    database.close()


def add(documents, name, text=TEXT, spans=((0, 16), (17, 40)), path=None, collection="default"):
    return documents.database.write(lambda tables: documents.add(tables, name, path, text, list(spans), collection))


def remove(documents, name, collection="default"):
    found = documents.find(name, collection)
    documents.database.write(lambda tables: documents.remove(tables, found.id, collection))


def fail(documents, path, reason):
    documents.database.write(lambda tables: documents.fail(tables, path, reason))


def test_an_added_document_is_listed(documents):
    ids = add(documents, "moby.txt", path="/books/moby.txt")
    (found,) = documents.all()
    assert (found.name, found.path, found.characters, found.passages) == ("moby.txt", "/books/moby.txt", len(TEXT), 2)
    assert found.id == Documents.identity(TEXT)
    assert documents.exists(found.id)
    assert not documents.exists(Documents.identity("another"))
    assert [p.id for p in documents.passages()] == ids


def test_the_same_text_is_stored_once(documents):
    add(documents, "one.txt")
    with pytest.raises(sqlite3.IntegrityError):
        add(documents, "two.txt")
    assert [d.name for d in documents.all()] == ["one.txt"]
    assert documents.count() == 2
    assert documents.revision() == (1, 1)


def test_a_text_in_another_collection_is_the_same_document_under_its_own_name(documents):
    ids = add(documents, "one.txt", path="/a/one.txt")
    assert add(documents, "two.txt", path="/b/two.txt", collection="b", spans=[(0, 3)]) == ids
    assert documents.count() == 2
    one, two = documents.all()
    assert (one.collection, one.name, one.path) == ("default", "one.txt", "/a/one.txt")
    assert (two.collection, two.name, two.path) == ("b", "two.txt", "/b/two.txt")
    assert (one.id, one.characters, one.passages) == (two.id, two.characters, two.passages)
    assert documents.all("b") == [two] == [documents.find("two.txt", "b")]
    assert documents.all("c") == []
    assert documents.exists(one.id, "b")
    assert not documents.exists(one.id, "c")
    with pytest.raises(BadInput, match=r"no document named 'two\.txt' in collection 'default'"):
        documents.find("two.txt")


def test_passages_are_given_to_those_who_may_have_them(documents):
    ids = add(documents, "one.txt")
    add(documents, "two.txt", collection="b")
    other = add(documents, "other", "other text", [(0, 5)], collection="c")
    for collections, names in (
        (None, ["one.txt", "one.txt", "other"]),
        (["default"], ["one.txt", "one.txt"]),
        (["b"], ["two.txt", "two.txt"]),
        (["c", "b"], ["two.txt", "two.txt", "other"]),
        (["' or 1 --", '"b"', "B"], []),
        ([], []),
    ):
        found = documents.some([*ids, *other], collections)
        assert [found[i].document for i in sorted(found)] == names


def test_a_document_goes_with_its_last_collection(documents):
    add(documents, "one.txt")
    add(documents, "two.txt", collection="b")
    remove(documents, "one.txt")
    assert [(d.collection, d.name, d.passages) for d in documents.all()] == [("b", "two.txt", 2)]
    assert [p.document for p in documents.passages()] == ["two.txt", "two.txt"]
    remove(documents, "two.txt", "b")
    assert documents.all() == documents.passages() == []
    stored = documents.database.read(lambda tables: tables.conn.execute("select count(*) from documents").fetchone())
    assert stored == (0,)


def test_what_changed_in_collections_since_is_told(documents):
    one = add(documents, "one")
    first = documents.members()
    assert first.passages == [("default", i) for i in one]
    assert first.revision == documents.revision()
    assert documents.members(first.revision).passages == []
    two = add(documents, "two", "another text", [(0, 7)], collection="b")
    add(documents, "one too", collection="b")
    later = documents.members(first.revision)
    assert not later.whole
    assert later.passages == [("b", i) for i in (*two, *one)]
    remove(documents, "one")
    after = documents.members(later.revision)
    assert after.whole
    assert after.passages == later.passages


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a\0", "x" * 101])
def test_a_collection_needs_a_printable_name(name):
    with pytest.raises(BadInput, match="a collection needs a name of 1 to 100 printable characters"):
        check_collection(name)
    check_collection("Bücher, 2. Band")


def test_a_passage_is_the_slice_of_its_document(documents):
    add(documents, "moby", spans=[(0, 16), (17, 57), (58, len(TEXT))])
    add(documents, "other", "second text", [(7, 11)])
    found = documents.passages()
    assert [(p.document, p.text) for p in found] == [
        ("moby", TEXT[0:16]), ("moby", TEXT[17:57]), ("moby", TEXT[58:]), ("other", "text"),
    ]  # fmt: skip
    assert found[0].document_id == Documents.identity(TEXT)
    assert [(p.start, p.stop) for p in found] == [(0, 16), (17, 57), (58, len(TEXT)), (7, 11)]
    assert documents.passages(after=found[2].id) == found[3:]


@settings(deadline=None, max_examples=40)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=60), data=st.data())
def test_any_slice_of_any_text_comes_back(shared, text, data):
    start = data.draw(st.integers(0, len(text) - 1))
    stop = data.draw(st.integers(start + 1, len(text)))
    shared.database.write(lambda tables: tables.conn.execute("delete from documents"))
    add(shared, "any", text, [(start, stop)])
    assert shared.passages()[0].text == text[start:stop]
    assert shared.all()[0].characters == len(text)


def test_a_nul_character_does_not_end_a_text(documents):
    add(documents, "nul", "one\x00two three", [(0, 7), (8, 13)])
    assert [p.text for p in documents.passages()] == ["one\x00two", "three"]
    assert documents.all()[0].characters == 13


def test_a_document_is_found_by_name_or_the_beginning_of_its_id(documents):
    add(documents, "moby.txt")
    add(documents, "other.txt", "other text", [(0, 5)])
    id_ = Documents.identity(TEXT)
    assert documents.find("moby.txt").id == documents.find(id_[:12]).id == documents.find(id_).id == id_
    with pytest.raises(BadInput, match="no document named 'nothing'"):
        documents.find("nothing")
    with pytest.raises(BadInput, match="no document"):
        documents.find(id_[:5])
    add(documents, "other.txt", "a third text", [(0, 1)])
    with pytest.raises(BadInput, match=r"2 documents named 'other\.txt'"):
        documents.find("other.txt")


def test_a_document_is_found_by_its_path_before_its_name(documents):
    add(documents, "notes.txt", path="/a/notes.txt")
    add(documents, "notes.txt", "other text", [(0, 5)], path="/b/notes.txt")
    add(documents, "/a/notes.txt", "a third text", [(0, 1)])
    assert documents.find("/a/notes.txt").characters == len(TEXT)
    assert documents.find("/b/notes.txt").characters == len("other text")
    with pytest.raises(BadInput, match=r"2 documents named 'notes\.txt'"):
        documents.find("notes.txt")


def test_a_new_version_takes_the_place_of_the_older_one_where_it_was_added(documents):
    add(documents, "n.txt", path="/n.txt")
    add(documents, "n.txt", path="/n.txt", collection="b")
    add(documents, "n.txt", "a new version", [(0, 5)], path="/n.txt")
    add(documents, "n.txt", "of another file", [(0, 5)], path="/m/n.txt")
    found = {(d.collection, d.path, d.characters) for d in documents.all()}
    assert found == {("default", "/n.txt", 13), ("b", "/n.txt", len(TEXT)), ("default", "/m/n.txt", 15)}
    assert {p.text for p in documents.passages()} == {TEXT[:16], TEXT[17:40], "a new", "of an"}
    add(documents, "n.txt", "newer still", [(0, 5)], path="/n.txt", collection="b")
    assert {p.text for p in documents.passages()} == {"newer", "a new", "of an"}
    assert documents.verify() == []


def test_a_removed_document_takes_its_passages_along(documents):
    add(documents, "moby.txt")
    add(documents, "other.txt", "other text", [(0, 5)])
    remove(documents, "moby.txt")
    assert [d.name for d in documents.all()] == ["other.txt"]
    assert [p.document for p in documents.passages()] == ["other.txt"]
    add(documents, "moby again")
    assert documents.find("moby again").passages == 2


def test_a_failure_stands_until_its_file_is_added(documents):
    fail(documents, "/b.pdf", "is a damaged PDF")
    fail(documents, "/a.pdf", "the file is empty")
    fail(documents, "/a.pdf", "is an encrypted PDF")
    assert sorted((path, reason) for path, reason, _ in documents.failures()) == [
        ("/a.pdf", "is an encrypted PDF"), ("/b.pdf", "is a damaged PDF"),
    ]  # fmt: skip
    add(documents, "a.pdf", path="/a.pdf")
    add(documents, "no path", "another text", [(0, 3)])
    assert [path for path, _, _ in documents.failures()] == ["/b.pdf"]
    documents.database.write(lambda tables: documents.forget(tables, "/b.pdf"))
    assert documents.failures() == []


def test_the_revision_changes_with_every_change_of_the_passages(documents):
    """Another process compares it with the last one it saw, however much happened in between."""
    seen = [documents.revision()]
    add(documents, "one")
    seen.append(documents.revision())
    add(documents, "two", "another text", [(0, 7)])
    seen.append(documents.revision())
    remove(documents, "one")
    seen.append(documents.revision())
    add(documents, "two too", "another text", collection="b")
    seen.append(documents.revision())
    remove(documents, "two")
    seen.append(documents.revision())
    add(documents, "two", "another text")
    remove(documents, "two too", "b")
    seen.append(documents.revision())
    assert len(set(seen)) == 7
    fail(documents, "/a.pdf", "the file is empty")
    assert documents.revision() == seen[-1]


def test_the_revision_changes_when_a_document_takes_anothers_place(documents):
    add(documents, "one", "the first text", [(0, 3), (4, 9)])
    seen = documents.revision()
    remove(documents, "one")
    add(documents, "two", "another text", [(0, 7), (8, 12)])
    assert documents.revision() != seen


def test_passages_added_after_a_removal_are_seen_as_new(documents):
    last = add(documents, "one", "the first text", [(0, 3), (4, 9)])[-1]
    remove(documents, "one")
    add(documents, "two", "another text", [(0, 7)])
    assert [p.text for p in documents.passages(after=last)] == ["another"]
