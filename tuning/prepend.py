"""What others do, for comparison: retrieved passages in front of the text, everything encoded afresh.

In-Context RALM (arXiv 2302.00083) and plain retrieval-augmented generation. The turn is the product's own (same query,
passages, policy, sampling, kernels); only its sequence is another.
"""

from collections.abc import Sequence as Ids
from contextlib import aclosing

from longstride.engine.attention import Slice
from longstride.engine.context import Context, Placement
from longstride.engine.draft import MOST_NODES
from longstride.engine.sequence import Sequence
from longstride.errors import BadInput
from longstride.scheduler.answer import Answer
from longstride.scheduler.session import Session
from longstride.scheduler.settings import SessionSettings, changed_for_answer
from longstride.scheduler.turn import Turn

SEPARATOR = "\n\n"  # behind each passage


def common(a: Ids[int], b: Ids[int]) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Prepending(Sequence):
    """A session's prompt, passages, its text in view, then the turn; positions follow rows, plain causal.

    `held`: the ids whose rows a prepending system with a prefix cache would have from before. `saved`: rows that it
    would not have computed, as they begin what it computed last; here they are computed all the same.
    """

    def __init__(self, session: Session, held: Ids[int] = ()) -> None:
        read, settings, model = session.sequence.context, session.settings, session.core.model
        self.separator = model.tokenizer.encode(SEPARATOR)
        front = settings.passages * (settings.passage_tokens + len(self.separator))
        limit = read.limit - read.reserved + front
        if limit > model.runner.max_positions:
            raise BadInput(
                f"prepending {settings.passages} passages of {settings.passage_tokens} tokens needs a context of "
                f"{limit}, more than the model's {model.runner.max_positions}; take fewer, or a shorter context"
            )
        context = Context(read.text[: read.prompt], placement=Placement.END, limit=limit, reserved=front)
        context.append(read.text[read.prompt :])
        super().__init__(model.runner, context, max_rows=limit)
        self.held = list(held)
        self.saved = 0
        self._front = 0  # tokens of the passages in place

    def rewrite(self, pieces: Ids[Ids[int]]) -> None:
        """Put `pieces` in front of the text, the best next to it, and forget all rows."""
        self._remember()
        context = self.context
        front = [token for piece in reversed(pieces) for token in (*piece, *self.separator)]
        shift = len(front) - self._front
        context.text[context.prompt : context.prompt + self._front] = front
        context.reserved -= shift
        if context.turn is not None:
            context.turn += shift
        self._front = len(front)
        self.cache.truncate(0)

    def take(self, budget: int, logits: int = 1, drafts: int = MOST_NODES) -> list[Slice]:
        """As `Sequence.take`; counts what a prefix cache would have saved when all is encoded."""
        if self.cache.length == 0:
            # the last row is computed in any case, for its logits
            self.saved += min(common(self.held, self.context.text), len(self.context.text) - 1)
        return super().take(budget, logits, drafts)

    def end_turn(self, *, keep: bool) -> None:
        """As `Sequence.end_turn`."""
        self._remember()
        super().end_turn(keep=keep)

    def _remember(self) -> None:
        if self.cache.length:
            self.held = self.context.text[: self.cache.length]


class PrependedTurn(Turn):
    """A turn over a `Prepending` sequence."""

    def __init__(
        self, session: Session, settings: SessionSettings, question: str, ids: list[int], sequence: Prepending
    ) -> None:
        super().__init__(session, settings, question, ids)
        self.sequence = self.decoding.sequence = sequence


async def prepended(
    session: Session, question: str, held: Ids[int] = (), **changes: object
) -> tuple[Answer, int, list[int]]:
    """`Session.answer` by prepending; the session (`beside`, between turns) lends its text, its index and its settings.

    Returns the answer, the rows that a prefix cache would have saved, and the `held` of the next call.
    """
    settings = changed_for_answer(session.settings, changes)
    ids = [*session.core.model.tokenizer.encode(f"\n\n{question.strip()}"), *session.frame.answer]
    sequence = Prepending(session, held)
    turn = PrependedTurn(session, settings, question, ids, sequence)
    answer: Answer | None = None
    async with aclosing(turn.run("ask", remember=False)) as pieces:
        async for piece in pieces:
            answer = piece.answer
    if answer is None:
        raise RuntimeError("an answer ended without its last piece")
    return answer, sequence.saved, sequence.held
