"""`Recipe`: what an adapter is trained on and how; and what a step draws from it."""

import random
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from longstride.engine.adapter import Acts
from longstride.engine.context import MIN_SINK
from longstride.engine.tokenizer import Frame
from longstride.errors import BadInput
from longstride.scheduler.windows import ANCHORS
from longstride.tuning.layouts import Layout
from longstride.tuning.strides import Places, Shape, Window
from longstride.tuning.trees import Sample
from longstride.tuning.turns import Turns

TURNS = 4  # behind a window
ASKS = (
    "What comes next?",
    "Quote what follows in the text.",
    "Go on with the text, and use the passages where they help.",
    "What does the text say then?",
)
Marks = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome, with the data. `layout.passages` is the most that a stride gets.

    FlashBack's settings (arXiv 2405.04065, section 4) where nothing was found to be better: rank 16, alpha 32,
    dropout 0.05, warm-up of a tenth, cosine decay, loss on the targets only. `chance`: the share of strides that get
    passages at random, from which the model learns to pass over useless ones.

    `distil`: the share of the loss that is the divergence from `teacher`, the rest being that of the text itself.
    `turns`: the share of windows that end with one of `ASKS`, what follows being the answer; without them a
    conversation's model comes to continue texts where it should answer. Under a window policy each window is text, with
    `Turns` behind it.
    """

    layout: Layout = field(default_factory=lambda: Layout.parse("end,passages=3"))
    shape: Shape = field(default_factory=lambda: Shape(passages=3))
    acts: Acts = "segment"
    steps: int = 1000
    rate: float = 1e-3
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    modules: tuple[str, ...] = ()
    warmup: float = 0.1
    chance: float = 0.2
    distil: float = 0.5
    turns: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        shape, layout = self.shape, self.layout
        if min(self.steps, self.rank, self.alpha) < 1 or self.rate <= 0:
            raise BadInput("steps, rank and alpha are numbers from 1 on, and the rate is above 0")
        if not (0 <= self.dropout < 1 and 0 <= self.chance <= 1 and 0 <= self.distil <= 1 and 0 <= self.turns <= 1):
            raise BadInput("dropout lies between 0 and 1, chance, distil and turns from 0 to 1")
        if not 0 <= self.warmup < 1:
            raise BadInput("warmup lies between 0 and 1")
        if shape.passage >= shape.window:
            raise BadInput(
                f"passages of {shape.passage} tokens are as long as the window of {shape.window}; take shorter ones"
            )
        if layout.every != 1 or layout.adapter or layout.source != "found":
            raise BadInput(f"layout {layout}: training takes place, passages, refresh and marks only")
        if bool(layout.window) != (self.acts == "text"):
            raise BadInput("an adapter for a window policy acts on the text, and only such a one does")
        if self.acts == "segment" and layout.place in {"none", "prepend"}:
            raise BadInput(f"an adapter for {layout.place} has no segment to act on; let it act everywhere")

    @property
    def teacher(self) -> Layout | None:
        """Where the untrained base does well what is trained for: with all of the text in view, or with the same
        passages beside it. None where that is the layout itself."""
        if self.layout.window:
            return Layout("none")
        if self.layout.place in {"end", "turn"}:
            return replace(Layout.plain("beside"), passages=self.layout.passages)
        return None

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "modules": list(self.modules)}


class Steps:
    """What each step trains on: a function of recipe, data and the step's number alone, so that a run can go on."""

    def __init__(
        self, recipe: Recipe, places: Places, marks: Marks, frame: Frame | None = None, turns: Turns | None = None
    ) -> None:
        """`frame`: the conversation that texts stand in; without it they stand alone. `turns`: for a window policy."""
        if recipe.turns and frame is None:
            raise BadInput("turns need a conversation around the texts (--frame)")
        if recipe.layout.window and turns is None:
            raise ValueError("what an adapter for a window policy learns from are turns")
        self.turns = turns
        self.recipe = recipe
        self.places = places
        self.marks = marks if recipe.layout.marks else ((), ())
        self.prompt = prompt = list(frame.prompt) if frame is not None else []
        tokenizer = places.pasts[0].corpus.tokenizer
        self._turns = [[*tokenizer.encode(f"\n\n{ask}"), *frame.answer] for ask in ASKS] if frame is not None else []
        self._kept = [one.new_window(tokenizer, max(len(prompt), MIN_SINK)) for one in spread(recipe.layout)]
        self._epoch = -1
        self._order: list[tuple[Any, int]] = []
        self._count = sum(map(len, places.starts))

    def __call__(self, step: int) -> tuple[Window, Sample]:
        """The window and the passages of step `step`. Steps without a passage anywhere give way to others."""
        recipe = self.recipe
        rng = random.Random(f"{recipe.seed} step {step}")  # noqa: S311 - repeatable, not secret
        if self.turns is not None:
            return self._asked(self.turns, step, rng)
        for attempt in range(100):
            past, start = self._place(step + attempt * recipe.steps)
            window = past.window(start, recipe.shape, recipe.seed + step, oracle=False)
            sample = self.draw(window, rng)
            if recipe.turns and rng.random() < recipe.turns:
                turn = rng.choice(self._turns)[-len(window.text) :]
                window = replace(window, text=[*window.text[len(turn) :], *turn])
            if any(sample.passages):  # for the control without retrieval too: the same windows
                return window, sample
        raise BadInput("retrieval found no passage for any of 100 windows; give more or longer texts")

    def _asked(self, turns: Turns, step: int, rng: random.Random) -> tuple[Window, Sample]:
        """A text under a window policy, and what is asked about it."""
        kept = rng.choice(self._kept)
        for attempt in range(100):
            past, start = self._place(step + attempt * self.recipe.steps)
            window = past.window(start, self.recipe.shape, 0, oracle=False)
            ids = [*window.text, *(target for stride in window.strides for target in stride.targets)]
            asked = turns.about(ids, TURNS, rng)
            if asked:
                return window, Sample(self.recipe.layout, [], ((), ()), self.prompt, kept, asked)
        raise BadInput("the model says nothing about any of 100 windows; give other texts")

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
        return Sample(recipe.layout, passages, self.marks, self.prompt)

    def taught(self, sample: Sample) -> Sample | None:
        """The same passages where the teacher has them, without marks, which it does not know."""
        teacher = self.recipe.teacher
        if teacher is None or not self.recipe.distil:
            return None
        return Sample(teacher, sample.passages, ((), ()), sample.prompt, turns=sample.turns)


def spread(layout: Layout) -> list[Layout]:
    """What is drawn from: with anchors also half and a quarter of the span, and nothing kept but the open span."""
    policy, *sizes = layout.window.split(":")
    if policy not in ANCHORS:
        return [layout]
    spans = [size for size in (int(sizes[0]) >> halved for halved in range(3)) if size > 1]
    return [replace(layout, window=":".join([policy, str(span), *more])) for span in spans for more in ([], sizes[1:])]
