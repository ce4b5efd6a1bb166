"""Notes: turns that nobody asked for, on what was read last, and on what is about to leave the window (`rollup`)."""

from typing import TYPE_CHECKING

from sqlite_utils import Database as Tables

from longstride.scheduler.answer import Answer
from longstride.scheduler.core import Also
from longstride.scheduler.settings import SessionSettings, changed
from longstride.scheduler.turn import Turn

if TYPE_CHECKING:
    from longstride.scheduler.session import Session

NOTE = "Note the main points of the last part of the text in one or two sentences."
ROLLUP = "rollup"
ROLLUP_REQUEST = "Sum up the text so far in a few sentences, with its names and what matters for what follows."
NOTE_TOKENS = 96


def size(session: "Session", request: str) -> int:
    """Tokens that a request takes with what stands around its answer."""
    frame = session.frame
    return len(session.core.model.tokenizer.encode(f"\n\n{request}")) + len(frame.answer) + len(frame.resume)


async def note(session: "Session", also: Also[Answer] | None = None) -> Answer:
    """A running note on what was just read; the query is the stream's own end."""
    settings = changed(session.settings, {"max_tokens": min(session.settings.max_tokens, NOTE_TOKENS)})
    return await _written(session, "note", NOTE, settings, session.stream[-settings.query_tokens :].tolist(), also)


async def roll_up(session: "Session", start: int) -> list[int]:
    """Notes on all in view, as they will stand in front of the stream from `start` on; stored together with that."""
    most = min(
        session.view.most_lead - len(_lead(session, "")),
        session.sequence.context.room - size(session, ROLLUP_REQUEST),
    )
    if most < 1:
        return session.view.lead  # there is no room for new ones
    settings = changed(session.settings, {"max_tokens": most, "policy": "never", "temperature": 0.0})

    def also(tables: Tables, _answer: Answer) -> None:
        session.core.sessions.append(tables, session.id, session.tokens, b"", [], start)

    return _lead(session, (await _written(session, ROLLUP, ROLLUP_REQUEST, settings, None, also)).text)


def stored_lead(session: "Session") -> list[int]:
    """What stood in front of the stream when the session was left."""
    text = session.core.sessions.last_answer(session.id, ROLLUP)
    return [] if text is None else _lead(session, text)


def _lead(session: "Session", text: str) -> list[int]:
    return session.core.model.tokenizer.encode(f"[Before: {text.strip()}]\n\n")


async def _written(
    session: "Session",
    kind: str,
    request: str,
    settings: SessionSettings,
    query: list[int] | None,
    also: Also[Answer] | None,
) -> Answer:
    head = session.core.model.tokenizer.encode(f"\n\n{request}")
    turn = Turn(session, settings, request, [*head, *session.frame.answer], query)
    answer: Answer | None = None
    async for piece in turn.run(kind, remember=False, also=also):
        answer = piece.answer
    if answer is None:
        raise RuntimeError(f"a {kind} ended without its last piece")
    return answer
