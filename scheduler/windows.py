"""Which `Window` a policy's name stands for."""

from longstride.engine.tokenizer import Tokenizer, punctuation
from longstride.engine.window import AddedAnchors, Anchors, Cascade, Separators, Window
from longstride.errors import BadInput
from longstride.scheduler.settings import SessionSettings

ANCHORS = ("anchors", "anchors-added")  # those that a model can be tuned for
POLICIES = ("separators", "cascade", *ANCHORS)  # those that do not keep every row of what they have in view


def make_window(policy: str, recent: int, span: int, tokenizer: Tokenizer, sink: int) -> Window:
    """One of `POLICIES`; `recent`: last tokens that stay whole; `span`: tokens that an anchor stands for at most."""
    match policy:
        case "separators":
            return Separators(sink, recent, punctuation(tokenizer).separators)
        case "cascade":
            return Cascade(sink, recent)
        case "anchors":
            return Anchors(sink, span, punctuation(tokenizer).ends, recent)
        case "anchors-added":
            return AddedAnchors(sink, span, punctuation(tokenizer).ends, anchor_token(tokenizer), recent)
    raise ValueError(policy)


def anchor_token(tokenizer: Tokenizer) -> int:
    """The token that stands for a span where anchors are added. Raises `BadInput` where there is none to spare."""
    spare = tokenizer.spare
    if len(spare) < 3:
        raise BadInput(
            "this model's tokenizer has no special token to spare for anchors (two are left for an adapter's marks); "
            "take --window anchors, whose anchors are tokens of the text"
        )
    return spare[0]


def prepare(settings: SessionSettings, tokenizer: Tokenizer) -> None:
    """Look through the vocabulary once, if that is needed. Blocks."""
    if settings.window in {"separators", *ANCHORS}:
        punctuation(tokenizer)


def new_window(settings: SessionSettings, tokenizer: Tokenizer, sink: int) -> Window | None:
    """What a session's settings ask for; None where every row stays (`refuse`, `sinks`). Raises `BadInput`."""
    if settings.window not in POLICIES:
        return None
    if not settings.recent_tokens and settings.window not in ANCHORS:
        raise BadInput(f"with recent_tokens 0 the window {settings.window} keeps next to nothing; take 1 or more")
    return make_window(settings.window, settings.recent_tokens, settings.span_tokens, tokenizer, sink)
