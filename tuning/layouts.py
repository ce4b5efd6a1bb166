"""`Layout`: where passages stand beside a text, and what that costs and gains: the loss of each target under it.

Everything but prepending runs through the engine as a session runs it: feed, rewrite, targets, rewrite. Prepending
(In-Context RALM, arXiv 2302.00083) encodes passages and text afresh at each stride.
"""

import time
from collections.abc import Sequence as Ids
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch

from longstride.engine.adapter import Adapter
from longstride.engine.context import MIN_SINK, Context, Placement
from longstride.engine.model import Model
from longstride.engine.runner import ModelRunner
from longstride.engine.sequence import Sequence
from longstride.engine.tokenizer import Tokenizer
from longstride.engine.window import Window as KeptRows
from longstride.errors import BadInput
from longstride.scheduler.windows import ANCHORS, POLICIES, make_window
from longstride.tuning.strides import Shape, Stride, Window

Place = Literal["none", "prepend", "end", "turn", "beside"]
Source = Literal["found", "chance", "oracle"]
BUDGET = 4096  # rows a forward


@dataclass(frozen=True)
class Layout:
    """One row of the grid. `passages`: a segment's at most; `refresh` as in a session; `source`: which
    passages (see `Stride`); `marks`: whether they stand between marks; `every`: passages change every so many strides;
    `adapter`: a name, resolved by the grid; `window`: what stays of the text (with `none` only), separators:RECENT,
    cascade:RECENT, anchors:SPAN or anchors:SPAN:RECENT, in tokens;
    `weight`: of each further passage (`beside`)."""

    place: Place = "beside"
    passages: int = 1
    refresh: int = 16
    source: Source = "found"
    marks: bool = False
    every: int = 1
    adapter: str = ""
    window: str = ""
    weight: float = 0.5

    @classmethod
    def plain(cls, place: Place) -> "Layout":
        """A place without options: what sessions do there by default, with one passage."""
        placed = next((placement for placement in Placement if placement == place), Placement.BESIDE)
        return cls(place, refresh=placed.refresh, marks=place in {"end", "turn"})

    @classmethod
    def parse(cls, spelled: str) -> "Layout":
        """From `beside,passages=3,refresh=16`. Raises `BadInput` naming what is wrong."""
        first, *options = (part.strip() for part in spelled.split(","))
        place: Place | None = next((place for place in get_args(Place) if place == first), None)
        if place is None:
            raise BadInput(f"layout {spelled!r}: {first!r} is none of {', '.join(get_args(Place))}")
        layout = cls.plain(place)
        kinds = {field.name: type(field.default) for field in fields(cls) if field.name != "place"}
        for option in options:
            name, _, value = option.partition("=")
            if name not in kinds:
                raise BadInput(f"layout {spelled!r}: {name!r} is none of {', '.join(kinds)}")
            layout = replace(layout, **{name: _value(spelled, name, value, kinds[name])})
        if layout.source not in get_args(Source):
            raise BadInput(f"layout {spelled!r}: source is one of {', '.join(get_args(Source))}")
        policy, *sizes = layout.window.split(":")
        known = policy in POLICIES and 1 <= len(sizes) <= 1 + (policy in ANCHORS)
        known = known and all(size.isdecimal() and int(size) <= 1 << 30 for size in sizes) and int(sizes[0]) > 1
        if layout.window and not (known and layout.place == "none"):
            raise BadInput(
                f"layout {spelled!r}: window is POLICY:TOKENS, of {', '.join(POLICIES)}, or anchors:TOKENS:RECENT, and "
                "goes with none only"
            )
        return layout

    def chosen(self, stride: Stride) -> list[list[int]]:
        """The passages that stand beside the text in a stride, best first."""
        return [] if self.place == "none" else list(getattr(stride, self.source)[: self.passages])

    def new_window(self, tokenizer: Tokenizer, sink: int) -> KeptRows | None:
        """What keeps some of the text's rows; None where all stay."""
        if not self.window:
            return None
        policy, *sizes = self.window.split(":")
        first, last = int(sizes[0]), int(sizes[-1])
        span, recent = (first, last if len(sizes) == 2 else 0) if policy in ANCHORS else (0, first)
        return make_window(policy, recent, span, tokenizer, sink)

    def __str__(self) -> str:
        plain = Layout.plain(self.place)
        options = [
            f"{field.name}={str(value).lower() if isinstance(value, bool) else value}"
            for field in fields(self)
            if (value := getattr(self, field.name)) != getattr(plain, field.name)
        ]
        return ",".join([self.place, *options])


