"""Policies: when to retrieve. Each is a small class with one question; write your own the same way.

A policy is asked after every generated token (a turn begins with a retrieval, unless the policy is
`Never`). Whatever it says, a retrieval that brings the passages already in place rewrites nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longstride.engine.sampling import Choice
from longstride.errors import BadInput


@dataclass(frozen=True)
class Moment:
    """What a policy may look at: tokens generated since the last retrieval, and the state of the generation."""

    since: int
    text: str  # generated since the last retrieval
    choice: Choice  # the last token
    query: Callable[[], Sequence[int]]  # what a retrieval would ask with now
    last_query: Sequence[int]  # what the last one asked with


class Policy(ABC):
    """When to retrieve again."""

    @abstractmethod
    def due(self, moment: Moment) -> bool:
        """Whether to retrieve now."""

    def ahead(self, since: int) -> int | None:  # noqa: ARG002 - for those who can tell
        """How many more tokens can come before a retrieval is due, `since` tokens after the last; None: not known.

        Drafts are not made any longer, as what follows a retrieval cannot be kept. It need not be exact.
        """
        return None


@dataclass(frozen=True)
class EveryTokens(Policy):
    """Every `stride` generated tokens (FlashBack, In-Context RALM)."""

    stride: int = 16

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise BadInput(f"the stride must be 1 or more, not {self.stride}")

    def due(self, moment: Moment) -> bool:
        return moment.since >= self.stride

    def ahead(self, since: int) -> int | None:
        return self.stride - since


@dataclass(frozen=True)
class SentenceEnd(Policy):
    """At the end of a sentence, but not before `at_least` tokens."""

    at_least: int = 4

    def due(self, moment: Moment) -> bool:
        return moment.since >= self.at_least and moment.text.rstrip("\"'”’)] ").endswith((".", "!", "?", "\n"))


@dataclass(frozen=True)
class LowConfidence(Policy):
    """When the last token's probability fell under `threshold` (after FLARE, arXiv 2305.06983)."""

    threshold: float = 0.2
    at_least: int = 4

    def due(self, moment: Moment) -> bool:
        return moment.since >= self.at_least and moment.choice.probability < self.threshold


@dataclass(frozen=True)
class QueryDrift(Policy):
    """When less than `overlap` of the tokens that fetched the segment are still in the query."""

    overlap: float = 0.5

    def due(self, moment: Moment) -> bool:
        old = set(moment.last_query)
        return bool(old) and len(old & set(moment.query())) < self.overlap * len(old)


@dataclass(frozen=True)
class Never(Policy):
    """No retrieval at all."""

    def due(self, moment: Moment) -> bool:  # noqa: ARG002 - the protocol's signature
        return False


def policy(name: str, stride: int) -> Policy:
    """The policy called `name` in settings and on the command line."""
    made: dict[str, Policy] = {
        "tokens": EveryTokens(stride),
        "sentence": SentenceEnd(),
        "confidence": LowConfidence(),
        "drift": QueryDrift(),
        "never": Never(),
    }
    if name not in made:
        raise BadInput(f"no policy {name!r}; there are: {', '.join(made)}")
    return made[name]
