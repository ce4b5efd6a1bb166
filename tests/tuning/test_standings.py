"""What came out: means over questions, pairs of systems, tables and the plot."""

import builtins
from dataclasses import replace

import pytest

from longstride.errors import BadInput
from longstride.tuning import standings
from longstride.tuning.qa import Part, Record
from longstride.tuning.statistics import mean
from longstride.tuning.systems import systems

RECORD = Record(
    id="1", document="d", system="beside:4", question="?", answers=["x"], answer="x", finish="stop", metric="f1",
    score=1.0, exact=0.0, f1=1.0, contained=1.0, retrieved=1.0, gold=1.0, answer_in_view=None, encoded=30, reusing=30,
    cached=500, generated=5, retrievals=2, rewrites=1, seconds=0.5, first_token=0.1,
)  # fmt: skip


def part(system, *given, name="s", **more):
    """A part with a record for each (id, document, score, encoded)."""
    records = [
        replace(RECORD, id=id_, document=document, system=system, score=score, encoded=encoded, reusing=encoded // 2)
        for id_, document, score, encoded in given
    ]
    return Part(name, "c", system, records, **more)


PARTS = [
    part("beside:4", ("1", "d", 1.0, 30), ("2", "d", 0.0, 50), ("3", "e", 1.0, 40), read=200, read_encoded=300),
    part("prepend:4", ("1", "d", 1.0, 900), ("2", "d", 1.0, 1100), ("3", "e", 1.0, 1000)),
    part("beside:4", ("1", "f", 0.5, 10), name="t", too_long=["9"]),
]


def test_rows_are_means_over_questions():
    first, second, third = standings.rows(PARTS)
    assert (first.set, first.system, first.questions, first.documents) == ("s", "beside:4", 3, 2)
    assert first.measures["score"].value == pytest.approx(2 / 3)
    assert first.measures["score"] == mean([1.0, 1.0], [2, 1])  # of documents d and e
    assert first.measures["encoded"].value == 40
    assert first.reading == 100
    assert "answer_in_view" not in first.measures
    assert (second.measures["encoded"].value, second.measures["reusing"].value, second.reading) == (1000, 500, 0)
    assert (third.set, third.questions, third.too_long) == ("t", 1, 1)


def test_parts_of_one_system_are_one_row():
    (row,) = standings.rows([part("end:4", ("1", "d", 1.0, 10)), part("end:4", ("2", "e", 0.0, 20))])
    assert (row.questions, row.documents, row.measures["score"].value) == (2, 2, 0.5)


def test_differences_are_paired():
    (one,) = standings.differences(PARTS, systems("beside:4,prepend:4"))
    assert (one.set, one.first, one.second) == ("s", "beside:4", "prepend:4")
    assert one.measures["score"] == mean([-1.0, 0.0], [2, 1])
    assert one.encoded == pytest.approx(120 / 3000)
    assert one.reusing == pytest.approx(120 / 1500)


def test_a_question_that_one_side_lacks_is_no_pair():
    parts = [part("beside:4", ("1", "d", 1.0, 10), ("2", "d", 1.0, 10)), part("prepend:4", ("2", "d", 0.0, 40))]
    (one,) = standings.differences(parts, systems("beside:4,prepend:4"))
    assert one.measures["score"].value == 1.0
    assert one.encoded == 0.25


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        ("beside:4", []),
        ("closed-book,prepend:once", []),
        ("beside:4,prepend:4", ["beside:4 prepend:4"]),
        ("beside:4,prepend:16,prepend:once", ["beside:4 prepend:once", "prepend:16 prepend:once"]),
        ("beside:4,prepend:16", ["beside:4 prepend:16"]),
        ("beside:once,beside:drift,turn:4", ["beside:drift beside:once"]),
        ("prepend:once,prepend:4", ["prepend:4 prepend:once"]),
        (
            "end:once,end:4,prepend:once",
            ["end:once prepend:once", "end:4 prepend:once", "end:4 end:once"],
        ),
    ],
)  # fmt: skip
def test_who_is_compared_with_whom(names, pairs):
    assert [" ".join(pair) for pair in standings.pairs(systems(names))] == pairs


def test_tables_say_what_they_hold():
    rows = standings.rows(PARTS)
    differences = standings.differences(PARTS, systems("beside:4,prepend:4"))
    text = standings.as_markdown(rows, differences, {"model": "tiny", "max_tokens": 8})
    lines = text.splitlines()
    assert lines[2].startswith("| s | beside:4 | 66.7 [0.0, 100.0] | 0.0 [0.0, 0.0] |")
    assert "| s | beside:4 - prepend:4 | -33.3 [-100.0, +100.0] |" in text
    assert "| 0.040 | 0.080 |" in text
    assert "s: 3 questions about 2 documents; t: 1 questions about 1 documents" in text
    assert "model tiny, max_tokens 8." in text
    assert {len(line.split(" | ")) for line in lines[:5]} == {len(standings.HEADERS)}


def test_a_row_without_questions_has_a_line():
    (row,) = standings.rows([part("end:4", too_long=["1"])])
    assert standings.cells(row)[:3] == ["s", "end:4", "-"]
    assert standings.short_cells(row) == ["end:4", *["-"] * 8]


def test_plain_data_keeps_the_interval():
    data = standings.to_dict(standings.rows(PARTS)[0])
    assert data["measures"]["score"] == mean([1.0, 1.0], [2, 1])._asdict()


def test_the_plot_is_a_picture(tmp_path):
    path = tmp_path / "new" / "p.png"
    standings.plot(standings.rows([*PARTS, part("end:4", too_long=["1"])]), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BadInput, match=r"p\.unknown cannot be written"):
        standings.plot(standings.rows(PARTS), tmp_path / "p.unknown")


def test_without_matplotlib_it_says_so(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *arguments):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BadInput, match=r"a plot needs matplotlib; install it with: pip install 'longstride\[plots\]'"):
        standings.plot([], tmp_path / "p.png")