def _value(spelled: str, name: str, value: str, kind: type) -> Any:
    if kind is bool:
        if value not in {"true", "false"}:
            raise BadInput(f"layout {spelled!r}: {name} is true or false, not {value!r}")
        return value == "true"
    if kind is int:
        if not value.isdecimal() or (int(value) < 1 and name != "refresh"):
            raise BadInput(f"layout {spelled!r}: {name} is a number from 1 on, not {value!r}")
        return int(value)
    if kind is float:
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not 0 < number <= 1:
            raise BadInput(f"layout {spelled!r}: {name} is a number above 0 and at most 1, not {value!r}")
        return number
    return value


@dataclass
class Measured:
    """Losses of a window's targets in nats, the rows that went through the model for them, and the seconds."""

    losses: list[float]
    encoded: int = 0
    seconds: float = 0.0


class Scorer:
    """Runs windows under layouts. `prompt`: ids before every text (its sink); `marks`: around a segment, where the
    layout has any and no adapter brings its own."""

    def __init__(self, model: Model, prompt: Ids[int] = (), marks: tuple[Ids[int], Ids[int]] = ((), ())) -> None:
        self.runner = model.runner
        self.tokenizer = model.tokenizer
        self.prompt = list(prompt)
        self.marks = marks

    def score(self, window: Window, layout: Layout, shape: Shape, adapter: Adapter | None = None) -> Measured:
        """Losses of all targets of a window."""
        started = time.perf_counter()
        if layout.place == "none":
            measured = self._plain(
                [*self.prompt, *window.text],
                [t for s in window.strides for t in s.targets],
                adapter,
                layout.new_window(self.tokenizer, max(len(self.prompt), MIN_SINK)),
            )
        elif layout.place == "prepend":
            measured = self._prepended(window, layout, adapter)
        else:
            measured = self._placed(window, layout, shape, adapter)
        measured.seconds = time.perf_counter() - started
        return measured

    def check(self, layout: Layout, shape: Shape, adapter: Adapter | None) -> None:
        """Raises `BadInput` for what the model or the adapter cannot do."""
        if adapter is not None and not adapter.changes_text and layout.place == "prepend":
            raise BadInput(
                f"layout {layout}: adapter {adapter.name} acts on a segment behind the text only, so prepending is the "
                "same without it"
            )
        if adapter is not None and adapter.window not in {"", layout.window.partition(":")[0]}:
            raise BadInput(f"layout {layout}: adapter {adapter.name} was trained for window={adapter.window}:TOKENS")
        around = sum(map(len, self._marks(layout, adapter)))
        if layout.place == "beside" and around >= shape.passage:
            raise BadInput(f"layout {layout}: passages of {shape.passage} tokens leave no room between the marks")
        rows = (
            len(self.prompt) + shape.span + (0 if layout.place == "none" else layout.passages * shape.passage + around)
        )
        if rows > self.runner.max_positions:
            raise BadInput(
                f"layout {layout}: a window of {shape.window} with its targets and passages needs {rows} positions and "
                f"the model has {self.runner.max_positions}; take a shorter window, or fewer or shorter passages"
            )

    def _plain(
        self, text: Ids[int], targets: list[int], adapter: Adapter | None, window: KeptRows | None = None
    ) -> Measured:
        """Targets behind a text and nothing else."""
        length = 2 * (len(text) + len(targets)) + 8  # a window may put as many tokens among them
        context = Context(self.prompt, placement=Placement.END, limit=length, reserved=0, window=window)
        context.append(text[len(self.prompt) :])
        sequence = Sequence(self.runner, context, max_rows=length, adapter=adapter)
        measure = follow if context.adds is None else read
        return Measured(measure(self.runner, sequence, targets), sequence.computed)

    def _prepended(self, window: Window, layout: Layout, adapter: Adapter | None) -> Measured:
        out = Measured([])
        text = list(window.text)
        pieces: list[list[int]] = []
        for number, stride in enumerate(window.strides):
            if number % layout.every == 0:
                pieces = segment(layout.chosen(stride), self._marks(layout, adapter))
            front = [i for piece in pieces for i in piece]
            part = self._plain([*self.prompt, *front, *text], stride.targets, adapter)
            out.losses += part.losses
            out.encoded += part.encoded
            text += stride.targets
        return out

    def _placed(self, window: Window, layout: Layout, shape: Shape, adapter: Adapter | None) -> Measured:
        placement = Placement(layout.place)
        beside = placement is Placement.BESIDE
        left, right = self._marks(layout, adapter)
        around = len(left) + len(right)
        total = layout.passages * shape.passage + around
        most = shape.passage - around  # as in a session: marks beside the text take their room from the passages
        length = len(self.prompt) + shape.span + total + 8
        context = Context(
            self.prompt,
            placement=placement,
            limit=length,
            reserved=shape.passage if beside else total,
            refresh=layout.refresh,
            weight=layout.weight,
        )
        context.append(window.text)
        sequence = Sequence(self.runner, context, max_rows=length + total, adapter=adapter)
        losses: list[float] = []
        shown: list[list[int]] = []
        for number, stride in enumerate(window.strides):
            # the passages that are in place already stay there, as in a session
            if number % layout.every == 0 and (found := layout.chosen(stride)) != shown:
                shown = found
                if placement is Placement.TURN:
                    context.turn = len(context.text) - shape.query  # running text has no turns: its last tokens are one
                # beside the text each passage stands for itself, else they are one run, the best next to the text
                each = [[passage[:most]] for passage in found] if beside else [found]
                pieces = [piece for one in each for piece in segment(one, (left, right))]
                sequence.rewrite(pieces)
            losses += follow(self.runner, sequence, stride.targets)
        return Measured(losses, sequence.computed)

    def _marks(self, layout: Layout, adapter: Adapter | None) -> tuple[Ids[int], Ids[int]]:
        """As `scheduler.marks.Marks` has them: an adapter's own, else words where the layout has any."""
        if adapter is not None and adapter.brings_marks:
            return adapter.marks
        return self.marks if layout.marks else ((), ())


