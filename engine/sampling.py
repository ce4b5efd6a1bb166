"""Logits to token: greedy, temperature, top-k, top-p, min-p, repetition penalty, seed, banned ids."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from longstride.errors import BadInput


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 and `min_p` 0 change nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = (
            (self.temperature >= 0 and math.isfinite(self.temperature), "temperature must be 0 or more"),
            (self.top_k >= 0, "top_k must be 0 or more"),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (0 <= self.min_p <= 1, "min_p must be between 0 and 1"),
            (self.repetition_penalty > 0, "repetition_penalty must be above 0"),
        )
        for good, message in checks:
            if not good:
                raise BadInput(message)


@dataclass(frozen=True, eq=False)
class Choice:
    """A chosen token, and the scores [vocabulary] it was chosen by (the logs of unnormalised probabilities)."""

    token: int
    scores: torch.Tensor

    @property
    def probability(self) -> float:
        """The token's, under the distribution that it was drawn from; computed only for those who ask."""
        return float(torch.softmax(self.scores, dim=-1)[self.token])


class Sampler:
    """Chooses tokens for one answer; holds the seeded generator, so an answer is repeatable."""

    def __init__(self, sampling: Sampling, banned: Sequence[int] = ()) -> None:
        self.sampling = sampling
        self._banned = torch.tensor(sorted(set(banned)), dtype=torch.long)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    @property
    def penalizes(self) -> bool:
        """Whether `choose` looks at the context."""
        return self.sampling.repetition_penalty != 1.0

    def process(self, logits: torch.Tensor, context: Sequence[int]) -> torch.Tensor:
        """Logits [vocabulary] in fp32 on the CPU after bans and the repetition penalty (Keskar et al. 2019, 4.1).

        `context`: the tokens the penalty looks at.
        """
        return self._penalized(self._allowed(logits.clone()), context)

    @torch.inference_mode()
    def _allowed(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] in fp32 on the CPU without banned tokens; in place where they are there already."""
        scores = logits.float().cpu()
        return scores.index_fill_(-1, self._banned, -math.inf) if self._banned.numel() else scores

    def _penalized(self, scores: torch.Tensor, context: Sequence[int]) -> torch.Tensor:
        if not self.penalizes or not context:
            return scores
        seen = torch.tensor(sorted(set(context)), dtype=torch.long)
        held = scores[seen]
        penalty = self.sampling.repetition_penalty
        return scores.index_copy(0, seen, torch.where(held < 0, held * penalty, held / penalty))

    def distribution(self, scores: torch.Tensor) -> torch.Tensor:
        """Probabilities [vocabulary] after temperature (above 0), top-k, top-p and min-p, in this order."""
        s = self.sampling
        probabilities = torch.softmax(scores / s.temperature, dim=-1)
        if 0 < s.top_k < probabilities.numel():
            least = torch.topk(probabilities, s.top_k).values[-1]
            probabilities = torch.where(probabilities < least, 0.0, probabilities)
        if s.top_p < 1.0:
            ordered, order = torch.sort(probabilities, descending=True)
            before = torch.cumsum(ordered, 0) - ordered
            # a token stays while the mass before it is under top_p, so the first always stays
            drop = order[before >= s.top_p * ordered.sum()]
            probabilities = probabilities.index_fill(0, drop, 0.0)
        if s.min_p > 0:
            probabilities = torch.where(probabilities < s.min_p * probabilities.max(), 0.0, probabilities)
        return probabilities / probabilities.sum()

    def choose(self, logits: torch.Tensor, context: Sequence[int] = ()) -> Choice:
        """The next token for `logits` [vocabulary]."""
        return self.chooser(logits[None].clone())(0, context)

    def chooser(self, logits: torch.Tensor) -> Callable[[int, Sequence[int]], Choice]:
        """What chooses a token for a row of `logits` [rows, vocabulary] behind a context; it takes them over."""
        scores = self._allowed(logits)
        greedy = self.sampling.temperature == 0 and not self.penalizes
        plain = scores.numpy() if greedy else None

        def choose(row: int, context: Sequence[int]) -> Choice:
            if plain is not None:
                return Choice(int(plain[row].argmax()), scores[row])  # numpy's takes a fifth of torch's time
            own = self._penalized(scores[row], context)
            if self.sampling.temperature == 0:
                return Choice(int(own.argmax()), own)
            probabilities = self.distribution(own)
            return Choice(int(torch.multinomial(probabilities, 1, generator=self._generator)), probabilities.log())

        return choose
