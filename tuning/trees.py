"""`Tree`: a window's text once, and every stride's branch behind it: the rows that training computes.

Branch j sees the text before its boundary and itself, so all strides of a window share one forward over the text
(FlashBack evaluates and trains stride by stride, which is several times the rows). Under a window policy the branches
are turns behind the whole text, of which they see what is left in view. Rows, positions and visibility are
those of `Context`, so what is trained is what a session computes. Branches are rows of a batch, padded at the end:
attention then costs what the branches need and not the square of them all.
"""

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

import numpy as np
import torch

from longstride.engine.context import MIN_SINK, Context, Placement
from longstride.engine.window import Window as KeptRows
from longstride.tuning.layouts import Layout, segment
from longstride.tuning.strides import Shape, Window
from longstride.tuning.turns import Turn

TOLD = 256  # last tokens of a text with turns that are targets, about as many as their answers


@dataclass
class Branch:
    """Rows behind the first `sees` text rows. `mask`: bool [n, sees + n], who sees whom. `first`: the row that
    predicts the first of `targets`; the others follow one by one. `discounts`: what the rows behind the segment have
    added to their logits at each of its rows, which come first."""

    ids: list[int]
    positions: list[int]
    sees: int
    mask: torch.Tensor
    first: int
    targets: list[int]
    discounts: list[float] = field(default_factory=list)


@dataclass
class Tree:
    """`ids` at `positions`: text rows, causal or as `mask` [T, T] has it, seeing no branch. `plain`: those of them
    whose logits are wanted besides: they predict the branches' targets without retrieval, or `targets` of their own.
    `sink`: rows at the beginning that are the base's whatever acts on the text."""

    ids: list[int]
    positions: list[int]
    branches: list[Branch]
    plain: list[int] = field(default_factory=list)
    mask: torch.Tensor | None = None
    targets: list[int] = field(default_factory=list)
    sink: int = 0

    @property
    def wanted(self) -> list[int]:
        """All targets: the branches', then the text's own."""
        return [*(target for branch in self.branches for target in branch.targets), *self.targets]

    @property
    def rows(self) -> int:
        """Rows in all, without padding."""
        return len(self.ids) + sum(len(branch.ids) for branch in self.branches)


@dataclass
class Batch:
    """A tree as tensors: text [1, T] and its mask, branches [m, R], `mask` bool and `added` to the logits
    [m, R, T + R]; `at`: (branch, row) pairs [2, n] that predict the branches' targets."""

    text: torch.Tensor
    text_positions: torch.Tensor
    text_mask: torch.Tensor
    plain: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    added: torch.Tensor
    at: torch.Tensor


@dataclass
class Sample:
    """What stands in a window's strides, as drawn for a step: `passages` of each, between `marks`; `prompt`: ids before
    the text; `kept`: what decides who sees whom in it, where not all see all; `turns`: questions behind the whole of
    it, with their answers."""

    layout: Layout
    passages: list[list[list[int]]]
    marks: tuple[Ids[int], Ids[int]]
    prompt: list[int] = field(default_factory=list)
    kept: KeptRows | None = None
    turns: list[Turn] = field(default_factory=list)


def tree(window: Window, sample: Sample, shape: Shape) -> Tree:
    """The tree of a window."""
    layout = sample.layout
    text = [*sample.prompt, *window.text]
    if layout.place == "none":
        targets = [target for stride in window.strides for target in stride.targets]
        if sample.turns:
            return _asked([*window.text, *targets], sample)
        return Tree([], [], [_alone([*text, *targets[:-1]], len(text), targets)])
    branches = []
    if layout.place == "prepend":
        for stride, passages in zip(window.strides, sample.passages, strict=True):
            front = [i for piece in segment(passages, sample.marks) for i in piece]
            ids = [*sample.prompt, *front, *text[len(sample.prompt) :]]
            branches.append(_alone([*ids, *stride.targets[:-1]], len(ids), stride.targets))
            text += stride.targets
        return Tree([], [], branches)
    placement = Placement(layout.place)
    beside = placement is Placement.BESIDE
    around = sum(map(len, sample.marks))
    most = shape.passage - around  # as in a session: marks beside the text take their room from the passages
    whole = max((sum(map(len, passages)) for passages in sample.passages), default=0)
    context = Context(
        text[: len(sample.prompt)],
        placement=placement,
        limit=1 << 30,
        reserved=shape.passage if beside else around + whole,
        refresh=layout.refresh,
        weight=layout.weight,
    )
    context.append(text[len(sample.prompt) :])
    plain: list[int] = []
    for stride, passages in zip(window.strides, sample.passages, strict=True):
        if not passages:
            context.append(stride.targets)  # nothing was found: the stride is plain text, as it is in a session
            continue
        if placement is Placement.TURN:
            context.turn = len(context.text) - shape.query
        each = [[passage[:most]] for passage in passages] if beside else [passages]
        context.rewrite([piece for one in each for piece in segment(one, sample.marks)])
        plain += range(len(context.text) - 1, len(context.text) + len(stride.targets) - 1)
        context.append(stride.targets[:-1])
        branches.append(_branch(context, stride.targets))
        context.append(stride.targets[-1:])
        context.rewrite(())
    rows = len(context.text) - 1
    return Tree(context.text[:rows], [context.position(i) for i in range(rows)], branches, plain)


