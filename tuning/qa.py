"""Question answering over placements: every system asked the same questions about the same text.

A text is read once for each shape of context and then asked about; what it costs and whether what was needed was in
view is noted for each question. Finished parts are kept, so that an interrupted evaluation goes on.
"""

import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from longstride.engine.context import Placement
from longstride.engine.pieces import MemoryPieces
from longstride.scheduler.adapters import refresh_of
from longstride.scheduler.answer import Answer, Source
from longstride.scheduler.assistant import Assistant
from longstride.scheduler.session import Session
from longstride.tuning import scores
from longstride.tuning.kept import Kept
from longstride.tuning.prepend import prepended
from longstride.tuning.questions import Case, Gold, Question, QuestionSet
from longstride.tuning.systems import Setup, System

FORMAT = 2  # of what is kept; another number: nothing kept is used again
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Record:
    """One question, answered by one system.

    `score`: by the question's own metric. `retrieved`: part of its gold passages that were retrieved; `gold`: that were
    in view, retrieved or in the window; None where the set does not say which they are. `answer_in_view`: a gold answer
    stood in the passages or in the window in so many words; None for yes and no. `encoded`: prompt-side tokens computed
    until the answer ended; `reusing`: the same for a system that keeps its longest common prefix (prepending only).
    """

    id: str
    document: str
    system: str
    question: str
    answers: list[str]
    answer: str
    finish: str
    metric: str
    score: float
    exact: float
    f1: float
    contained: float
    retrieved: float | None
    gold: float | None
    answer_in_view: float | None
    encoded: int
    reusing: int
    cached: int
    generated: int
    retrievals: int
    rewrites: int
    seconds: float
    first_token: float


@dataclass(frozen=True)
class Part:
    """One system's answers about one case. `read`: tokens of the text, and tokens computed, to read it before (0 for
    prepending, which keeps nothing). `too_long`: questions that do not fit beside the window and were left out."""

    set: str
    case: str
    system: str
    records: list[Record] = field(default_factory=list)
    read: int = 0
    read_encoded: int = 0
    too_long: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of `asdict`."""
        return cls(**{**data, "records": [Record(**record) for record in data["records"]]})


@dataclass(frozen=True)
class View:
    """What of a text stands in a session's window: it is in view without being retrieved."""

    text: str
    start: int  # characters of the text before it

    @classmethod
    def of(cls, session: Session) -> Self:
        """The window of a session that has read."""
        decode = session.core.model.tokenizer.decode
        start = len(decode(session.stream[: session.window_start].tolist()))
        return cls(decode(session.stream[session.window_start :].tolist()), start)

    def shows(self, gold: Gold) -> bool:
        """Whether any of a gold passage stands in the window."""
        return gold.document is None and self.start < gold.stop and gold.start < self.start + len(self.text)

    def holds(self, question: Question, sources: Iterable[Source]) -> bool | None:
        """Whether a gold answer was in view in so many words; None where the answer is yes or no."""
        if scores.is_opposite(question.answers):
            return None
        texts = (self.text, *(source.text for source in sources))
        return any(scores.contained(text, question.answers) for text in texts)


def retrieves(source: Source, gold: Gold) -> bool:
    """Whether a source overlaps a gold passage."""
    same = gold.document is None or gold.document == source.document
    return same and source.start < gold.stop and gold.start < source.stop


