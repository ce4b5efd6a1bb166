"""What a question brings back."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Source:
    """A passage that conditioned an answer. `start`, `stop`: characters in the document; `answer`: the character
    span of the answer it was in view for."""

    document: str
    passage: str
    start: int
    stop: int
    score: float
    answer: tuple[int, int]
    text: str


@dataclass
class Usage:
    """Tokens of an answer.

    `cached`: context tokens whose KV was reused (kept from reading, restored, or copied from a passage encoded
    before); `encoded`: context tokens computed before the first token of the answer; `generated`. Without rewrites
    their sum is the context at the end. `rewritten`: tokens computed by rewrites during the answer, each a tail that
    stays and what is new of the segment. `retrievals`: searches; `rewrites`: segments replaced during the answer.
    `drafted`: tokens that went through the model as drafts; `accepted`: those of them that were kept; `steps`: forwards
    that brought tokens.
    """

    cached: int = 0
    encoded: int = 0
    generated: int = 0
    rewritten: int = 0
    retrievals: int = 0
    rewrites: int = 0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0


@dataclass
class Timing:
    """Seconds of an answer. `first_token`: from the question to the first token."""

    retrieve: float = 0.0
    encode: float = 0.0
    decode: float = 0.0
    first_token: float = 0.0
    tokens_per_second: float = 0.0


@dataclass
class Answer:
    """A finished answer. `finish`: "stop" (the model ended it), "length" or "context" (no room was left)."""

    question: str
    text: str = ""
    finish: str = "stop"
    sources: list[Source] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    timing: Timing = field(default_factory=Timing)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Piece:
    """A bit of an answer's text; the last one carries the whole answer."""

    text: str
    answer: Answer | None = None


@dataclass(frozen=True)
class Note:
    """A running note: what was noted after `tokens` tokens of the stream."""

    tokens: int
    answer: Answer


@dataclass
class ReadReport:
    """What a `feed` did. `encoded` counts tokens computed, those of a slid window again."""

    tokens: int = 0
    encoded: int = 0
    blocks: int = 0
    seconds: float = 0.0
    slides: int = 0
    notes: list[Note] = field(default_factory=list)


@dataclass(frozen=True)
class ResumeReport:
    """How a session came back: `tokens` of its context, `restored` of them from stored blocks, what was wrong."""

    tokens: int
    restored: int
    seconds: float
    problems: tuple[str, ...] = ()
