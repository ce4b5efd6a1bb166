"""Which `Window` a policy's name stands for."""

from longstride.engine.tokenizer import Tokenizer, punctuation
from longstride.engine.window import Anchors, Cascade, Separators, Window
from longstride.scheduler.settings import SessionSettings

POLICIES = ("separators", "cascade", "anchors")  # those that do not keep every row of what they have in view


def make_window(policy: str, size: int, tokenizer: Tokenizer, sink: int) -> Window:
    """One of `POLICIES`; `size`: tokens that stay whole, or that an anchor stands for at most."""
    match policy:
        case "separators":
            return Separators(sink, size, punctuation(tokenizer).separators)
        case "cascade":
            return Cascade(sink, size)
        case "anchors":
            return Anchors(sink, size, punctuation(tokenizer).ends)
    raise ValueError(policy)


def prepare(settings: SessionSettings, tokenizer: Tokenizer) -> None:
    """Look through the vocabulary once, if that is needed. Blocks."""
    if settings.window in {"separators", "anchors"}:
        punctuation(tokenizer)


def new_window(settings: SessionSettings, tokenizer: Tokenizer, sink: int) -> Window | None:
    """What a session's settings ask for; None where every row stays (`refuse`, `sinks`)."""
    if settings.window not in POLICIES:
        return None
    size = settings.span_tokens if settings.window == "anchors" else settings.recent_tokens
    return make_window(settings.window, size, tokenizer, sink)
