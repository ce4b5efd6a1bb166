"""Texts for evaluation: records, files of any kind, WikiText's articles; every refusal with its place."""

import gzip
import json

import pytest

from longstride.errors import BadInput
from longstride.tuning.texts import Text, records, texts


def lines(*items):
    return "".join(f"{json.dumps(item)}\n" for item in items)


def test_records_of_plain_and_packed_files(tmp_path):
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    body = lines({"text": "ö"}, {"n": 2}).replace("\n", "\n\n")
    plain.write_text(body)
    with gzip.open(packed, "wt", encoding="utf-8") as file:
        file.write(body)
    assert list(records(plain)) == list(records(packed)) == [{"text": "ö"}, {"n": 2}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n\n{"a"\n', r"bad\.jsonl, line 3: not JSON"),
        (b'{"a": 1}\n[1]\n', r"bad\.jsonl, line 2: not an object"),
        (b'{"a": "\xff"}\n', r"bad\.jsonl is damaged"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        list(records(path))


def test_a_cut_and_a_false_archive_are_refused(tmp_path):
    whole = gzip.compress(lines(*({"text": f"{i}" * 50} for i in range(500))).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(BadInput, match=r"cut\.jsonl\.gz is damaged"):
        list(records(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "no.jsonl.gz").write_text("no archive")
    with pytest.raises(BadInput, match=r"no\.jsonl\.gz cannot be read"):
        list(records(tmp_path / "no.jsonl.gz"))


def test_documents_of_records_have_names(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(lines({"id": "i", "text": "one"}, {"title": "T", "text": "two"}, {"text": "three"}, {"text": " "}))
    assert texts([path]) == [Text("i", "one"), Text("T", "two"), Text("d.jsonl:3", "three")]


def test_a_record_without_text_is_named(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(lines({"text": "one"}, {"text": 2}))
    with pytest.raises(BadInput, match=r"d\.jsonl, record 2: no \"text\" that is a string"):
        texts([path])


def test_folders_are_walked_in_order_without_hidden_files(tmp_path):
    (tmp_path / "b.txt").write_text("B")
    (tmp_path / ".hidden.txt").write_text("H")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.md").write_text("C")
    assert [text.name for text in texts([tmp_path])] == ["c.md", "b.txt"]


def test_articles_are_cut_where_their_titles_stand(tmp_path):
    path = tmp_path / "wiki.txt"
    body = " = First = \n\n Text of it . \n = = Section = = \n More . \n = Second = \n Other . \n"
    path.write_text(body)
    first, second = texts([path])
    assert first.body + second.body == body
    assert "Section" in first.body
    assert second.body.startswith(" = Second = ")
    assert first.name != second.name
    path.write_text(" = Only = \n Text . \n")
    assert [text.body for text in texts([path])] == [" = Only = \n Text . \n"]


def test_nothing_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no text in"):
        texts([tmp_path])
    with pytest.raises(BadInput, match="no text in nothing"):
        texts([])
    with pytest.raises(BadInput, match=r"none\.txt: "):
        texts([tmp_path / "none.txt"])


def test_a_text_is_named_by_its_content():
    assert Text("a", "x").sha256 == Text("b", "x").sha256 != Text("a", "y").sha256