class Evaluation:
    """Asks every system the questions. `work`: a folder for finished parts; with it a rerun goes on."""

    def __init__(self, assistant: Assistant, setup: Setup, systems: list[System], work: Path | None = None) -> None:
        self.assistant = assistant
        self.setup = setup
        self.systems = systems
        self.kept = Kept(work)
        self.adapters = {system.name: setup.load_adapter(system, assistant.model) for system in systems}
        for system in systems:
            setup.check(system, assistant.model, self.adapters[system.name])

    async def run(self, sets: Iterable[QuestionSet], progress: Progress = lambda _what, _done: None) -> list[Part]:
        """All parts, by set, case and system. `progress` hears what is done now and how many answers are finished."""
        parts: list[Part] = []
        for asked in sets:
            for case in asked.cases():
                parts += await self._case(asked.name, case, progress)
        return parts

    async def _case(self, name: str, case: Case, progress: Progress) -> list[Part]:
        parts = {system.name: self._kept(name, case, system) for system in self.systems}
        for system in self.systems:
            if parts[system.name] is not None:
                progress(f"{name}: kept from before", len(case.questions))
        shapes: dict[tuple[Placement, bool], list[System]] = {}  # a text is read once for each
        for system in self.systems:
            if parts[system.name] is None:
                shapes.setdefault((system.placement, self.adapters[system.name] is not None), []).append(system)
        for due in shapes.values():
            progress(f"{name}: reading {case.name}", 0)
            async with self._session(case, due[0]) as (session, encoded):
                view = View.of(session)
                for system in due:
                    part = Part(name, case.name, system.name)
                    if not system.prepends:
                        part = Part(name, case.name, system.name, read=session.tokens, read_encoded=encoded)
                    await self._ask_all(case, system, session, view, part, progress)
                    self._keep(case, system, part)
                    parts[system.name] = part
        return [part for part in parts.values() if part is not None]

    @asynccontextmanager
    async def _session(self, case: Case, system: System) -> AsyncGenerator[tuple[Session, int], None]:
        """A session that has read the case's text and may search its documents; with the tokens that reading took."""
        assistant, adapter = self.assistant, self.adapters[system.name]
        for document in case.documents:
            await assistant.add_document(document.name, document.text, collection=case.collection)
        settings = self.setup.for_session(system.placement, assistant.model, adapter)
        settings |= {"collections": [case.collection], "adapter": self.setup.adapter if adapter else "none"}
        session = await assistant.session(case.sha256, **settings)
        try:
            encoded = (await session.feed(case.text)).encoded if case.text else 0
            yield session, encoded
        finally:
            await assistant.remove_session(case.sha256)

    async def _ask_all(
        self, case: Case, system: System, session: Session, view: View, part: Part, progress: Progress
    ) -> None:
        # every system begins without rows of passages, whoever was asked before; it keeps those of its own questions
        limit = self.assistant.settings.pieces_limit_bytes
        session.sequence.store = MemoryPieces(self.assistant.model.fingerprint, limit)
        held: list[int] = []
        for question in case.questions:
            if self._fits(session, question):
                record, held = await self._ask(system, session, view, question, held)
                part.records.append(record)
            else:
                part.too_long.append(question.id)
            progress(f"{part.set}: {system.name}", 1)

    def _fits(self, session: Session, question: Question) -> bool:
        """Whether the question and its answer fit without sliding the window."""
        ids = session.core.model.tokenizer.encode(f"\n\n{question.text.strip()}")
        needed = len(ids) + len(session.frame.answer) + len(session.frame.resume) + self.setup.max_tokens
        return needed <= session.sequence.context.room

    async def _ask(
        self, system: System, session: Session, view: View, question: Question, held: list[int]
    ) -> tuple[Record, list[int]]:
        changes: dict[str, Any] = {
            "policy": system.policy,
            "stride": system.stride,
            "max_tokens": self.setup.max_tokens,
        }
        started, saved = time.perf_counter(), 0
        if system.prepends:
            answer, saved, held = await prepended(session, question.text, held, **changes)
        else:
            answer = await session.answer(question.text, **changes)
        return _record(question, system, answer, view, saved, time.perf_counter() - started), held

    # --- what was finished before ---

    def _identity(self, name: str, case: Case, system: System) -> dict[str, Any]:
        """All that decides a part's answers and counters."""
        adapter = self.adapters[system.name]
        refresh = refresh_of(self.setup.refresh, system.placement, adapter)
        return {
            "format": FORMAT,
            "model": self.assistant.model.fingerprint,
            "vocabulary": self.assistant.model.vocabulary,
            "adapter": adapter.fingerprint if adapter is not None else "",
            "setup": {**asdict(self.setup), "refresh": refresh, "adapter": ""},  # not the name of its folder
            "system": asdict(system),
            "set": name,
            "case": case.sha256,
        }

    def _kept(self, name: str, case: Case, system: System) -> Part | None:
        """The part, if it was finished before with these very settings."""
        return self.kept.get(self._identity(name, case, system), f"{name}-{system.name}", Part.from_dict)

    def _keep(self, case: Case, system: System, part: Part) -> None:
        self.kept.put(self._identity(part.set, case, system), f"{part.set}-{system.name}", asdict(part))


def _record(question: Question, system: System, answer: Answer, view: View, saved: int, seconds: float) -> Record:
    usage, gold, said = answer.usage, question.gold, (answer.text, question.answers)
    found = [any(retrieves(source, one) for source in answer.sources) for one in gold]
    seen = [was or view.shows(one) for was, one in zip(found, gold, strict=True)]
    in_view = view.holds(question, answer.sources)
    encoded = usage.encoded + usage.rewritten
    f1 = scores.f1(*said)
    own = {"f1": lambda: f1, "exam": lambda: scores.exam(*said), "rouge": lambda: scores.rouge_l(*said)}
    return Record(
        id=question.id,
        document=question.document,
        system=system.name,
        question=question.text,
        answers=list(question.answers),
        answer=answer.text,
        finish=answer.finish,
        metric=question.metric,
        score=own[question.metric](),
        exact=scores.exact(*said),
        f1=f1,
        contained=scores.contained(*said),
        retrieved=sum(found) / len(gold) if gold else None,
        gold=sum(seen) / len(gold) if gold else None,
        answer_in_view=None if in_view is None else float(in_view),
        encoded=encoded,
        reusing=encoded - saved,
        cached=usage.cached,
        generated=usage.generated,
        retrievals=usage.retrievals,
        rewrites=usage.rewrites,
        seconds=round(seconds, 4),
        first_token=round(answer.timing.first_token, 4),
    )