def segment(passages: Ids[list[int]], marks: tuple[Ids[int], Ids[int]]) -> list[list[int]]:
    """Passages as one run between marks, the best last; nothing where there are none."""
    if not passages:
        return []
    return [[*marks[0], *(i for passage in reversed(passages) for i in passage), *marks[1]]]


def follow(runner: ModelRunner, sequence: Sequence, targets: list[int]) -> list[float]:
    """Losses of `targets` behind what `sequence` holds; they are its text then, the last one's row not computed yet."""
    sequence.context.append(targets[:-1])
    if not sequence.pending:
        raise ValueError("the row that predicts the first target must be left to be computed")
    logits = last_logits(runner, sequence, len(targets))
    sequence.context.append(targets[-1:])
    return losses_of(logits, targets)


def read(runner: ModelRunner, sequence: Sequence, targets: list[int]) -> list[float]:
    """The same where a window puts tokens among them, which are no targets; the last one's row is computed too."""
    context = sequence.context
    before = len(context.text)
    context.append(targets)
    ids = context.text[before:]
    losses = losses_of(last_logits(runner, sequence, len(ids) + 1)[:-1], ids)
    return [loss for loss, id_ in zip(losses, ids, strict=True) if id_ != context.adds]


def last_logits(runner: ModelRunner, sequence: Sequence, count: int) -> torch.Tensor:
    """Compute all that is due; logits [count, vocabulary] of the last `count` rows, which must be among it."""
    first = sequence.context.rows - count
    out: list[torch.Tensor] = []
    while slices := sequence.take(BUDGET, 0):
        for piece in slices:
            piece.logits = max(0, min(len(piece.ids), piece.stop - first))
        out += [logits for logits in runner.forward(slices) if len(logits)]
        sequence.accept(slices)
    return torch.cat(out)


@torch.inference_mode()
def losses_of(logits: torch.Tensor, targets: Ids[int]) -> list[float]:
    """Negative log-likelihoods in nats, in fp32."""
    wanted = torch.tensor(targets, device=logits.device)
    losses: list[float] = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none").tolist()
    return losses
