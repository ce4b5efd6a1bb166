"""Promise 1: after any sequence of operations, logits equal one fresh forward over the same ids."""

import math

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from longstride.engine.context import Context, Placement
from longstride.engine.draft import Node, ordered
from longstride.engine.pieces import MemoryPieces
from longstride.engine.sequence import Sequence
from tests.tiny import reference_logits, tiny_model

PROMPT, RESERVED, REFRESH, LIMIT = 6, 24, 5, 400
token = st.integers(0, 255)
tokens = st.lists(token, min_size=1, max_size=30)


def layout(placement, text, pieces, boundary, sees=None, weight=1.0):
    """(ids, positions, visible) written down from the definition in docs/methods.md, not from the code under test.

    `sees`: which text tokens see which of those before them: bool [places + 1, places] by their places in the text, the
    last row for the segment. `weight`: of each piece against the one before it, for the tail (`beside`).
    """
    n, sink = len(text), max(PROMPT, 4)
    if not pieces:
        boundary = n
    ids, positions, kinds, places = [], [], [], []
    beside = placement is Placement.BESIDE

    def put_text(start, stop, kind):
        for i in range(start, stop):
            ids.append(text[i])
            positions.append(len(ids) - 1 if not beside else (i if i < sink else i + RESERVED))
            kinds.append(kind)
            places.append(i)

    put_text(0, boundary, "text")
    for p, piece in enumerate(pieces):
        for j, id_ in enumerate(piece):
            ids.append(id_)
            positions.append(sink + j if beside else len(ids) - 1)
            kinds.append(p)
            places.append(-1)
    put_text(boundary, n, "tail")
    visible = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    if sees is not None:
        at = torch.tensor(places)
        visible &= sees[at][:, at] | (at < 0)
    if beside:
        for q, kind in enumerate(kinds):
            if isinstance(kind, int):
                for k in range(q):
                    visible[q, k] = k < sink or kinds[k] == kind
    if not beside or weight == 1:
        return ids, positions, visible
    added = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    for q, kind in enumerate(kinds):
        for k in range(q):
            if kind == "tail" and isinstance(kinds[k], int):
                added[q, k] += math.log(weight ** kinds[k])
    return ids, positions, added


