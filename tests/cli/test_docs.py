"""The documentation says what the code does."""

import ast
import re
from pathlib import Path

import pytest
import typer

from longstride.cli import main
from longstride.scheduler.settings import Settings
from longstride.scheduler.stride import policy

ROOT = Path(__file__).parents[2]
COMMANDS = (ROOT / "docs" / "commands.md").read_text()


def all_commands():
    """(words, click command) of every command."""
    if not main.app.registered_commands:
        main._register()
    root = typer.main.get_command(main.app)
    found = []
    for name, command in root.commands.items():
        inner = getattr(command, "commands", None)
        found += [(f"{name} {sub}", c) for sub, c in inner.items()] if inner else [(name, command)]
    return found


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
        shown = "not set" if default is None else "(see `longstride sessions show`)" if name == "system" else default
        assert field.description, name
        assert f"| `{name}` | {shown} | {field.description} |" in COMMANDS, name


def test_every_policy_is_documented():
    methods = (ROOT / "docs" / "methods.md").read_text()
    for name in Settings.model_fields["policy"].annotation.__args__:
        policy(name, 16)
        assert f"| `{name}` |" in methods


def test_every_room_of_the_architecture_exists():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:engine|scheduler|storage|cli|tests)/[\w/]*\.py)`", text))
    assert named
    for path in named:
        assert (ROOT / path).is_file(), path
    for folder in ("engine", "scheduler", "storage"):
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
