"""`Recipe`: what an adapter is trained on and how; and what a step draws from it."""

import random
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from longstride.engine.context import MIN_SINK
from longstride.errors import BadInput
from longstride.tuning.layouts import Layout
from longstride.tuning.strides import Places, Shape, Window
from longstride.tuning.trees import Sample

Marks = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome, with the data. `layout.passages` is the most that a stride gets.

    FlashBack's settings (arXiv 2405.04065, section 4) where nothing was found to be better: rank 16, alpha 32,
    dropout 0.05, warm-up of a tenth, cosine decay, loss on the targets only. `chance`: the share of strides that get
    passages at random, from which the model learns to pass over useless ones. `distil`: weight of the divergence
    from the base model without retrieval at the start; it falls to nothing at the end (an adapter that acts everywhere
    has no base beside it, and does without).
    """

    layout: Layout = field(default_factory=lambda: Layout.parse("end,passages=3"))
    shape: Shape = field(default_factory=lambda: Shape(passages=3))
    acts: Literal["segment", "everywhere"] = "segment"
    steps: int = 1000
    rate: float = 1e-3
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    modules: tuple[str, ...] = ()
    warmup: float = 0.1
    chance: float = 0.2
    distil: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        shape, layout = self.shape, self.layout
        if min(self.steps, self.rank, self.alpha) < 1 or self.rate <= 0:
            raise BadInput("steps, rank and alpha are numbers from 1 on, and the rate is above 0")
        if not (0 <= self.dropout < 1 and 0 <= self.chance <= 1 and self.distil >= 0 and 0 <= self.warmup < 1):
            raise BadInput("dropout and warmup lie between 0 and 1, chance from 0 to 1, distil from 0 on")
        if shape.passage >= shape.window:
            raise BadInput(
                f"passages of {shape.passage} tokens are as long as the window of {shape.window}; take shorter ones"
            )
        if layout.every != 1 or layout.adapter or layout.source != "found":
            raise BadInput(f"layout {layout}: training takes place, passages, refresh and marks only")
        if self.acts == "segment" and layout.place in {"none", "prepend"}:
            raise BadInput(f"an adapter for {layout.place} has no segment to act on; let it act everywhere")

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "modules": list(self.modules)}


class Steps:
    """What each step trains on: a function of recipe, data and the step's number alone, so that a run can go on."""

    def __init__(self, recipe: Recipe, places: Places, marks: Marks, prompt: list[int]) -> None:
        self.recipe = recipe
        self.places = places
        self.marks = marks if recipe.layout.marks else ((), ())
        self.prompt = prompt
        self._kept = recipe.layout.new_window(places.pasts[0].corpus.tokenizer, max(len(prompt), MIN_SINK))
        self._epoch = -1
        self._order: list[tuple[Any, int]] = []
        self._count = sum(map(len, places.starts))

    def __call__(self, step: int) -> tuple[Window, Sample]:
        """The window and the passages of step `step`. Steps without a passage anywhere give way to others."""
        recipe = self.recipe
        rng = random.Random(f"{recipe.seed} step {step}")  # noqa: S311 - repeatable, not secret
        for attempt in range(100):
            past, start = self._place(step + attempt * recipe.steps)
            window = past.window(start, recipe.shape, recipe.seed + step, oracle=False)
            sample = self.draw(window, rng)
            if any(sample.passages):  # for the control without retrieval too: the same windows
                return window, sample
        raise BadInput("retrieval found no passage for any of 100 windows; give more or longer texts")

    def _place(self, number: int) -> tuple[Any, int]:
        epoch, at = divmod(number, self._count)
        if epoch != self._epoch:
            self._order, self._epoch = self.places.shuffled(self.recipe.seed + epoch), epoch
        return self._order[at]

    def draw(self, window: Window, rng: random.Random) -> Sample:
        """Passages for each stride: now one and long, now several and short, now useless."""
        recipe = self.recipe
        # mostly one: its rows are what a step costs
        count = 1 if rng.random() < 0.6 else rng.choice(range(1, recipe.layout.passages + 1))
        longest = recipe.shape.passage // rng.choice((1, 1, 2, 4) if count == 1 else (2, 4))
        passages = []
        for stride in window.strides:
            drawn = stride.chance if rng.random() < recipe.chance else stride.found
            passages.append([passage[: max(1, longest)] for passage in drawn[:count]])
        return Sample(recipe.layout, passages, self.marks, self.prompt, self._kept)
