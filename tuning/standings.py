"""What came out of an evaluation of question answering: means with intervals, paired differences, tables, a plot."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longstride.tuning.qa import Part, Record
from longstride.tuning.report import markdown, pyplot, save
from longstride.tuning.statistics import Interval, by_document, mean, scaled
from longstride.tuning.systems import PREPEND, System

QUALITY = ("score", "exact", "f1", "contained", "retrieved", "gold", "answer_in_view")
COST = ("encoded", "reusing", "cached", "generated", "retrievals", "rewrites", "seconds", "first_token")
HEADERS = (
    "set", "system", "score", "exact", "F1", "contained", "gold in view", "answer in view", "encoded", "prefix reused",
    "cached", "reading", "searches", "seconds",
)  # fmt: skip
NOTES = (
    "Means over questions; in brackets 95 % intervals (Student's, over documents). score: by each question's own "
    "metric (F1, choice or ROUGE-L). gold in view: share of the gold passages that were retrieved or stood in the "
    "window. encoded: prompt-side tokens computed for a question until its answer ended; prefix reused: the same "
    "for a prepending system that keeps the longest prefix it has in common with what it computed last; reading: "
    "tokens computed beforehand to read the text, shared out among its questions."
)


@dataclass(frozen=True)
class Row:
    """One system on one set. `measures` without those that no question of the set has. `reading`: a question's share of
    the tokens that were computed to read the texts; `too_long`: questions left out."""

    set: str
    system: str
    questions: int
    documents: int
    measures: dict[str, Interval]
    reading: float
    too_long: int


@dataclass(frozen=True)
class Difference:
    """`first` minus `second`, paired question by question. `encoded`, `reusing`: tokens of the first over the second's,
    as it is and with its prefix kept."""

    set: str
    first: str
    second: str
    measures: dict[str, Interval]
    encoded: float
    reusing: float


Value = Callable[[Record], float | None]


def _mean(values: Sequence[tuple[str, float | None]]) -> Interval | None:
    """Over (document, value) of questions; None where no question has one."""
    known = [(document, value) for document, value in values if value is not None]
    documents = [document for document, _ in known]
    sums = by_document(documents, (value for _, value in known))
    return mean(sums, by_document(documents, [1.0] * len(known))) if known else None


def rows(parts: Sequence[Part]) -> list[Row]:
    """One for each set and system, in the order of the parts."""
    found = []
    for name, system in dict.fromkeys((part.set, part.system) for part in parts):
        own = [part for part in parts if (part.set, part.system) == (name, system)]
        records = [record for part in own for record in part.records]
        measures = {
            key: interval
            for key in (*QUALITY, *COST)
            if (interval := _mean([(r.document, getattr(r, key)) for r in records])) is not None
        }
        reading = sum(part.read_encoded for part in own) / max(1, len(records))
        documents = len({record.document for record in records})
        too_long = sum(len(part.too_long) for part in own)
        found.append(Row(name, system, len(records), documents, measures, reading, too_long))
    return found


def pairs(systems: Sequence[System]) -> list[tuple[str, str]]:
    """Which systems are compared: each placement with prepending at the same moments (or once, else at its first
    moments), and each system that retrieves again with the same one retrieving once."""
    names = [system.name for system in systems]
    prepending = sorted((name for name in names if name.startswith(PREPEND)), key=lambda name: name != "prepend:once")
    found = []
    for system in systems:
        same = f"{PREPEND}:{system.when}"
        peer = same if same in names else next(iter(prepending), None)
        if peer is not None and not system.prepends and system.when:
            found.append((system.name, peer))
        once = f"{system.name.partition(':')[0]}:once"
        if once in names and system.name != once:
            found.append((system.name, once))
    return found


def differences(parts: Sequence[Part], systems: Sequence[System]) -> list[Difference]:
    """The pairs of systems, set by set."""
    found = []
    for name in dict.fromkeys(part.set for part in parts):
        records = {(r.system, r.id): r for part in parts if part.set == name for r in part.records}
        for first, second in pairs(systems):
            both = [
                (one, other)
                for (system, id_), one in records.items()
                if system == first and (other := records.get((second, id_))) is not None
            ]
            measures = {
                key: interval
                for key in QUALITY
                if (interval := _mean([(a.document, _minus(a, b, key)) for a, b in both])) is not None
            }
            if both:
                encoded = sum(a.encoded for a, _ in both)
                whole, kept = sum(b.encoded for _, b in both), sum(b.reusing for _, b in both)
                found.append(Difference(name, first, second, measures, encoded / whole, encoded / kept))
    return found


def _minus(first: Record, second: Record, key: str) -> float | None:
    a, b = getattr(first, key), getattr(second, key)
    return None if a is None or b is None else float(a - b)


def to_dict(found: Row | Difference) -> dict[str, Any]:
    """Plain data, for JSON; intervals as value, low, high."""
    data = asdict(found)
    data["measures"] = {key: interval._asdict() for key, interval in found.measures.items()}
    return data


def _share(interval: Interval | None, sign: str = "") -> str:
    """In per cent."""
    if interval is None:
        return "-"
    least = -1.0 if sign else 0.0  # of a difference of shares, or of a share: no interval need pass what can be
    return scaled(interval, lambda share: 100 * max(least, min(1.0, share))).shown(f"{sign}.1f")


def _plain(interval: Interval | None, digits: int = 0) -> str:
    return "-" if interval is None else f"{interval.value:,.{digits}f}"


def cells(row: Row) -> list[str]:
    """A row of the table under `HEADERS`; shares in per cent."""
    get = row.measures.get
    shares = [_share(get(key)) for key in ("score", "exact", "f1", "contained", "gold", "answer_in_view")]
    costs = [_plain(get(key)) for key in ("encoded", "reusing", "cached")]
    last = [f"{row.reading:,.0f}", _plain(get("retrievals"), 1), _plain(get("seconds"), 2)]
    return [row.set, row.system, *shares, *costs, *last]


def difference_cells(found: Difference) -> list[str]:
    """A row of the table of differences, in points of per cent."""
    get = found.measures.get
    shares = [_share(get(key), "+") for key in ("score", "exact", "f1", "contained", "gold")]
    return [found.set, f"{found.first} - {found.second}", *shares, f"{found.encoded:.3f}", f"{found.reusing:.3f}"]


DIFFERENCE_HEADERS = (
    "set", "systems", "score", "exact", "F1", "contained", "gold in view", "encoded ratio", "with prefix reused",
)  # fmt: skip


SHORT_HEADERS = ("system", "score", "exact", "F1", "gold seen", "answer seen", "encoded", "cached", "seconds")
SHORT_DIFFERENCE_HEADERS = ("systems", "score", "encoded ratio", "with prefix reused")


def short_cells(row: Row) -> list[str]:
    """As much of a row as a terminal is wide."""
    get = row.measures.get
    shares = [
        "-" if (found := get(key)) is None else f"{100 * found.value:.1f}"
        for key in ("exact", "f1", "gold", "answer_in_view")
    ]
    costs = [_plain(get("encoded")), _plain(get("cached")), _plain(get("seconds"), 2)]
    return [row.system, _share(get("score")), *shares, *costs]


def short_difference_cells(found: Difference) -> list[str]:
    """The same of a difference."""
    score = _share(found.measures.get("score"), "+")
    return [f"{found.first} - {found.second}", score, f"{found.encoded:.3f}", f"{found.reusing:.3f}"]


def as_markdown(found: Sequence[Row], compared: Sequence[Difference], about: dict[str, Any]) -> str:
    """Both tables, and under them what the columns mean and how the figures came about."""
    sets = {row.set: f"{row.set}: {row.questions} questions about {row.documents} documents" for row in found}
    origin = ", ".join(f"{key} {value}" for key, value in about.items())
    parts = [markdown(HEADERS, [cells(row) for row in found])]
    if compared:
        parts.append(markdown(DIFFERENCE_HEADERS, [difference_cells(one) for one in compared]))
    return "\n".join([*parts, f"{NOTES} {'; '.join(sets.values())}.\n", f"{origin}.\n"])


def plot(found: Sequence[Row], to: Path) -> None:
    """A panel a set: score over tokens encoded for a question, with intervals."""
    plt = pyplot()
    names = list(dict.fromkeys(row.set for row in found))
    figure, panels = plt.subplots(1, len(names), figsize=(5.5 * len(names), 4.5), layout="constrained", squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        for number, row in enumerate(r for r in found if r.set == name and r.questions):
            score, encoded = row.measures["score"], row.measures["encoded"].value
            low, high = (100 * abs(score.value - end) for end in score.known)
            marker = "s" if row.system.startswith(PREPEND) else "o"
            # ten colours, then they come again with another filling
            axes.errorbar(
                encoded, 100 * score.value, yerr=[[low], [high]], fmt=marker, capsize=2, color=f"C{number % 10}",
                fillstyle="full" if number < 10 else "none", label=row.system,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("tokens encoded for a question")
        axes.set_ylabel("score (%)")
        axes.set_title(name)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][-1].legend(frameon=False, fontsize=7)
    save(figure, to)
