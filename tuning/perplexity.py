"""The evaluation grid: perplexity of texts under each layout, with intervals, and what each costs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from longstride.engine.adapter import Adapter
from longstride.engine.model import Model
from longstride.tuning import statistics
from longstride.tuning.kept import Kept
from longstride.tuning.layouts import Layout, Measured, Scorer
from longstride.tuning.report import markdown, pyplot, save
from longstride.tuning.statistics import Interval
from longstride.tuning.strides import Shape, Window

FORMAT = 4  # of what is kept; another number wherever the same layout would now give other losses
BASE = Layout("none")
# What the issue of placements turns on: where, how many, how much is read again, and whether a useless passage harms.
LAYOUTS = tuple(
    Layout.parse(spelled)
    for spelled in (
        "none",
        "prepend",
        "prepend,passages=3",
        "end",
        "turn",
        "beside,refresh=1",
        "beside",
        "beside,refresh=64",
        "beside,passages=3",
        "beside,source=chance",
        "beside,source=oracle",
    )
)


@dataclass
class Cell:
    """One layout on one set at one window."""

    set: str
    window: int
    layout: Layout
    documents: list[str] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)

    def _by_document(self, values: Iterable[float]) -> list[float]:
        return statistics.by_document(self.documents, values)

    @property
    def targets(self) -> int:
        """Targets in all."""
        return sum(len(m.losses) for m in self.measured)

    def perplexity(self) -> Interval:
        """Per token."""
        return statistics.perplexity(
            statistics.mean(
                self._by_document(sum(m.losses) for m in self.measured),
                self._by_document(len(m.losses) for m in self.measured),
            )
        )

    def word_perplexity(self) -> Interval | None:
        """Per word (words that begin in the targets); None for texts that have no words between blanks."""
        if not any(self.words):
            return None
        return statistics.perplexity(
            statistics.mean(
                self._by_document(sum(m.losses) for m in self.measured), self._by_document(map(float, self.words))
            )
        )

    def against(self, other: "Cell") -> Interval:
        """The ratio of this perplexity to another's on the same windows, paired; below 1 is better."""
        differences = (sum(a.losses) - sum(b.losses) for a, b in zip(self.measured, other.measured, strict=True))
        counts = self._by_document(len(m.losses) for m in self.measured)
        return statistics.perplexity(statistics.mean(self._by_document(differences), counts))


class Grid:
    """Measures windows under layouts. What was measured is kept in the folder `work`, so that a run can go on."""

    def __init__(
        self, model: Model, shape: Shape, scorer: Scorer, adapters: dict[str, Adapter], work: Path | None
    ) -> None:
        self.model = model
        self.shape = shape
        self.scorer = scorer
        self.adapters = adapters
        self.kept = Kept(work)

    def measure(
        self, name: str, windows: Sequence[Window], layout: Layout, progress: Callable[[], None] = lambda: None
    ) -> Cell:
        """All windows of a set under a layout; `progress` hears of each."""
        cell = Cell(name, self.shape.window, layout)
        for window in windows:
            cell.documents.append(window.document)
            cell.words.append(window.words)
            cell.measured.append(self._measured(window, layout))
            progress()
        return cell

    def _measured(self, window: Window, layout: Layout) -> Measured:
        adapter = self.adapters[layout.adapter] if layout.adapter else None
        identity = self._identity(window, layout, adapter)
        found = self.kept.get(identity, layout.place, lambda part: Measured(**part))
        if found is not None:
            return found
        measured = self.scorer.score(window, layout, self.shape, adapter)
        self.kept.put(identity, layout.place, asdict(measured))
        return measured

    def _identity(self, window: Window, layout: Layout, adapter: Adapter | None) -> dict[str, Any]:
        """Everything that decides a result."""
        return {
            "format": FORMAT,
            "model": self.model.fingerprint,
            "adapter": None if adapter is None else adapter.fingerprint,
            "layout": {**asdict(layout), "adapter": ""},
            "shape": {**asdict(self.shape), "passages": layout.passages},  # not the most that any layout has
            "prompt": self.scorer.prompt,
            "marks": [list(mark) for mark in self.scorer.marks],
            "text": window.text,
            "strides": [(stride.targets, layout.chosen(stride)) for stride in window.strides],
        }


