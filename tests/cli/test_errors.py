"""The command line's refusals: the exit code, one sentence on standard error, never a traceback."""

import json
import multiprocessing
import os
import sqlite3
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from longstride.cli import main as command_line
from longstride.storage.database import Database
from longstride.storage.documents import Documents
from longstride.storage.sessions import Sessions
from tests.processes import run
from tests.storage.test_database import make_newer

# importing torch takes seconds, so each command runs in a process forked from one that has imported it already
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["longstride.cli.docs", "longstride.cli.doctor", "longstride.cli.chat"])


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def _command(arguments, folder, environment):
    """In the new process: what the `longstride` script does."""
    os.chdir(folder)
    for stream in (1, 2):
        file = os.open(f"{folder}.{stream}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(file, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name in [name for name in os.environ if name.startswith("LONGSTRIDE_")]:
        del os.environ[name]
    os.environ.update(environment)
    sys.argv = ["longstride", *arguments]
    command_line.main()


def longstride(folder, *arguments, **environment):
    process = FORKS.Process(target=_command, args=(arguments, str(folder), environment))
    process.start()
    process.join(60)
    assert process.exitcode is not None
    code = process.exitcode
    process.close()
    return Outcome(code, Path(f"{folder}.1").read_text(), Path(f"{folder}.2").read_text())


@pytest.fixture
def folder(tmp_path):
    """A working folder with what the cases name."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "empty model").mkdir()
    (here / "notes.txt").write_text("These are some notes, and no database at all.\n")
    (here / "blank.txt").write_text(" \n")
    (here / "broken.pdf").write_bytes(b"%PDF-1.7\n1 0 obj\n<<")
    make_newer(here / "newer.db")
    return here


def assert_refused(outcome, *words):
    """Wrong use: code 2, nothing on standard output, one line on standard error that has `words`."""
    assert outcome.code == 2
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("longstride: ")
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param("sessions show nobody", ["no session 'nobody'", "there are none yet"], id="show"),
        pytest.param("sessions remove nobody", ["no session 'nobody'"], id="sessions remove"),
        pytest.param("docs remove nothing", ["no document named 'nothing'", "docs list"], id="docs remove"),
        pytest.param("docs add nowhere.txt", ["nowhere.txt does not exist"], id="docs add"),
        pytest.param("sessions list --db .", ["cannot be opened: Is a directory"], id="db is a folder"),
        pytest.param("sessions verify --db no/where.db", ["there is no database no/where.db"], id="db in no folder"),
        pytest.param("docs list --db notes.txt", ["notes.txt", "not a sound SQLite file", "--db"], id="db is text"),
        pytest.param("sessions list --db newer.db", ["newer.db", "newer Longstride", "upgrade"], id="db is newer"),
        pytest.param("docs search whale --db newer.db", ["newer.db", "newer Longstride"], id="search a newer db"),
        pytest.param("chat --db newer.db", ["newer.db", "newer Longstride"], id="chat with a newer db"),
        pytest.param("sessions verify --db typo.db", ["there is no database typo.db"], id="verify nothing"),
        pytest.param("worker dead list --db typo.db", ["there is no database typo.db"], id="dead list of nothing"),
        pytest.param("read nowhere.txt -s s", ["nowhere.txt: cannot be read: No such file"], id="missing file"),
        pytest.param("read . -s s", [".: cannot be read: Is a directory"], id="read a folder"),
        pytest.param("read notes.txt blank.txt -s s", ["blank.txt: the file holds no text"], id="blank file"),
        pytest.param("read broken.pdf -s s", ["broken.pdf: is a damaged PDF"], id="damaged PDF"),
        pytest.param("summarize nowhere.txt", ["nowhere.txt: cannot be read"], id="summarize a missing file"),
        pytest.param("read notes.txt -s s --notes-every 0", ["--notes-every must be 1 or more, not 0"], id="notes"),
        pytest.param("ask -s s what --dtype fp8", ["dtype: ", "'fp8'"], id="dtype"),
        pytest.param("ask -s s what --device gpu9", ["no such device: 'gpu9'"], id="device"),
        pytest.param("ask -s s what --model nowhere", ["no model at nowhere"], id="no model"),
        pytest.param("ask -s s what --model notes.txt", ["notes.txt is not a model"], id="model is text"),
    ],
)
def test_wrong_use_is_refused_in_one_sentence(folder, arguments, words):
    assert_refused(longstride(folder, *arguments.split()), *words)


@pytest.mark.parametrize(
    "command", ["read notes.txt -s s", "ask -s s what", "summarize notes.txt", "docs add notes.txt"]
)
def test_an_empty_model_folder_is_refused_in_one_sentence(folder, command):
    assert_refused(longstride(folder, *command.split(), "--model", "empty model"), "model 'empty model'", "loaded")


def test_a_file_that_cannot_be_read_is_refused(folder):
    path, why = "notes.txt", "Permission denied"
    (folder / path).chmod(0)
    if os.geteuid() == 0:
        path, why = "/proc/self/mem", "Input/output error"  # root may read every file but such a one
    assert_refused(longstride(folder, "read", path, "-s", "s"), f"{path}: cannot be read: {why}")


@pytest.mark.parametrize("source", ["environment", "longstride.toml"])
def test_a_wrong_setting_is_refused_wherever_it_stands(folder, source):
    if source == "environment":
        outcome = longstride(folder, "sessions", "list", LONGSTRIDE_STRIDE="often")
    else:
        (folder / "longstride.toml").write_text('stride = "often"\n')
        outcome = longstride(folder, "sessions", "list")
    assert_refused(outcome, "stride: ", "'often'")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("sing", "No such command 'sing'"),
        ("docs sing", "No such command 'sing'"),
        ("read notes.txt", "Missing option '--session'"),
        ("ask -s s", "Missing argument"),
        ("docs search whale --count 0", "'--count'"),
        ("sessions verify nobody", "unexpected extra argument"),
        ("sessions list --nonsense", "No such option"),
    ],
)
def test_a_line_that_cannot_be_parsed_is_refused_with_usage(folder, arguments, word):
    outcome = longstride(folder, *arguments.split(), COLUMNS="200")
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Usage: longstride" in outcome.err
    assert word in outcome.err
    assert "Traceback" not in outcome.err


def test_an_empty_database_is_no_error(folder):
    for arguments, word in [
        ("docs list", "no documents yet"),
        ("docs search whale", "nothing found"),
        ("sessions list", "no sessions yet"),
        ("sessions verify", "everything is sound"),
    ]:
        outcome = longstride(folder, *arguments.split())
        assert (outcome.code, outcome.err) == (0, "")
        assert word in outcome.out
    documents = json.loads(longstride(folder, "docs", "list", "--json").out)
    assert documents == {"documents": [], "failures": []}
    assert json.loads(longstride(folder, "docs", "search", "whale", "--json").out) == []
    assert json.loads(longstride(folder, "sessions", "list", "--json").out)["sessions"] == []
    assert json.loads(longstride(folder, "sessions", "verify", "--json").out) == {"sound": True, "problems": []}


def test_what_may_be_tried_again_is_no_wrong_use(folder):
    Database(folder / "longstride.db").close()
    connection = sqlite3.connect(folder / "longstride.db")
    connection.execute("begin immediate")
    outcome = longstride(folder, "worker", "dead", "retry", "--all")
    connection.close()
    assert (outcome.code, outcome.out) == (1, "")
    assert "another process has been writing" in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_a_file_that_could_not_be_added_can_be_forgotten(folder):
    path = str(folder / "broken.pdf")
    with Database(folder / "longstride.db") as database:
        documents = Documents(database)
        database.write(lambda tables: documents.fail(tables, path, "is a damaged PDF"))
    assert "failed" in longstride(folder, "docs", "list").out
    assert longstride(folder, "docs", "remove", "broken.pdf").out == f"forgot {path}, which could not be added\n"
    assert "no documents yet" in longstride(folder, "docs", "list").out
    assert_refused(longstride(folder, "docs", "remove", "broken.pdf"), "no document named")


def test_a_name_of_several_documents_removes_none_and_forgets_nothing(folder):
    with Database(folder / "longstride.db") as database:
        documents = Documents(database)
        for number in "ab":
            database.write(lambda t, n=number: documents.add(t, "n.txt", f"/{n}/n.txt", f"text {n}", [(0, 4)]))
        database.write(lambda tables: documents.fail(tables, "/c/n.txt", "is a damaged PDF"))
    assert_refused(longstride(folder, "docs", "remove", "n.txt"), "2 documents named")
    listed = longstride(folder, "docs", "list").out
    assert all(path in listed for path in ("/a/n.txt", "/b/n.txt", "/c/n.txt"))
    assert longstride(folder, "docs", "remove", "/a/n.txt").code == 0
    assert longstride(folder, "docs", "remove", "n.txt").out.startswith("removed n.txt")
    assert longstride(folder, "docs", "remove", "n.txt").out.startswith("forgot /c/n.txt")


def test_doctor_reports_in_json_and_by_its_exit_code(folder):
    outcome = longstride(folder, "doctor", "--json")
    report = json.loads(outcome.out)
    assert {"python", "sqlite", "torch", "compiled layer", "device", "dtype", "database", "free disk"} <= set(
        report["facts"]
    )
    assert outcome.code == (1 if report["problems"] else 0)
    assert outcome.err == ""
    unsound = longstride(folder, "doctor", "--json", "--db", "notes.txt")
    assert unsound.code == 1
    assert any("not a sound SQLite file" in problem for problem in json.loads(unsound.out)["problems"])
    nowhere = longstride(folder, "doctor", "--json", "--db", "no/where.db")
    assert any("does not exist" in problem for problem in json.loads(nowhere.out)["problems"])


def test_verify_fails_on_a_damaged_session(folder):
    database = Database(folder / "longstride.db")
    sessions = Sessions(database)
    id_ = database.write(lambda tables: sessions.create(tables, "s", "m", "v", {}, b""))
    database.write(lambda tables: sessions.append(tables, id_, 0, b"\1\0\0\0", [], 0))
    database.close()
    assert longstride(folder, "sessions", "verify").code == 0
    connection = sqlite3.connect(folder / "longstride.db")
    connection.execute("delete from runs")
    connection.commit()
    connection.close()
    outcome = longstride(folder, "sessions", "verify")
    assert outcome.code == 1
    assert outcome.err.startswith("session 's' is damaged: its stream has a gap at token 0")
    assert len(outcome.err.splitlines()) == 1


def test_debug_shows_the_traceback(folder):
    outcome = longstride(folder, "sessions", "show", "nobody", "--debug")
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert "BadInput: no session 'nobody'" in outcome.err


def test_the_module_runs_as_a_program(folder):
    line = [sys.executable, "-m", "longstride.cli.main", "sessions", "show", "nobody"]
    done = run(line, cwd=folder)
    assert_refused(Outcome(done.returncode, done.stdout, done.stderr), "no session 'nobody'")


def commands(command, name="longstride"):
    """(name, command) of a command and all below it."""
    yield name, command
    for below, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{name} {below}")


def test_every_command_and_every_option_has_a_help_text():
    command_line._register()
    found = dict(commands(typer.main.get_command(command_line.app)))
    assert {"longstride read", "longstride docs add", "longstride sessions verify", "longstride doctor"} <= set(found)
    silent = [name for name, command in found.items() if not command.help]
    silent += [
        f"{name} {parameter.name}"
        for name, command in found.items()
        for parameter in command.params
        if not getattr(parameter, "help", None)
    ]
    assert silent == []
