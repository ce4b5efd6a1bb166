"""The documentation says what the code does; `longstride docs` keeps collections apart."""

import ast
import json
import re
from pathlib import Path

import pytest
import typer

from longstride.cli import main
from longstride.scheduler.settings import Settings
from longstride.scheduler.stride import policy
from longstride.service.metrics import Metrics
from longstride.service.requests import Ask, Topics
from longstride.service.settings import WorkerSettings
from longstride.storage.database import Database
from longstride.storage.documents import Documents
from tests.cli.test_errors import assert_refused, longstride

ROOT = Path(__file__).parents[2]
COMMANDS = (ROOT / "docs" / "commands.md").read_text()


def all_commands():
    """(words, click command) of every command."""
    if not main.app.registered_commands:
        main._register()

    def below(name, command):
        inner = getattr(command, "commands", {})
        own = [(name, command)] if not inner or command.invoke_without_command else []
        return own + [pair for sub, c in inner.items() for pair in below(f"{name} {sub}", c)]

    return [pair for name, c in typer.main.get_command(main.app).commands.items() for pair in below(name, c)]


def test_every_command_is_documented_and_has_help():
    for words, command in all_commands():
        assert f"`longstride {words}" in COMMANDS, words
        assert command.help, words
        for parameter in command.params:
            assert getattr(parameter, "help", "documented"), f"{words} {parameter.name}"


def test_no_other_command_is_documented():
    known = {words for words, _ in all_commands()}
    for text in (COMMANDS, (ROOT / "README.md").read_text()):
        for words in re.findall(r"`longstride ([a-z]+(?: [a-z]+)?)", text):
            assert words in known or words.split()[0] in known, words


def test_every_setting_is_documented_with_its_default():
    for name, field in Settings.model_fields.items():
        default = getattr(field.default, "value", field.default)
        default = json.dumps(default) if isinstance(default, list) else default  # as the environment spells it
        shown = "not set" if default is None else "(see `longstride sessions show`)" if name == "system" else default
        assert field.description, name
        assert f"| `{name}` | {shown} | {field.description} |" in COMMANDS, name


def test_every_setting_of_the_worker_is_documented_with_its_default():
    for name, field in WorkerSettings.model_fields.items():
        shown = "not set" if field.default is None else field.default
        assert f"| `{name}` | {shown} | {field.description} |" in COMMANDS, name


def test_the_topics_and_metrics_of_the_worker_are_documented():
    operations = (ROOT / "docs" / "operations.md").read_text()
    topics = Topics("longstride")
    for topic in (*topics.requests, topics.of("+", "answers"), topics.of("+", "stream"), topics.of("+", "notes")):
        assert f"`{topic.replace('+', '<session>')}`" in operations
    assert f"`{topics.dead}`" in operations
    assert f"`{topics.status('<name>')}`" in operations
    for field in set(Ask.model_fields) - {"id", "question"}:
        assert f"`{field}`" in operations, field
    for metric in Metrics().registry.collect():
        assert metric.name in operations, metric.name


def test_every_policy_is_documented():
    methods = (ROOT / "docs" / "methods.md").read_text()
    for name in Settings.model_fields["policy"].annotation.__args__:
        policy(name, 16)
        assert f"| `{name}` |" in methods


def test_every_room_of_the_architecture_exists():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:engine|scheduler|storage|service|cli|tests)/[\w/]*\.py)`", text))
    assert named
    for path in named:
        assert (ROOT / path).is_file(), path
    for folder in ("engine", "scheduler", "storage", "service", "tuning"):
        for path in (ROOT / folder).glob("*.py"):
            if path.name != "__init__.py":
                assert f"`{folder}/{path.name}`" in text, path


@pytest.mark.parametrize(
    "page", ["README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md")))]
)
def test_links_lead_somewhere_and_python_is_valid(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(code)


def test_every_dependency_has_its_reason_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    configured = re.findall(r'^    "([A-Za-z_0-9-]+)[>=\[]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for name in configured:
        if name != "longstride":
            assert re.search(rf"\b{re.escape(name)}\b", readme), name


# --- longstride docs ---


@pytest.fixture
def folder(tmp_path):
    """A working folder with a database: one text in two collections, another in one."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "notes.txt").write_text("An anchor.")
    database = Database(here / "longstride.db")
    documents = Documents(database)
    for name, text, collection in (
        ("one.txt", "An anchor of iron.", "default"),
        ("two.txt", "An anchor of gold.", "banks"),
        ("one again.txt", "An anchor of iron.", "banks"),
    ):
        spans = [(0, len(text))]
        database.write(lambda tables: documents.add(tables, name, None, text, spans, collection))  # noqa: B023
    database.close()
    return here


def listed(folder, *options):
    found = json.loads(longstride(folder, "docs", "list", "--json", *options).out)["documents"]
    return [(document["collection"], document["name"]) for document in found]


def test_docs_list_shows_collections_and_keeps_to_one(folder):
    everything = [("default", "one.txt"), ("banks", "two.txt"), ("banks", "one again.txt")]
    assert sorted(listed(folder)) == sorted(everything)
    assert listed(folder, "--collection", "default") == everything[:1]
    assert listed(folder, "--collection", "nothing") == []
    lines = longstride(folder, "docs", "list").out.splitlines()
    assert len(lines) == 3
    assert any("banks  one again.txt  18 characters, 1 passages" in line for line in lines)


def test_docs_search_keeps_to_a_collection(folder):
    def found(*options):
        return [
            p["document"] for p in json.loads(longstride(folder, "docs", "search", "anchor", "--json", *options).out)
        ]

    assert found() == ["one.txt", "two.txt"]
    assert found("--collection", "default") == ["one.txt"]
    assert sorted(found("--collection", "banks")) == ["one again.txt", "two.txt"]
    assert found("--collection", "nothing") == []


def test_docs_remove_takes_a_document_out_of_one_collection(folder):
    assert_refused(longstride(folder, "docs", "remove", "two.txt"), "no document named 'two.txt'", "'default'", "list")
    assert longstride(folder, "docs", "remove", "two.txt", "--collection", "banks").code == 0
    outcome = longstride(folder, "docs", "remove", "one.txt")
    assert (outcome.code, outcome.out) == (0, "removed one.txt (1 passages) from collection default\n")
    assert listed(folder) == [("banks", "one again.txt")]


def test_docs_add_refuses_a_collection_without_a_name(folder):
    outcome = longstride(folder, "docs", "add", "notes.txt", "--collection", "")
    assert_refused(outcome, "a collection needs a name of 1 to 100 printable characters, not ''")
