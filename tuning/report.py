"""What an evaluation leaves behind: JSON with everything, a Markdown table, a plot; and how it came about."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from longstride.engine.embedded import package_versions
from longstride.engine.model import Model, PlainModel
from longstride.errors import BadInput


def provenance(model: Model) -> dict[str, Any]:
    """Date, commit (where this is a checkout), machine, versions and model."""
    runner = model.runner
    return {**_here(runner.device, runner.dtype), "model": model.name, "fingerprint": model.fingerprint[:16]}


def trained_with(plain: PlainModel) -> dict[str, Any]:
    """The same for a model that is trained."""
    return {**_here(plain.model.device, plain.model.dtype), "model": plain.name}


def _here(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        **package_versions("torch", "transformers", "peft"),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None  # installed from a wheel
    return found.stdout.strip()


def markdown(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def write_json(path: Path, data: Any, *, indent: int | None = 1) -> None:
    """Write JSON, as `write_text` does."""
    write_text(path, json.dumps(data, indent=indent, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write beside and rename, so that a file that is there is whole."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}") from error


def need_matplotlib() -> None:
    """Raises `BadInput` where it is not installed: before the work, not after it."""
    try:
        import matplotlib  # noqa: F401, ICN001
    except ImportError as error:
        raise BadInput("a plot needs matplotlib; install it with: pip install 'longstride[plots]'") from error


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files only."""
    need_matplotlib()
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, to: Path) -> None:
    """Write a figure and let go of it."""
    plt = pyplot()
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(to, dpi=130)
    except (OSError, ValueError) as error:
        raise BadInput(f"{to} cannot be written: {error}") from error
    finally:
        plt.close(figure)
