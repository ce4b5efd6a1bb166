"""`longstride tune` and `longstride eval perplexity` from end to end, on a tiny model; their refusals."""

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from longstride.cli import evaluate, main, tune
from longstride.engine import model as models
from longstride.errors import BadInput
from longstride.tuning import ngrams as counting
from tests.lora import tiny_loaded
from tests.tuning.test_strides import text
from tests.tuning.test_training import plain

SIZES = ["--window", "40", "--strides", "2", "--stride", "6", "--query-tokens", "12", "--passage-tokens", "16"]
TRAINED = ["--steps", "3", "--rank", "4", "--layout", "end,passages=2"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with texts; a tiny model in place of the embedded one."""
    main.app.registered_commands or main._register()
    monkeypatch.setattr(models, "load_model", lambda *_, **__: tiny_loaded("llama"))
    monkeypatch.setattr(models, "load_plain", lambda *_, **__: plain())
    for name, numbers in (("train", range(3)), ("test", range(3, 6)), ("other", range(6, 8))):
        (tmp_path / name).mkdir()
        for i in numbers:
            (tmp_path / name / f"{i}.txt").write_text(text(i).body)
    return tmp_path


def invoke(app, *arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def tuned(folder, *more):
    corpus = ["--corpus", folder / "train"]
    return invoke(tune.app, "marks", *corpus, "--out", folder / "out", *SIZES, *TRAINED, *more)


def perplexity(folder, *more):
    return invoke(evaluate.app, "perplexity", "--set", f"test={folder / 'test'}", "--targets", "36", *SIZES, *more)


def test_an_adapter_is_trained_and_measured(folder):
    done = tuned(folder, "--plot", folder / "losses.png")
    assert done.exit_code == 0, done.stderr
    assert "3 steps, 36 targets" in done.stdout
    own = json.loads((folder / "out" / "longstride.json").read_text())
    assert own["marks"] == [[262], [263]]
    assert [name for name, _ in own["data"]] == ["0.txt", "1.txt", "2.txt"]
    assert len(json.loads((folder / "out" / "losses.json").read_text())) == 3
    assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG")

    files = [folder / "r" / name for name in ("r.json", "r.md", "r.png")]
    asked = ["none", "end", "end,adapter=mine", "none,adapter=mine", "beside"]
    done = perplexity(
        folder, *(word for name in asked for word in ("--layout", name)), "--adapter", f"mine={folder / 'out'}",
        "--corpus", folder / "other", "--window", "48", "--work", folder / "work",
        "--json", files[0], "--markdown", files[1], "--plot", files[2],
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    data = json.loads(files[0].read_text())
    found = {(cell["window"], cell["layout"]): cell for cell in data["cells"]}
    assert set(found) == {(window, name) for window in (40, 48) for name in asked}
    assert all(cell["targets"] == 36 == sum(map(len, cell["losses"])) for cell in found.values())
    assert found[40, "end"]["losses"] != found[40, "end,adapter=mine"]["losses"]
    # without a segment, an adapter that acts on the segment changes nothing
    assert found[40, "none"]["losses"] == found[40, "none,adapter=mine"]["losses"]
    assert data["provenance"]["model"] == "tiny-llama"
    assert data["settings"]["bos"] is False
    assert "| test | 48 | end,adapter=mine | 36 |" in files[1].read_text()
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_is_not_measured_again(folder):
    arguments = ["--layout", "none", "--layout", "beside", "--work", folder / "work", "--json", folder / "r.json"]
    perplexity(folder, *arguments)
    first = json.loads((folder / "r.json").read_text())["cells"]
    kept = sorted((folder / "work").iterdir())
    assert len(kept) == 2 * 3
    for file in kept:  # seconds are where it shows
        kept_part = json.loads(file.read_text())
        kept_part["part"]["seconds"] = 1000.0
        file.write_text(json.dumps(kept_part))
    perplexity(folder, *arguments)
    again = json.loads((folder / "r.json").read_text())["cells"]
    assert [cell["seconds"] for cell in again] == [3000.0, 3000.0]
    assert [cell["losses"] for cell in again] == [cell["losses"] for cell in first]
    kept[0].write_text(kept[0].read_text()[:-30])  # damaged: measured anew
    assert perplexity(folder, *arguments).exit_code == 0
    cells = json.loads((folder / "r.json").read_text())["cells"]
    assert [cell["losses"] for cell in cells] == [cell["losses"] for cell in first]
    assert min(cell["seconds"] for cell in cells) < 3000.0
    perplexity(folder, *arguments, "--bos")  # other inputs, other results
    assert json.loads((folder / "r.json").read_text())["cells"][0]["losses"] != first[0]["losses"]


def test_without_layouts_the_default_grid_is_measured(folder):
    perplexity(folder, "--json", folder / "r.json")
    shown = {cell["layout"] for cell in json.loads((folder / "r.json").read_text())["cells"]}
    assert {"none", "prepend", "end", "turn", "beside", "beside,source=chance"} <= shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "none,adapter=mine"], "adapter 'mine' is named by a layout only"),
        (["--adapter", "mine"], "write NAME=PATH"),
        (["--layout", "middle"], "'middle' is none of"),
        (["--window", "40", "--window", "990"], "needs 1050 positions and the model has 1024"),
        (["--set", "short=SHORT"], "no text has the 52 tokens"),
        (["--set", "test=other"], "'test' is given twice"),
        (["--frame", "--bos"], "leave --bos out"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(folder, arguments, message):
    (folder / "short.txt").write_text("Too short.")
    arguments = [str(a).replace("SHORT", str(folder / "short.txt")) for a in arguments]
    with pytest.raises(BadInput, match=message):
        perplexity(folder, *arguments, "--work", folder / "work")
    assert not (folder / "work").exists() or "short" in arguments[-1]  # refused before the work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "EMPTY"], "no text in"),
        (["--passage-tokens", "40"], "as long as the window"),
        (["--modules", "q_projection"], "q_projection"),
        (["--acts", "nowhere"], "segment or everywhere"),
        (["--mark-ids", "5,5"], "two different token ids"),
        (["--mark-ids", "5,9999"], "two different token ids"),
        (["--mark-ids", "5,257"], "conversations use these tokens"),
        (["--window", "1000"], "passes the model's 1024 positions"),
        (["--query-tokens", "41"], "and the query's 41"),
    ],
)
def test_a_training_that_cannot_be_is_refused(folder, arguments, message):
    (folder / "empty").mkdir()
    arguments = [folder / "empty" if a == "EMPTY" else a for a in arguments]
    first = [] if arguments[0] == "--corpus" else ["--corpus", folder / "train"]
    with pytest.raises(BadInput, match=message):
        invoke(tune.app, "marks", *first, "--out", folder / "out", *SIZES, *TRAINED, *arguments)
    assert not (folder / "out").exists()


def test_an_adapter_for_anchors_is_trained_measured_and_used_where_it_fits(folder):
    corpus = ["--corpus", folder / "train", "--out", folder / "out"]
    done = invoke(
        tune.app, "anchors", *corpus, "--span", "12", "--length", "128", "--steps", "2", "--rank", "2", "--dropout", "0"
    )
    assert done.exit_code == 0, done.stderr
    assert "2 steps, " in done.stdout
    own = json.loads((folder / "out" / "longstride.json").read_text())
    assert (own["acts"], own["window"]) == ("text", "anchors")
    mine = ["--adapter", f"mine={folder / 'out'}"]
    asked = ["none", "none,window=anchors:12", "none,adapter=mine,window=anchors:12"]
    done = perplexity(
        folder, *mine, *(word for name in asked for word in ("--layout", name)), "--json", folder / "r.json"
    )
    assert done.exit_code == 0, done.stderr
    losses = {cell["layout"]: cell["losses"] for cell in json.loads((folder / "r.json").read_text())["cells"]}
    assert list(losses) == asked
    assert losses[asked[0]] != losses[asked[1]] != losses[asked[2]]
    with pytest.raises(BadInput, match="trained for window=anchors"):
        perplexity(folder, *mine, "--layout", "none,adapter=mine")


def test_ngrams_are_counted_and_found_by_the_model_they_are_of(folder, monkeypatch):
    monkeypatch.setenv("LONGSTRIDE_CACHE", str(folder / "cache"))
    monkeypatch.setattr(counting, "ANSWER", 8)
    monkeypatch.setattr(counting, "PART", 4)
    asked = ["ngrams", "--corpus", folder / "train", "--tokens", "30"]
    done = invoke(tune.app, *asked)
    assert done.exit_code == 0, done.stderr
    assert "n-grams of 4 answers, " in done.stdout
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=tiny_loaded("llama").runner.vocab_size))
    whole = models.PlainModel("tiny", model, None, "", "bytes")
    found = models.find_ngrams(whole)
    assert found is not None
    assert f"{len(found):,} n-grams" in done.stdout
    again = invoke(tune.app, *asked, "--out", folder / "other.safetensors")
    assert again.stdout.partition(": ")[2] == done.stdout.partition(": ")[2]
    assert (folder / "other.safetensors").read_bytes() == models.ngrams_file("").read_bytes()
    (folder / "empty").mkdir()
    with pytest.raises(BadInput, match="is a folder"):
        invoke(tune.app, *asked, "--out", folder / "empty")
    with pytest.raises(BadInput, match="no text"):
        invoke(tune.app, "ngrams", "--corpus", folder / "empty")
