"""Summaries of texts longer than the context: notes on each part, then a summary of the notes."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from longstride.errors import BadInput
from longstride.scheduler.answer import Answer, Note, Source
from longstride.scheduler.session import Session

SUMMARY = "Using these notes on the text, write a summary of the whole text in one paragraph.\n\nNotes:\n"


@dataclass
class Summary:
    """A summary, the notes it was made from, and the passages that notes and summary were conditioned on."""

    text: str
    notes: list[Note] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


async def summarize(
    session: Session, text: str, *, part_tokens: int = 2048, progress: Callable[[int], None] | None = None
) -> Summary:
    """Read `text` into `session` part by part with a note on each, then summarize the notes.

    Notes that do not fit into one question are summarized in groups first. Raises `BadInput` for an empty text.
    """
    if not text.strip():
        raise BadInput("there is no text to summarize")
    ids = await asyncio.to_thread(session.core.model.tokenizer.encode, text)
    # parts of equal size, so that the last note is not about a few stray words
    parts = max(1, round(len(ids) / part_tokens))
    size = -(-len(ids) // parts)
    notes: list[Note] = []
    for at in range(0, len(ids), size):
        report = await session.feed_ids(ids[at : at + size], progress=progress)
        notes.append(Note(report.tokens + at, await session.note()))
    final = await _combine(session, [note.answer.text.strip() for note in notes])
    sources = [source for note in notes for source in note.answer.sources] + final.sources
    unique = {source.passage: source for source in sources}
    return Summary(final.text.strip(), notes, sorted(unique.values(), key=lambda s: (s.document, s.start)))


async def _combine(session: Session, notes: list[str]) -> Answer:
    """One answer from many notes, by way of groups when they are too many for a question."""
    tokenizer = session.core.model.tokenizer
    limit = max(256, session.question_room // 2)
    while len(notes) > 1 and len(tokenizer.encode("\n".join(notes))) > limit:
        groups: list[list[str]] = [[]]
        for note in notes:
            if groups[-1] and len(tokenizer.encode("\n".join([*groups[-1], note]))) > limit:
                groups.append([])
            groups[-1].append(note)
        if len(groups) >= len(notes):
            groups = [notes[i : i + 2] for i in range(0, len(notes), 2)]
        notes = [(await session.answer(_prompt(group))).text.strip() for group in groups]
    return await session.answer(_prompt(notes))


def _prompt(notes: list[str]) -> str:
    return SUMMARY + "\n".join(f"- {' '.join(note.split())}" for note in notes)