def _alone(ids: list[int], first: int, targets: list[int]) -> Branch:
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    return Branch(ids, list(range(len(ids))), 0, mask, first - 1, targets)


def _asked(text: list[int], sample: Sample) -> Tree:
    """Turns behind a text; its last tokens are targets too, so that it can be read on."""
    kept, start = sample.kept, len(sample.prompt)
    sink = max(start, MIN_SINK)
    ids = [*sample.prompt, *(text if kept is None else kept.placed(text))]
    count = len(ids)
    mask, view = None, torch.ones(count, dtype=torch.bool)
    if kept is not None:
        kept.restart()
        kept.extend(ids)
        mask = torch.from_numpy(kept.sight(np.zeros(0, np.int64), 0, count))
        view = torch.from_numpy(kept.alive(count))
    branches = []
    for turn, answer in sample.turns:
        own = [*turn, *answer[:-1]]
        n = len(own)
        seen = torch.cat([view.expand(n, count), torch.ones(n, n, dtype=torch.bool).tril()], 1)
        branches.append(Branch(own, list(range(count, count + n)), count, seen, len(turn) - 1, answer))
    # rows that predict the text's own tokens: those of the last `TOLD` that are all behind the sink
    adds = None if kept is None else kept.adds
    own = [at - 1 for at in range(start, count) if ids[at] != adds]
    told = own[max(sink + 1 - start, len(own) - TOLD) :]
    return Tree(ids, list(range(count)), branches, told, mask, [ids[row + 1] for row in told], sink)


def _branch(context: Context, targets: list[int]) -> Branch:
    """The rows behind the boundary."""
    plain = context.plain_rows
    parts = context.parts(plain)
    rows = context.rows - plain
    mask = torch.zeros(rows, plain + rows, dtype=torch.bool)
    ids: list[int] = []
    positions: list[int] = []
    for part in parts:
        at = part.row - plain
        n = len(part.ids)
        own = slice(at, at + n)
        if part.visible is None:
            mask[own, : part.row] = True
        else:
            for start, stop in part.visible:
                mask[own, start:stop] = True
        mask[own, part.row : part.stop] = torch.ones(n, n, dtype=torch.bool).tril()
        ids += part.ids
        positions += range(part.position, part.position + n)
    return Branch(ids, positions, plain, mask, rows - len(targets), targets, context.discounts)


def batch(tree: Tree, device: torch.device) -> Batch:
    """Tensors of a tree. A padding row sees itself only, so that no softmax is empty."""
    longest = max(len(branch.ids) for branch in tree.branches)
    count, seen = len(tree.branches), len(tree.ids)
    ids = torch.zeros(count, longest, dtype=torch.long)
    positions = torch.zeros(count, longest, dtype=torch.long)
    mask = torch.zeros(count, longest, seen + longest, dtype=torch.bool)
    mask[:, range(longest), range(seen, seen + longest)] = True
    added = torch.zeros(mask.shape)
    at: list[tuple[int, int]] = []
    for number, branch in enumerate(tree.branches):
        n = len(branch.ids)
        ids[number, :n] = torch.tensor(branch.ids)
        positions[number, :n] = torch.tensor(branch.positions)
        mask[number, :n, : branch.sees] = branch.mask[:, : branch.sees]
        mask[number, :n, seen : seen + n] = branch.mask[:, branch.sees :]
        behind = len(branch.discounts)
        added[number, behind:n, seen : seen + behind] = torch.tensor(branch.discounts)
        at += [(number, branch.first + i) for i in range(len(branch.targets))]
    return Batch(
        *(
            tensor.to(device)
            for tensor in (
                torch.tensor([tree.ids], dtype=torch.long),
                torch.tensor([tree.positions], dtype=torch.long),
                torch.ones(1, seen, seen, dtype=torch.bool).tril() if tree.mask is None else tree.mask[None],
                torch.tensor(tree.plain, dtype=torch.long),
                ids,
                positions,
                mask,
                added,
                torch.tensor(at).T,
            )
        )
    )
