"""`longstride worker` on the command line: what it refuses, and the dead."""

import json
import socket

import pytest

from longstride.storage.database import Database
from longstride.storage.jobs import Job, Jobs
from longstride.storage.lock import WorkerLock
from tests.cli.test_errors import assert_refused, longstride


@pytest.fixture
def folder(tmp_path):
    """A working folder with three dead messages."""
    here = tmp_path / "here"
    here.mkdir()
    database = Database(here / "longstride.db")
    jobs = Jobs(database)
    for number in range(3):
        job = Job(f"s/ask/id {number}", "s", "ask", "longstride/sessions/s/ask", b"{}")
        database.write(lambda tables, job=job: jobs.receive(tables, job, "question: field required"))
    database.close()
    return here


def numbers(folder):
    return [job["seq"] for job in json.loads(longstride(folder, "worker", "dead", "list", "--json").out)]


def test_the_dead_are_listed_retried_and_dropped(folder):
    lines = longstride(folder, "worker", "dead", "list").out.splitlines()
    assert len(lines) == 3
    assert "longstride/sessions/s/ask  2 bytes: question: field required" in lines[0]
    first, second, third = numbers(folder)
    shown = longstride(folder, "worker", "dead", "show", str(second)).out.splitlines()
    assert shown[0].startswith("longstride/sessions/s/ask, received ")
    assert shown[1:] == ["question: field required, 0 attempts", "", "{}"]
    assert longstride(folder, "worker", "dead", "drop", str(second)).out == "1 dropped\n"
    assert numbers(folder) == [first, third]
    assert longstride(folder, "worker", "dead", "retry", str(first)).out == "1 will be tried again\n"
    assert numbers(folder) == [third]
    assert longstride(folder, "worker", "dead", "retry", "--all").code == 0
    assert longstride(folder, "worker", "dead", "list").out == "none\n"
    assert Jobs(Database(folder / "longstride.db")).depth()[0] == 2


def test_what_a_sender_wrote_does_not_steer_the_terminal(folder):
    database = Database(folder / "longstride.db")
    jobs = Jobs(database)
    job = Job("k", "s", "feed", "longstride/sessions/\x1b[2J\n9  forged/feed", b"one\n\x1b]0;title\x07two\xff")
    database.write(lambda tables: jobs.receive(tables, job, "bad"))
    database.close()
    number = str(numbers(folder)[-1])
    for arguments in (["list"], ["show", number]):
        assert "\x1b" not in longstride(folder, "worker", "dead", *arguments).out
    assert len(longstride(folder, "worker", "dead", "list").out.splitlines()) == 4
    shown = longstride(folder, "worker", "dead", "show", number).out
    assert "one\n?]0;title?two\N{REPLACEMENT CHARACTER}\n" in shown
    assert_refused(longstride(folder, "worker", "dead", "show", "99"), "no dead message has the number 99")
    assert_refused(longstride(folder, "worker", "dead", "show", "0"), "no dead message has the number 0")


def test_one_or_all_must_be_named(folder):
    for command in ("retry", "drop"):
        assert_refused(longstride(folder, "worker", "dead", command), "by its number", "--all")
        assert_refused(longstride(folder, "worker", "dead", command, "1", "--all"), "by its number", "--all")
        assert_refused(longstride(folder, "worker", "dead", command, "99"), "no dead message has the number 99")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--broker http://x", ["mqtt://HOST:PORT"]),
        ("--broker mqtt://x:port", ["mqtt://HOST:PORT"]),
        ("--broker mqtt://", ["mqtt://HOST:PORT"]),
        ("--broker mqtt://me:sesame@x", ["password_file"]),
        ("--user me --password-file nowhere", ["nowhere cannot be read"]),
        ("--user me --password-file empty", ["empty", "its first line is the password"]),
        ("--topics a/#", ["topics: "]),
        ("--name a/b", ["name: "]),
        ("--sessions-at-once 0", ["sessions_at_once: "]),
        ("--log-level loud", ["--log-level", "'loud'"]),
    ],
)
def test_wrong_use_is_refused_in_one_sentence(folder, arguments, words):
    (folder / "empty").write_text("")
    outcome = longstride(folder, "worker", *arguments.split())
    assert_refused(outcome, *words)
    assert "sesame" not in outcome.err


def test_settings_come_from_their_own_table(folder):
    (folder / "longstride.toml").write_text('stride = 8\n[worker]\nbroker = "nonsense"\n')
    assert_refused(longstride(folder, "worker"), "mqtt://HOST:PORT", "'nonsense'")
    assert longstride(folder, "worker", "dead", "list").code == 0
    (folder / "longstride.toml").write_text("[worker]\ncolour = 1\n")
    assert_refused(longstride(folder, "worker"), "colour: ")
    assert_refused(longstride(folder, "worker", LONGSTRIDE_WORKER_ATTEMPTS="0"), "attempts: ")


@pytest.mark.real_model
def test_a_second_worker_and_a_taken_port_are_refused(folder):
    database = Database(folder / "longstride.db")
    with WorkerLock(database):
        outcome = longstride(folder, "worker", "--log-level", "error")
        assert_refused(outcome, "another worker is at work on")
    database.close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        outcome = longstride(folder, "worker", "--metrics-port", port, "--log-level", "error")
        assert_refused(outcome, f"the metrics port 127.0.0.1:{port} cannot be opened")