def explore(machine, examples, steps):
    """Run a state machine, of however slow a model."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


class Exactness(RuleBasedStateMachine):
    kind: str
    placement: Placement
    refresh: int = REFRESH
    weight: float = 1.0

    @initialize(prompt=st.lists(token, min_size=PROMPT, max_size=PROMPT), budget=st.sampled_from([3, 7, 64]))
    def start(self, prompt, budget):
        self.plain, self.runner = tiny_model(self.kind)
        self.store = MemoryPieces("tiny", 1 << 20)
        self.budget = budget
        self.sequence = self.new_sequence(prompt)
        self.text, self.pieces, self.boundary, self.turn = list(prompt), (), 0, None

    def new_sequence(self, prompt):
        context = Context(
            prompt,
            placement=self.placement,
            limit=LIMIT,
            reserved=RESERVED,
            refresh=self.refresh,
            weight=self.weight,
            window=self.new_window(),
        )
        return Sequence(self.runner, context, max_rows=LIMIT + 3 * RESERVED, store=self.store)

    def new_window(self):
        return None

    def layout(self, text):
        return layout(self.placement, text, self.pieces, self.boundary, weight=self.weight)

    @rule(ids=tokens)
    def feed(self, ids):
        if len(self.text) + len(ids) <= LIMIT - RESERVED:
            self.sequence.context.append(ids)
            self.text += ids

    @precondition(lambda self: self.turn is None)
    @rule(question=tokens)
    def ask(self, question):
        if len(self.text) + len(question) <= LIMIT - RESERVED:
            self.sequence.context.begin_turn()
            self.turn = len(self.text)
            self.sequence.context.append(question)
            self.text += question

    @rule(pieces=st.lists(st.lists(token, min_size=1, max_size=8), max_size=3))
    def rewrite(self, pieces):
        self.sequence.rewrite(pieces)
        sink = max(PROMPT, 4)
        self.pieces = tuple(map(tuple, pieces)) if len(self.text) > sink else ()
        if self.placement is not Placement.TURN:
            self.boundary = max(sink, len(self.text) - self.refresh)
        else:
            self.boundary = len(self.text) if self.turn is None else self.turn

    @rule(count=st.integers(1, 4))
    def decode(self, count):
        for _ in range(count):
            if len(self.text) < LIMIT - RESERVED:
                best = self.choice(self.logits()[-1])
                self.sequence.context.append([best])
                self.text.append(best)

    @rule(data=st.data(), nodes=st.integers(1, 10))
    def speculate(self, data, nodes):
        """A random tree is drafted, some of its tokens right; the walk keeps what greedy decoding would have chosen."""
        root = Node(-1, None, 0, 1.0, [])
        tree = [root]
        for _ in range(nodes):
            parent = tree[data.draw(st.integers(0, len(tree) - 1))]
            ids = data.draw(st.sampled_from([self.next_after(parent), data.draw(token)]))
            if ids not in parent.children and parent.depth < LIMIT - RESERVED - len(self.text) - 1:
                parent.children[ids] = Node(ids, parent, parent.depth + 1, 1.0, [])
                tree.append(parent.children[ids])
        drafted = ordered(root, tree[1:])
        self.sequence.draft = drafted
        logits = self.logits()
        path, row = [], 0
        verified = logits.shape[0] - 1  # what passes the budget is cut off
        assert 0 <= verified <= len(drafted)
        while True:
            node = (path[-1] if path else root).children.get(self.choice(logits[row]))
            if node is None or node.row >= verified:
                break
            assert node.token == self.next_after(node.parent)
            path.append(node)
            row = 1 + node.row
        self.sequence.keep(path)
        self.text += [node.token for node in path]

    def next_after(self, node):
        """The greedy token after the text and the path down to `node`, by a fresh forward."""
        path = []
        while node.parent is not None:
            path.insert(0, node.token)
            node = node.parent
        return self.choice(reference_logits(self.plain, *self.layout([*self.text, *path]))[-1])

    def choice(self, logits):
        """The greedy token; what a window adds is banned, as in a session."""
        return int(logits[:256].argmax())

    @rule(draft=st.lists(token, max_size=3))
    def stop_within_a_step(self, draft):
        """A cancelled forward: slices were taken, one step at most was computed, nothing was accepted after it."""
        root = parent = Node(-1, None, 0, 1.0, [])
        nodes = []
        for id_ in draft[: LIMIT - RESERVED - len(self.text)]:
            parent.children[id_] = Node(id_, parent, parent.depth + 1, 1.0, [])
            parent = parent.children[id_]
            nodes.append(parent)
        self.sequence.draft = ordered(root, nodes)
        slices = self.sequence.take(self.budget)
        if slices:
            self.runner.forward(slices)
        self.sequence.draft = ()

    @precondition(lambda self: self.turn is not None)
    @rule(keep=st.booleans())
    def answer_done(self, keep):
        self.sequence.end_turn(keep=keep)
        if not keep:
            del self.text[self.turn :]
        self.turn, self.pieces = None, ()

    @precondition(lambda self: self.turn is None)
    @rule(recent=st.integers(0, 40))
    def slide(self, recent):
        self.sequence.rewrite([])
        self.sequence.slide(recent)
        self.pieces = ()
        self.text = self.text[:PROMPT] + self.text[PROMPT:][max(0, len(self.text) - PROMPT - recent) :]

    @precondition(lambda self: self.turn is None)
    @rule(block=st.integers(1, 16))
    def snapshot_and_restore(self, block):
        """Blocks of plain rows go into a new sequence, as after a restart; the open block is computed again."""
        old = self.sequence
        whole = min(old.cache.length, old.context.plain_rows) // block * block
        blocks = [old.cache.read_rows(at, at + block) for at in range(0, whole, block)]
        self.sequence = self.new_sequence(self.text[:PROMPT])
        self.sequence.context.append(self.text[PROMPT:])
        self.sequence.cache.reserve(whole)
        for i, rows in enumerate(blocks):
            self.sequence.cache.write_rows(i * block, rows)
        self.sequence.cache.extend(whole)
        self.pieces = ()

    def logits(self):
        self.sequence.cache.truncate(self.sequence.context.rows - 1)  # the last row is always computed here
        return self.sequence.run(self.runner, self.budget)

    @rule()
    def exact(self):
        """A rule and not an invariant, so that rows are also left pending over several operations."""
        ours = self.logits()
        reference = reference_logits(self.plain, *self.layout(self.text))
        torch.testing.assert_close(ours[-1], reference[-1], atol=1e-4, rtol=1e-4)
        best = reference[-1].max()  # the same token is chosen, or one that is level with it within rounding
        assert reference[-1][ours[-1].argmax()] >= best - 1e-5
        assert self.sequence.pending == 0
        assert self.sequence.context.text == self.text
        self.sequence.cache.check_integrity()

    def teardown(self):
        if hasattr(self, "sequence"):
            self.exact()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(
    ("placement", "refresh", "weight"),
    [
        (Placement.BESIDE, REFRESH, 0.5),
        (Placement.BESIDE, REFRESH, 1.0),
        (Placement.END, REFRESH, 0.5),
        (Placement.END, 0, 1.0),
        (Placement.TURN, REFRESH, 1.0),
    ],
)
def test_any_sequence_of_operations_is_exact(kind, placement, refresh, weight):
    named = {"kind": kind, "placement": placement, "refresh": refresh, "weight": weight}
    machine = type("Machine", (Exactness,), named)
    explore(machine, 30, 25)
