"""Verify drafts in one forward and keep exactly what the model itself would have chosen (Lookahead, arXiv 2312.12728).

Lossless: at every place the target's own choice decides (argmax, or a sample after all processors and warpers), drawn
in the same order from the same generator as without drafts. Greedy text, and sampled text of a fixed seed, are the
same with and without drafting up to the rounding of a forward's shape.
"""

from collections.abc import Callable, Sequence

import torch

from longstride.engine.costs import StepCosts
from longstride.engine.draft import Draft, Drafter, Node
from longstride.engine.history import WINDOW
from longstride.engine.runner import ModelRunner
from longstride.engine.sampling import Choice, Sampler, Sampling
from longstride.engine.sequence import Sequence as Cached

# The longer no drafted token was right, the more rarely drafts are looked for: after n steps every n / `QUIET`th,
# at least every `PROBE`th
QUIET, PROBE = 4, 8


class Decoding:
    """One text being written at the end of a sequence: draft, step, accept, again.

    `prompt`: the tokens before it that the repetition penalty looks at. `ends`: tokens that end it; they are not kept.
    `tokens`: what was written. `drafted` and `accepted` count tokens that went through the model as drafts and those
    of them that were kept.
    """

    def __init__(
        self,
        sequence: Cached,
        sampler: Sampler,
        ends: frozenset[int],
        prompt: Sequence[int] = (),
        drafter: Drafter | None = None,
    ) -> None:
        self.sequence = sequence
        self.sampler = sampler
        self.ends = ends
        self.drafter = drafter
        self.tokens: list[int] = []
        self.ended = False
        self.drafted = self.accepted = self.steps = 0
        self._prompt = list(prompt)
        sequence.company = (0, 0)
        self.proposal: Draft | None = None  # what the next step verifies
        self._missed = 0  # steps since a drafted token was right

    def draft(self, depth: int, costs: StepCosts) -> None:
        """Propose what the next step may verify, at most `depth` tokens deep; those that shared the last forward are
        taken to share the next."""
        if self.drafter is None:
            return
        self.proposal, self.sequence.draft = None, ()
        if self._missed % max(1, min(PROBE, self._missed // QUIET)):
            return  # looking it up costs something too
        context, cache = self.sequence.context, self.sequence.cache
        texts, rows = self.sequence.company
        # what is due besides the last token is computed anyway: a drafted token saves a step, not a part of this one
        self.proposal = self.drafter.propose(
            context.text[-WINDOW:],
            max(0, min(depth, context.room - 1)),
            costs.curve(1 + rows, context.rows),
            most=cache.limit - context.rows,
            beside=texts,
        )
        self.sequence.draft = self.proposal.nodes

    def accept(self, logits: torch.Tensor | None, take: Callable[[Choice], bool]) -> bool:
        """Walk down the draft by the model's own choices; on the device thread, right after the forward.

        `logits` [1 + drafted rows, vocabulary], None when more is due first (False is returned then). `take` hears of
        each token in order and says whether the next may come from this forward too.
        """
        if logits is None:
            return False
        nodes = logits.shape[0] - 1
        self.steps += 1
        self.drafted += nodes
        node = self.proposal.root if self.proposal is not None else None
        choose = self.sampler.chooser(logits)
        path: list[Node] = []
        row = 0
        while True:
            choice = choose(row, self._prompt + self.tokens if self.sampler.penalizes else ())
            if node is not None and self.drafter is not None:
                self.drafter.observe(node, choice.token)
            if choice.token in self.ends:
                self.ended = True
                break
            self.tokens.append(choice.token)
            if self.drafter is not None:
                self.drafter.say(choice.token)
            more = take(choice)
            node = node.children.get(choice.token) if node is not None else None
            if node is None or node.row >= nodes or not more:
                break
            path.append(node)
            row = 1 + node.row
        self.accepted += len(path)
        self._missed = 0 if path else self._missed + 1
        self.sequence.keep(path)
        if not self.ended:
            self.sequence.context.append(self.tokens[-1:])
        return True


def generate(
    runner: ModelRunner,
    sequence: Cached,
    limit: int,
    *,
    sampling: Sampling | None = None,
    ends: frozenset[int] = frozenset(),
    banned: Sequence[int] = (),
    drafter: Drafter | None = None,
) -> Decoding:
    """Write at most `limit` tokens at the end of `sequence`, alone and at once (tests, examples, benchmarks)."""
    prompt = sequence.context.text
    decoding = Decoding(sequence, Sampler(sampling or Sampling(), banned), ends, prompt, drafter)
    while not decoding.ended and len(decoding.tokens) < limit:
        decoding.draft(limit - len(decoding.tokens) - 1, runner.costs)
        if sequence.pending == 0:
            raise ValueError("nothing is due: the last token's row must be left to be computed")
        logits = sequence.run(runner)
        decoding.accept(logits, lambda _choice: len(decoding.tokens) < limit)
    return decoding
