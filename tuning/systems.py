"""The systems that answer the questions: a placement, or prepending, and when they retrieve; and what they share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longstride.engine.adapter import Adapter, load_adapter, shipped_adapter
from longstride.engine.context import Placement
from longstride.engine.model import Model
from longstride.errors import BadInput
from longstride.scheduler.marks import Marks
from longstride.tuning.prepend import SEPARATOR

CLOSED = "closed-book"
PREPEND = "prepend"
ONCE = 1_000_000  # a stride that no answer reaches: retrieval before the answer and never again
POLICIES = ("sentence", "confidence", "drift")
DEFAULT = (
    "closed-book,prepend:once,prepend:16,turn:16,end:16,beside:once,beside:4,beside:8,beside:16,beside:sentence,"
    "beside:confidence,beside:drift"
)
SYSTEM = "You answer questions about the text you are given. Answer with a few words of the text and nothing else."


@dataclass(frozen=True)
class System:
    """`placement`: of the session that it asks, or that lends its text to prepending."""

    name: str
    placement: Placement
    policy: str
    stride: int = ONCE

    @property
    def prepends(self) -> bool:
        """Whether it is the comparison and not the product."""
        return self.name.startswith(PREPEND)

    @property
    def plain(self) -> bool:
        """Whether it has no adapter, whatever the others have: those are trained for a segment in its place."""
        return self.prepends or self.policy == "never"

    @property
    def when(self) -> str:
        """When it retrieves: once, a stride, or the name of a policy."""
        return self.name.partition(":")[2]


def system(name: str) -> System:
    """The system called `closed-book`, or `PLACEMENT:WHEN`. Raises `BadInput`."""
    if name == CLOSED:
        return System(name, Placement.BESIDE, "never")
    where, _, when = name.partition(":")
    if where in (PREPEND, *Placement):
        placement = Placement.BESIDE if where == PREPEND else Placement(where)
        if when == "once":
            return System(name, placement, "tokens")
        if when in POLICIES:
            return System(name, placement, when)
        if when.isdecimal() and when.isascii() and 0 < int(when) < ONCE and not when.startswith("0"):
            return System(name, placement, "tokens", int(when))
    raise BadInput(
        f"no system {name!r}; write {CLOSED}, or PLACEMENT:WHEN with beside, end, turn or prepend, and once, a number "
        f"of tokens, {', '.join(POLICIES[:-1])} or {POLICIES[-1]} (for example beside:16)"
    )


def systems(names: str) -> list[System]:
    """The systems of a list with commas. Raises `BadInput` for an empty list too, and for one named twice."""
    found = [system(name.strip()) for name in names.split(",") if name.strip()]
    if not found:
        raise BadInput("no systems to compare; name some, for example beside:16,prepend:16")
    if len({one.name for one in found}) < len(found):
        raise BadInput(f"a system is named twice in {names!r}")
    return found


@dataclass(frozen=True)
class Setup:
    """What all systems share. `context_tokens`: of a `beside` session. `adapter`: as in a session's settings."""

    context_tokens: int = 1024
    passages: int = 3
    passage_tokens: int = 128
    query_tokens: int = 32
    passage_weight: float = 0.5
    refresh: int | None = None
    max_tokens: int = 32
    system: str = SYSTEM
    adapter: str = "auto"

    def load_adapter(self, asked: System, model: Model) -> Adapter | None:
        """What acts on the segments of a system."""
        if asked.plain or self.adapter == "none":
            return None
        auto = self.adapter == "auto"
        folder = shipped_adapter(model.name, asked.placement) if auto else Path(self.adapter)
        adapter = None if folder is None else load_adapter(folder, model)
        # one that was trained for another placement would be no fair comparison, and no session would take it
        return adapter if adapter is not None and adapter.placement in {"", asked.placement} else None

    def for_session(self, placement: Placement, model: Model, adapter: Adapter | None = None) -> dict[str, Any]:
        """Settings of a session: greedy, undrafted, with a window; all but its adapter.

        Every placement gets the same room for text and for passages, so that all systems see the same: passages one
        after the other (`end`, `turn`) need more positions than those that share theirs (`beside`).
        """
        return {
            "placement": placement,
            "context_tokens": self.context_tokens + self._more(placement, model, adapter),
            "window": "sinks",
            "passages": self.passages,
            "passage_tokens": self.passage_tokens,
            "query_tokens": self.query_tokens,
            "passage_weight": self.passage_weight,
            "refresh": self.refresh,
            "system": self.system,
            # the most room for a question and its answer: no question may slide the window that the next one sees
            "max_tokens": self.context_tokens,
            "temperature": 0.0,
            "repetition_penalty": 1.0,
            "drafting": "off",
        }

    def _more(self, placement: Placement, model: Model, adapter: Adapter | None) -> int:
        if placement is Placement.BESIDE:
            return 0
        return (self.passages - 1) * self.passage_tokens + Marks.of(model.tokenizer, placement, adapter).size

    def check(self, asked: System, model: Model, adapter: Adapter | None = None) -> None:
        """Raises `BadInput` when what a system needs passes the model's positions."""
        most = model.runner.max_positions
        more = self._more(asked.placement, model, adapter)
        if asked.prepends:
            more = self.passages * (self.passage_tokens + len(model.tokenizer.encode(SEPARATOR))) - self.passage_tokens
        if self.context_tokens + more > most:
            raise BadInput(
                f"system {asked.name}: a context of {self.context_tokens} tokens with {self.passages} passages of "
                f"{self.passage_tokens} one after the other needs {self.context_tokens + more} positions and the "
                f"model has {most}; take a smaller --context-tokens, --passages or --passage-tokens"
            )
