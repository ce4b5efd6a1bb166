"""`longstride eval qa` from end to end, on a tiny model; its refusals."""

import json
import signal

import pytest
from typer.testing import CliRunner

from longstride.cli.evaluate import app
from longstride.errors import BadInput
from longstride.scheduler import assistant
from tests.cli.test_errors import assert_refused, longstride
from tests.tiny import tiny_assistant_model

SMALL = [
    "--context-tokens", "400", "--passages", "2", "--passage-tokens", "40", "--max-tokens", "6", "--system", "s",
    "--systems", "closed-book,prepend:once,beside:once,beside:3",
]  # fmt: skip


def lines(*records):
    return "".join(f"{json.dumps(record)}\n" for record in records)


@pytest.fixture
def folder(tmp_path):
    """A working folder with a set of questions about two documents, and one of questions with contexts."""
    here = tmp_path / "here"
    here.mkdir()
    texts = {name: "\n\n".join(f"Thing{i} of {name} lives in town{i}." for i in range(40)) for name in "ab"}
    (here / "d.jsonl").write_text(lines(*({"id": name, "text": text} for name, text in texts.items())))
    asked = [
        {"doc_id": name, "question": f"Where lives Thing{i}?", "answers": [f"town{i}"], "paragraph": i}
        for name in "ab"
        for i in (1, 2, 3)
    ]
    (here / "q.jsonl").write_text(lines(*asked, {**asked[0], "answerable": False}))
    contexts = [{"title": "A", "text": "Thing1 is here."}, {"title": "B", "text": "Thing2 is there."}]
    both = {"question": "Where is Thing1?", "answers": ["here"], "contexts": contexts, "gold": ["A"]}
    (here / "h.jsonl").write_text(lines(both))
    return here


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(assistant, "load_model", lambda *_, **__: tiny_assistant_model())


def run(folder, *arguments):
    sets = ["--set", f"about={folder / 'd.jsonl'},{folder / 'q.jsonl'}", "--set", f"both={folder / 'h.jsonl'}"]
    return CliRunner().invoke(app, ["qa", *sets, *SMALL, *arguments], catch_exceptions=False)


def test_tables_json_markdown_and_plot(folder, tiny):
    files = [folder / "out" / name for name in ("r.json", "r.md", "r.png")]
    names = zip(("--json", "--markdown", "--plot"), map(str, files), strict=True)
    done = run(folder, *(word for pair in names for word in pair))
    assert done.exit_code == 0
    for word in ("about: 6 questions", "beside:3 ", "beside:3 - prepend:once ", "with prefix reused"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "about: questions left out: 1 unanswerable" in done.stderr
    data = json.loads(files[0].read_text())
    assert [(row["set"], row["system"]) for row in data["rows"]] == [
        (name, system) for name in ("about", "both") for system in SMALL[-1].split(",")
    ]
    assert data["sets"]["about"] == {"questions": 6, "documents": 2, "left_out": {"unanswerable": 1}}
    assert data["setup"]["context_tokens"] == 400
    assert data["provenance"]["model"] == "tiny-llama"
    records = [record for part in data["parts"] for record in part["records"]]
    assert len(records) == 4 * 7
    first = next(row for row in data["rows"] if row["system"] == "beside:once")
    own = [r["encoded"] for r in records if r["system"] == "beside:once" and r["document"] in "ab"]
    assert first["measures"]["encoded"]["value"] == pytest.approx(sum(own) / 6)
    compared = {(d["set"], d["first"], d["second"]): d["encoded"] for d in data["differences"]}
    assert compared["about", "beside:once", "prepend:once"] < 0.7
    assert "| about | beside:3 |" in files[1].read_text()
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_a_part_of_a_set_is_chosen_by_the_seed(folder, tiny):
    def asked(*options):
        run(folder, "--json", str(folder / "r.json"), "--systems", "closed-book", *options)
        parts = json.loads((folder / "r.json").read_text())["parts"]
        return {record["id"] for part in parts if part["set"] == "about" for record in part["records"]}

    few = asked("--documents", "1", "--questions", "2")
    assert len(few) == 2
    assert few == asked("--documents", "1", "--questions", "2")
    assert len({frozenset(asked("--questions", "2", "--seed", str(seed))) for seed in range(4)}) > 1


def test_a_rerun_goes_on(folder, tiny, monkeypatch):
    options = ("--work", str(folder / "work"), "--json", str(folder / "r.json"), "--systems", "beside:3,prepend:once")
    run(folder, *options)
    first = json.loads((folder / "r.json").read_text())["parts"]
    run(folder, *options)
    again = json.loads((folder / "r.json").read_text())["parts"]
    assert again == first  # the seconds as well: nothing was asked


def test_nothing_is_left_behind(folder, tiny, monkeypatch, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    run(folder, "--systems", "beside:3,prepend:once", "--questions", "1")
    assert list(scratch.iterdir()) == []
    assert sorted(path.name for path in folder.iterdir()) == ["d.jsonl", "h.jsonl", "q.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "x"], "'x' is no set: write NAME=QUESTIONS.jsonl"),
        (["--set", "s=d.jsonl"], "s=DOCUMENTS.jsonl,QUESTIONS.jsonl"),
        (["--set", "s=h.jsonl", "--systems", "aside:4"], "no system 'aside:4'"),
        (["--set", "s=h.jsonl", "--set", "s=h.jsonl"], "two sets have the same name"),
        (["--set", "s=h.jsonl", "--context-tokens", "1000"], "system prepend:once: a context of 1000 tokens"),
        (["--set", "s=h.jsonl", "--context-tokens", "64"], "leave no room"),
        (["--set", "s=h.jsonl", "--json", "h.jsonl/r.json", "--systems", "end:4"], "h.jsonl/r.json cannot be written"),
    ],
)
def test_refusals(folder, tiny, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    with pytest.raises(BadInput, match=message):
        CliRunner().invoke(app, ["qa", "--context-tokens", "600", *arguments], catch_exceptions=False)


def test_a_refusal_is_one_sentence(folder):
    assert_refused(longstride(folder, "eval", "qa", "--set", "s=none.jsonl"), "none.jsonl cannot be read")


def test_a_stop_leaves_whole_parts(folder, tiny, monkeypatch, tmp_path):
    """Ctrl-C in the middle: the parts that were finished are there, the scratch folder is not."""
    from longstride.tuning.qa import Evaluation

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    ask, asked = Evaluation._ask, []

    async def stopped(self, *arguments):
        asked.append(arguments)
        if len(asked) == 5:
            signal.raise_signal(signal.SIGINT)
        return await ask(self, *arguments)

    monkeypatch.setattr(Evaluation, "_ask", stopped)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        done = run(folder, "--work", str(folder / "work"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.exit_code != 0
    assert list(scratch.iterdir()) == []
    assert len(list((folder / "work").iterdir())) == 1  # of three questions; the second part was stopped
