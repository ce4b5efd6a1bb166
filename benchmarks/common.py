"""What all benchmarks share: the machine's description, the result file, the table."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longstride.engine.embedded import package_versions


def shipped_text() -> str:
    """The chapters that come with the package: what is measured when no other text is named."""
    return files("longstride.cli").joinpath("data", "alice_chapters_1_2.txt").read_text(encoding="utf-8")


@dataclass
class Row:
    """One system at one setting. `runs` are single measurements in `unit`."""

    system: str
    setting: dict[str, Any]
    unit: str
    runs: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median of the runs."""
        return statistics.median(self.runs)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **package_versions("torch", "transformers"),
    }


def report(rows: Sequence[Row], ratios: dict[str, float], extra: dict[str, Any], to: Path | None) -> None:
    """Print the table and the ratios (above 1: we are better); write them as JSON if asked."""
    console = Console()
    table = Table("system", "setting", "median", "min", "max", "unit", "runs")
    for row in rows:
        setting = ", ".join(f"{name} {value}" for name, value in row.setting.items())
        low, high = min(row.runs), max(row.runs)
        table.add_row(
            row.system, setting, f"{row.median:.4g}", f"{low:.4g}", f"{high:.4g}", row.unit, str(len(row.runs))
        )
    console.print(table)
    for name, ratio in ratios.items():
        console.print(f"{name}: {ratio:.2f}x")
    if to is not None:
        data = {
            "machine": machine(),
            **extra,
            "rows": [{**asdict(row), "median": row.median} for row in rows],
            "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        }
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps(data, indent=1) + "\n")


def plot(rows: Sequence[Row], title: str, to: Path) -> None:
    """Medians as bars, a group a setting's length, the range of the runs as a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    systems = list(dict.fromkeys(row.system for row in rows))
    lengths = list(dict.fromkeys(str(row.setting["length"]) for row in rows))
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    width = 0.8 / len(systems)
    for s, system in enumerate(systems):
        mine = {str(row.setting["length"]): row for row in rows if row.system == system}
        places = [i + (s - (len(systems) - 1) / 2) * width for i, length in enumerate(lengths) if length in mine]
        found = [mine[length] for length in lengths if length in mine]
        spread = [[r.median - min(r.runs) for r in found], [max(r.runs) - r.median for r in found]]
        bars = axes.bar(places, [r.median for r in found], width, yerr=spread, capsize=2, label=system)
        axes.bar_label(bars, [f"{r.median:.3g}" for r in found], fontsize=7, padding=2)
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_ylabel(rows[0].unit)
    axes.set_title(title)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=150)
    plt.close(figure)
