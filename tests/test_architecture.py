"""Who may import whom (docs/architecture.md), from the code's own imports; files stay small."""

import ast
import sys
from pathlib import Path

import pytest

from tests.processes import run

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "engine": set(),
    "storage": set(),
    "scheduler": {"storage", "engine"},
    "service": {"scheduler", "storage", "engine"},
    "tuning": {"scheduler", "storage", "engine"},
    "cli": {"service", "tuning", "scheduler", "storage", "engine"},
}
FOLDERS = [folder for folder in ALLOWED if (ROOT / folder).is_dir()]


def imported(path: Path) -> set[str]:
    """Sub-packages of longstride that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "longstride" else [module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("longstride.")}
    return found & set(ALLOWED)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_what_it_may(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) <= ALLOWED[folder] | {folder}, path


@pytest.mark.parametrize(
    ("folder", "foreign"),
    [("engine", {"sqlite3", "sqlite_utils", "typer", "rich"}), ("storage", {"torch", "transformers"})],
)
def test_a_folder_does_not_know_foreign_libraries(folder, foreign):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & foreign, path


def test_no_file_is_too_long():
    for folder in (*FOLDERS, "tests", "benchmarks", "longstride"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path


def test_every_package_is_installed():
    configured = (ROOT / "pyproject.toml").read_text()
    for folder in FOLDERS:
        assert f'"longstride.{folder}" = "{folder}"' in configured


def test_the_engine_needs_only_torch_and_transformers():
    """With every other dependency hidden, the engine still imports."""
    hidden = [
        "bm25s",
        "sqlite_utils",
        "typer",
        "pydantic_settings",
        "prompt_toolkit",
        "aiomqtt",
        "peft",
        "platformdirs",
    ]
    code = f"import sys\nfor name in {hidden!r}: sys.modules[name] = None\n"
    modules = sorted(p.stem for p in (ROOT / "engine").glob("*.py") if p.stem != "__init__")
    code += "\n".join(f"import longstride.engine.{name}" for name in modules)
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
