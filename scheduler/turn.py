"""`Turn`: one question and its answer: retrieve, rewrite, decode, and again on the stride."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from sqlite_utils import Database as Tables

from longstride.engine.context import Placement
from longstride.engine.sampling import Choice, Sampler
from longstride.engine.tokenizer import StreamDecoder
from longstride.engine.verify import Decoding
from longstride.errors import ContextFull, StorageError
from longstride.scheduler.answer import Answer, Piece, Source
from longstride.scheduler.core import Also
from longstride.scheduler.retriever import Passage
from longstride.scheduler.settings import SessionSettings
from longstride.scheduler.stride import Moment, Never, policy

if TYPE_CHECKING:
    from longstride.scheduler.session import Session


class Turn:
    """Runs once. `ids`: the question as the model sees it, up to where its answer begins.

    `query`: what the first retrieval asks with; the question's own tokens when None.
    """

    def __init__(
        self,
        session: "Session",
        settings: SessionSettings,
        question: str,
        ids: list[int],
        query: list[int] | None = None,
    ) -> None:
        self.session = session
        self.core = session.core
        self.sequence = session.sequence
        self.settings = settings
        self.ids = ids
        tokenizer = self.core.model.tokenizer
        answer_frame = len(session.frame.answer)
        self.text_ids = query if query is not None else ids[: len(ids) - answer_frame]
        self.policy = policy(settings.policy, settings.stride)
        banned = (tokenizer.special | session.marks.banned) - tokenizer.eos
        sampler = Sampler(settings.sampling(), sorted(banned))
        self.decoding = Decoding(self.sequence, sampler, tokenizer.eos, ids, session.memory.drafter(settings.drafting))
        self.decoder = StreamDecoder(tokenizer, session.marks.stops)
        self.answer = Answer(question)
        self.passages: list[Passage] = []
        self._since = 0  # tokens generated since the last retrieval
        self._since_at = 0  # where the answer's text stood at the last retrieval
        self._last_query: list[int] = []
        self._view_from = 0  # where the answer's text stood when the passages in place came into view
        self._computed = 0  # rows computed before this turn
        self._rewriting = False  # the next step computes a rewrite
        self._limit = settings.max_tokens
        self._fresh = ""  # text of the last step
        self._due = self._over = False
        self._rest = ""

    # --- the turn ---

    async def run(self, kind: str, *, remember: bool, also: Also[Answer] | None = None) -> AsyncGenerator[Piece, None]:
        """Pieces of the answer; the last carries it whole. The session is back at its boundary afterwards.

        The answer, what joins the stream and `also` are stored in one transaction.
        """
        context = self.sequence.context
        self._limit = await self._room()
        self._computed = self.sequence.computed
        if context.window is not None:
            # while rows out of view are about, a decoded token's work grows with the context; gone, they are not stored
            fresh = self.sequence.pending
            while self.sequence.pending:
                await self.core.device.step(self.sequence, lambda _logits: None)
            if fresh:
                await self.session.store()
            await self.core.device.call(self.sequence.settle)
        context.begin_turn()
        added: list[int] = []
        try:
            context.append(self.ids)
            if self.decoding.drafter is not None:
                await asyncio.to_thread(self.decoding.drafter.begin, self.ids)
            async with aclosing(self._generate()) as pieces:
                async for piece in pieces:
                    yield piece
            if remember:
                added = self._keep()
        finally:
            self.sequence.end_turn(keep=bool(added))
        await self._store(kind, added, also)
        yield Piece(self._rest, self.answer)

    async def _generate(self) -> AsyncGenerator[Piece, None]:
        """Decode until the model ends the answer, a stop string comes or no more tokens are allowed."""
        started = time.perf_counter()
        answer, context = self.answer, self.sequence.context
        usage, timing = answer.usage, answer.timing
        if not isinstance(self.policy, Never):
            await self._retrieve()
        await self._step()
        usage.encoded = self.sequence.computed - self._computed
        # rows that were due may have left the view since
        usage.cached = max(0, context.rows - len(self.decoding.tokens) - usage.encoded)
        timing.first_token = time.perf_counter() - started
        timing.encode = timing.first_token - timing.retrieve
        retrieved, first = timing.retrieve, len(self.decoding.tokens)
        while True:
            if self._fresh:
                yield Piece(self._fresh)
            if self._over or self.decoding.ended:
                break
            if self._due:
                await self._retrieve()
            await self._step()
        timing.decode = time.perf_counter() - started - timing.first_token - (timing.retrieve - retrieved)
        self._rest = self.decoder.flush()
        answer.text += self._rest
        self._finish_sources()
        answer.sources.sort(key=lambda source: -source.score)
        usage.generated, usage.steps = len(self.decoding.tokens), self.decoding.steps
        usage.drafted, usage.accepted = self.decoding.drafted, self.decoding.accepted
        if usage.generated > first:
            timing.tokens_per_second = (usage.generated - first) / timing.decode

    async def _room(self) -> int:
        """Tokens the answer may have. Raises `ContextFull` if not even one fits behind the question."""
        wanted = self.settings.max_tokens
        frame = len(self.session.frame.resume)
        least = len(self.ids) + frame + 1
        most = self.session.view.most_room
        if least <= most:  # a question that will not fit must not slide the window either
            await self.session.make_room(min(least - 1 + min(wanted, self.session.headroom), most))
        room = self.sequence.context.room - least + 1
        if room < 1:
            raise ContextFull(
                f"the question ({len(self.ids)} tokens) does not fit: {max(0, self.sequence.context.room)} tokens are "
                f"free of {self.sequence.context.limit}; ask less, or open the session with --window sinks"
            )
        return min(wanted, room)

    async def _step(self) -> None:
        """The next tokens, after computing whatever is due."""
        decoding, device = self.decoding, self.core.device
        ahead = self._limit - len(decoding.tokens)
        soon = self.policy.ahead(self._since)
        decoding.draft((ahead if soon is None else min(ahead, soon)) - 1, self.core.model.runner.costs)
        self._fresh, self._due = "", False
        computed = self.sequence.computed
        while not await device.step(self.sequence, lambda logits: decoding.accept(logits, self._take)):
            pass
        if self._rewriting:
            self.answer.usage.rewritten += self.sequence.computed - computed
            self._rewriting = False

    def _take(self, choice: Choice) -> bool:
        """A token was chosen (on the device thread); whether the next may come from the same forward."""
        text = self.decoder.push(choice.token)
        self.answer.text += text
        self._fresh += text
        if len(self.decoding.tokens) >= self._limit and not self.decoder.stopped:
            self.answer.finish = "length" if self._limit == self.settings.max_tokens else "context"
            self._over = True
        self._over = self._over or self.decoder.stopped
        self._since += 1
        self._due = not self._over and self.policy.due(self._moment(choice))
        return not self._over and not self._due

    def _moment(self, choice: Choice) -> Moment:
        return Moment(
            self._since,
            self.answer.text[self._since_at :],
            choice,
            self._query,
            self._last_query,
        )

    def _query(self) -> list[int]:
        """The last `query_tokens` tokens of the turn's text; never tokens of the segment or of the template."""
        special = self.core.model.tokenizer.special
        text = [i for i in (*self.text_ids, *self.decoding.tokens) if i not in special]
        return text[-self.settings.query_tokens :]

    # --- retrieval ---

    async def _retrieve(self) -> None:
        """Search; rewrite the segment unless the passages are those already in place."""
        started = time.perf_counter()
        session, usage = self.session, self.answer.usage
        query = self._query()
        found = await self.core.retriever.search(
            self.core.model.tokenizer.decode(query),
            session.settings.passages,
            session.memory.index,
            session.view.whole_from,
            session.settings.collections,
        )
        first = usage.retrievals == 0
        usage.retrievals += 1
        self._last_query, self._since, self._since_at = query, 0, len(self.answer.text)
        if [p.id for p in found] == [p.id for p in self.passages]:
            self.answer.timing.retrieve += time.perf_counter() - started
            return
        self._finish_sources()
        self.passages = found
        pieces = await asyncio.to_thread(self._pieces, found)
        if self.decoding.drafter is not None:
            self.decoding.drafter.show(pieces)
        self.answer.timing.retrieve += time.perf_counter() - started
        self.sequence.rewrite(pieces)
        self._view_from = len(self.answer.text)
        if not first:
            usage.rewrites += 1
            self._rewriting = True

    def _pieces(self, passages: list[Passage]) -> list[list[int]]:
        """The segment's pieces, between marks: apart for `beside`, in one run otherwise."""
        session, tokenizer, marks = self.session, self.core.model.tokenizer, self.session.marks
        bodies = []
        for passage in passages:
            ids = (
                session.stream[slice(*passage.tokens)].tolist()
                if passage.tokens is not None
                else tokenizer.encode(passage.text)
            )
            bodies.append(ids[: session.passage_tokens])
        if session.settings.placement is Placement.BESIDE:
            pieces = [marks.around(body) for body in bodies]
            context, adapter = self.sequence.context, self.sequence.piece_adapter
            for piece in pieces:
                session.pieces.fetch(context.text[: context.sink], piece, context.sink, adapter)
            return pieces
        # best passage last, next to the text it is for
        return [marks.around(i for body in reversed(bodies) for i in body)] if bodies else []

    # --- the end ---

    def _finish_sources(self) -> None:
        """Note for the passages in place which part of the answer they were in view for."""
        start, stop = self._view_from, len(self.answer.text)
        sources = self.answer.sources
        for passage in self.passages:
            # a passage that stayed in view over a rewrite is one source with one span
            before = next((s for s in sources if s.passage == passage.id and s.answer[1] == start), None)
            if before is not None:
                sources.remove(before)
            span = (before.answer[0] if before is not None else start, stop)
            p = passage
            sources.append(Source(p.document, p.id, p.start, p.stop, round(p.score, 4), span, p.text))

    def _keep(self) -> list[int]:
        """Close the turn as the model's template wants it; returns the ids that join the stream."""
        resume = list(self.session.frame.resume)
        self.sequence.context.append(resume)
        return [*self.ids, *self.decoding.tokens, *resume]

    async def _store(self, kind: str, added: list[int], also: Also[Answer] | None) -> None:
        """Commit the answer with its sources, and with it the ids `added` to the stream."""
        session, sessions, data = self.session, self.core.sessions, self.answer.to_dict()
        tokens = session.tokens + len(added)

        def change(tables: Tables) -> None:
            if not added:
                session.save_window(tables)
            sessions.add_answer(tables, session.id, kind, tokens, data)
            if also is not None:
                also(tables, self.answer)

        if added:
            await session.remember(added, change)
        else:
            try:
                await sessions.database.awrite(change)
            except StorageError as error:
                session.fail(error)  # another process may have changed or removed it
                raise