def table(cells: Sequence[Cell]) -> str:
    """Markdown: a row a cell, its ratio to no retrieval on the same set and window beside it."""
    bases = {(c.set, c.window): c for c in cells if c.layout == BASE}
    rows = []
    for cell in cells:
        base = bases.get((cell.set, cell.window))
        seconds = sum(m.seconds for m in cell.measured)
        rows.append(
            [
                cell.set,
                cell.window,
                str(cell.layout),
                cell.targets,
                len(set(cell.documents)),
                cell.perplexity().shown(".3f"),
                "-" if (words := cell.word_perplexity()) is None else f"{words.value:.1f}",
                cell.against(base).shown(".3f") if base is not None else "",
                f"{sum(m.encoded for m in cell.measured) / cell.targets:.1f}",
                f"{1000 * seconds / cell.targets:.0f}",
            ]
        )
    headers = (
        "set", "window", "layout", "targets", "texts", "perplexity [95 %]", "a word", "against none [95 %]",
        "rows a target", "ms a target",
    )  # fmt: skip
    return markdown(headers, rows)


def data(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Cells as JSON, with the loss of every target."""
    return [
        {
            "set": cell.set,
            "window": cell.window,
            "layout": str(cell.layout),
            "targets": cell.targets,
            "perplexity": cell.perplexity()._asdict(),
            "word_perplexity": None if (words := cell.word_perplexity()) is None else words._asdict(),
            "encoded": sum(m.encoded for m in cell.measured),
            "seconds": round(sum(m.seconds for m in cell.measured), 2),
            "documents": cell.documents,
            "losses": [[round(loss, 3) for loss in m.losses] for m in cell.measured],
        }
        for cell in cells
    ]


def plot(cells: Sequence[Cell], to: Path) -> None:
    """Each layout's perplexity as a share of that without retrieval: a panel a set, a row of panels a window."""
    plt = pyplot()
    bases = {(c.set, c.window): c for c in cells if c.layout == BASE}
    shown = [c for c in cells if (c.set, c.window) in bases and c.layout != BASE]
    windows = list(dict.fromkeys(c.window for c in shown)) or [0]  # an empty panel where nothing stands beside `none`
    sets = list(dict.fromkeys(c.set for c in shown)) or [""]
    layouts = list(dict.fromkeys(str(c.layout) for c in shown))
    figure, axes = plt.subplots(
        len(windows), len(sets), figsize=(2.8 + 1.7 * len(sets), (1.0 + 0.22 * len(layouts)) * len(windows)),
        layout="constrained", squeeze=False, sharey=True,
    )  # fmt: skip
    colours = plt.get_cmap("tab20").colors * (1 + len(layouts) // 20)
    for across, window in zip(axes, windows, strict=True):
        for ax, name in zip(across, sets, strict=True):
            for cell in (c for c in shown if (c.set, c.window) == (name, window)):
                at = layouts.index(str(cell.layout))
                ratio = cell.against(bases[name, window])
                low, high = ratio.known
                spread = [[ratio.value - low], [high - ratio.value]]
                ax.errorbar(ratio.value, at, xerr=spread, fmt="o", markersize=4, capsize=2, color=colours[at])
            ax.axvline(1, color="0.6", linewidth=0.8)
            ax.set_xlim(right=min(1.6, ax.get_xlim()[1]))
            ax.set_title(f"{name}, window {window:,}", fontsize=8)
            ax.tick_params(axis="x", labelsize=7)
            ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(layouts)), layouts, fontsize=7)
    axes[0][0].invert_yaxis()
    figure.supxlabel(
        "perplexity against no retrieval, with its interval of 95 % over texts (left is better)", fontsize=8
    )
    save(figure, to)
