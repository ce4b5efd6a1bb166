"""Promise 1 under every window policy: whatever was dropped, logits equal one forward under the policy's mask."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from longstride.engine import sequence as sequence_module
from longstride.engine.context import Context, Placement
from longstride.engine.sequence import Sequence
from longstride.engine.window import STEP, AddedAnchors, Anchors, Cascade, Separators
from tests.engine.test_exactness import PROMPT, REFRESH, RESERVED, Exactness, explore, layout
from tests.tiny import reference_logits, tiny_model

RECENT, LONGEST = 20, 9
ENDS = frozenset(range(0, 256, 7))
SINK = max(PROMPT, 4)
POLICIES = ["separators", "cascade", "anchors", "anchors and recent", "added", "added and recent"]
ADDED = 263


def window(name):
    return {
        "separators": lambda: Separators(SINK, RECENT, ENDS),
        "cascade": lambda: Cascade(SINK, RECENT),
        "anchors": lambda: Anchors(SINK, LONGEST, ENDS),
        "anchors and recent": lambda: Anchors(SINK, LONGEST, ENDS, RECENT),
        "added": lambda: AddedAnchors(SINK, LONGEST, ENDS, ADDED),
        "added and recent": lambda: AddedAnchors(SINK, LONGEST, ENDS, ADDED, RECENT),
    }[name]()


def spans(text, *, added):
    """Each token's (first of its span, its anchor or -1), from the definition in docs/methods.md."""
    out, start = [(i, i) for i in range(SINK)], SINK
    for i in range(SINK, len(text)):
        full = i - start + 1 == LONGEST or (text[i] in ENDS and i - start + 1 > LONGEST / 2)
        if (text[i] == ADDED) if added else full:
            out += [(start, i)] * (i + 1 - start)
            start = i + 1
    return torch.tensor(out + [(start, -1)] * (len(text) - start) + [(len(text), -2)])


def seen_by(name, text, size):
    """The policy as a relation, bool [size + 1, size]: who sees whom of `size` tokens that begin with `text`.

    What stands behind `text` (a turn, and last the segment) sees what the token behind it would.
    """
    n, key = len(text), torch.arange(size)
    at = torch.arange(size + 1).clamp(max=n)[:, None]  # the token whose view it is
    age_ends = (key // STEP + 1) * STEP
    if name == "separators":
        stays = torch.tensor([i < SINK or i >= n or text[i] in ENDS for i in range(size)])
        return stays | (at < age_ends + RECENT)
    if name == "cascade":
        number = (key - SINK).clamp(min=0)
        halvings = sum(((number % 2**level == 0) & (number > 0)).long() for level in range(1, 12))
        return (number == 0) | (key >= n) | (at < age_ends + RECENT * (2 ** (halvings + 1) - 1))
    start, anchor = spans(text, added=name.startswith("added")).T
    mine, whose = (
        (start[at], anchor[at]),
        (torch.nn.functional.pad(t[:n], (0, size - n), value=-3) for t in (start, anchor)),
    )
    first, end = whose
    is_anchor = (mine[1] == at) & (at >= SINK) & (at < n)
    others = (end == key) | (end == -1) | (first == mine[0]) | (key >= n)
    if name.endswith("and recent"):
        others |= (end >= 0) & (at <= end + RECENT)
    return torch.where(is_anchor, first == mine[0], others)


# text that a window decides on does not follow a segment
GOES_ON = precondition(lambda self: self.turn is not None or not self.pieces)


class Windowed(Exactness):
    policy: str

    def new_window(self):
        return window(self.policy)

    @property
    def text(self):
        """What the machine keeps itself; with added anchors the context's own, which a test of its own is about."""
        return list(self.sequence.context.text) if self.policy.startswith("added") else self._text

    @text.setter
    def text(self, value):
        self._text = value

    def layout(self, text):
        ruled = text if self.turn is None else text[: self.turn]
        sees = seen_by(self.policy, ruled, len(text))
        return layout(self.placement, text, self.pieces, self.boundary, sees, self.weight)

    @initialize(
        prompt=st.lists(st.integers(0, 255), min_size=PROMPT, max_size=PROMPT),
        budget=st.sampled_from([3, 7, 64]),
        text=st.lists(st.integers(0, 255), min_size=60, max_size=120),
    )
    def start(self, prompt, budget, text):
        super().start(prompt, budget)
        self.feed(text)

    def logits(self):
        context = self.sequence.context
        if not context.segment and context.settled == len(self.text):
            self.feed([7])  # the row that would be computed again may have left the view with its span
        return super().logits()

    @GOES_ON
    @rule(ids=st.lists(st.integers(0, 255), min_size=1, max_size=30))
    def feed(self, ids):
        if len(ids) <= self.sequence.context.room:
            super().feed(ids)

    @GOES_ON
    @rule(count=st.integers(1, 4))
    def decode(self, count):
        if count < self.sequence.context.room:
            super().decode(count)

    @GOES_ON
    @rule(data=st.data(), nodes=st.integers(1, 10))
    def speculate(self, data, nodes):
        super().speculate(data, nodes)

    @rule(pieces=st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=8), max_size=3))
    def rewrite(self, pieces):
        super().rewrite(pieces)
        context = self.sequence.context
        if self.placement is not Placement.TURN and self.pieces:
            # what a token sees is gone once it was dropped, so nothing before is computed again
            least = context.settled if self.turn is None else self.turn
            assert context.boundary == max(self.boundary, least)
            self.boundary = context.boundary

    @precondition(lambda self: self.turn is None)
    @rule(question=st.lists(st.integers(0, 255), min_size=1, max_size=30), whole=st.booleans())
    def ask(self, question, whole):
        self.sequence.rewrite([])
        self.pieces = ()
        if whole:  # a session reads all before a turn and drops what it can, but nothing hangs on it
            self.exact()
            self.sequence.settle()
        super().ask(question)

    @precondition(lambda self: self.turn is None)
    @rule(count=st.integers(1, 12))
    def take_back(self, count):
        self.sequence.rewrite([])
        self.pieces = ()
        count = min(count, len(self.sequence.context.without_added(PROMPT)))
        self.sequence.take_back(count)
        del self.text[len(self.text) - count :]

    @precondition(lambda self: self.turn is None)
    @rule(block=st.integers(1, 16))
    def snapshot_and_restore(self, block):
        old = self.sequence
        old.rewrite([])
        self.pieces = ()
        context = old.context
        stop = (old.cache.length + context.dropped) // block * block
        held = [*context.kept, *range(context.settled, len(self.text))]
        if held and stop < context.settled:
            return  # what the tokens behind would see is gone
        self.sequence = self.new_sequence(self.text[:PROMPT])
        self.sequence.context.append(context.without_added(PROMPT))
        assert self.sequence.context.text == context.text
        kept = self.sequence.context.fold(stop)
        if kept:
            rows = old.cache.gather([held.index(token) for token in kept])
            self.sequence.cache.reserve(len(kept))
            self.sequence.cache.write_rows(0, rows)
            self.sequence.cache.extend(len(kept))

    @precondition(lambda self: self.turn is None)
    @rule()
    def suspend(self):
        self.sequence.rewrite([])
        self.pieces = ()
        self.sequence.clear()


@pytest.fixture(autouse=True)
def drop_early(monkeypatch):
    monkeypatch.setattr(sequence_module, "DROP", 4)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("kind", "placement"),
    [("llama", Placement.BESIDE), ("llama", Placement.END), ("llama", Placement.TURN), ("gpt2", Placement.TURN)],
)
def test_any_sequence_of_operations_is_exact(kind, placement, policy):
    machine = type("Machine", (Windowed,), {"kind": kind, "placement": placement, "policy": policy, "weight": 0.5})
    explore(machine, 25, 25)


TEXTS = st.lists(st.sampled_from([*range(4, 12), *sorted(ENDS)[1:4]]), max_size=80)


def own(ids):
    return [id_ for id_ in ids if id_ != ADDED]


@given(st.lists(TEXTS, max_size=4), st.integers(2, 12))
def test_anchors_are_added_where_spans_end_however_the_text_comes(texts, longest):
    added = AddedAnchors(SINK, longest, ENDS, ADDED)
    whole: list[int] = []
    for text in texts:
        placed = added.placed(text, whole)
        assert own(placed) == text
        whole += placed
    assert whole == added.placed([id_ for text in texts for id_ in text])
    assert added.fitting(len(whole)) <= len(own(whole))
    for rows in (longest, 3 * longest, 100):  # in no text there are more anchors than this counts with
        assert len(added.placed([sorted(ENDS)[1]] * max(0, added.fitting(rows)))) <= rows
    length = 0
    for place, id_ in enumerate(whole):
        length += 1
        assert length <= longest
        if id_ == ADDED:
            assert length == longest or (whole[place - 1] in ENDS and 2 * length > longest)
            length = 0
        elif id_ in ENDS and 2 * (length + 1) > longest and length + 1 < longest:
            assert whole[place + 1] == ADDED


@given(st.lists(TEXTS, min_size=1, max_size=4), st.data())
def test_added_anchors_depend_on_the_text_in_the_window_alone(texts, data):
    """Whatever was fed, taken back, asked, kept or slid: what is there is what the whole text would be given."""
    ids: list[int] = []
    context = Context([1] * PROMPT, placement=Placement.TURN, limit=4000, reserved=0, window=window("added"))
    for text in texts:
        how = data.draw(st.sampled_from(["feed", "keep", "leave", "take back", "slide"]))
        if how in {"keep", "leave"}:
            context.begin_turn()
        context.append(text)
        if how in {"keep", "leave"}:
            assert context.text[len(context.text) - len(text) :] == text  # a turn has none
            context.end_turn(keep=how == "keep")
        count = data.draw(st.integers(0, len(text))) if how == "take back" else 0
        context.take_back(count)
        ids += [] if how == "leave" else text[: len(text) - count]
        if how == "slide":
            recent = data.draw(st.integers(0, 50))
            context.slide(recent)
            ids = ids[max(0, len(ids) - recent) :]
        assert context.text[PROMPT:] == window("added").placed(ids)
        assert context.without_added(PROMPT) == ids
        assert context.window.ruled == len(context.text)


def test_text_that_a_window_decides_on_follows_no_segment():
    context = Context([1] * PROMPT, placement=Placement.END, limit=400, reserved=RESERVED, window=window("anchors"))
    context.append([5] * 30)
    context.rewrite([[1, 2]])
    with pytest.raises(ValueError, match="a segment goes"):
        context.append([7])
    context.rewrite([])
    context.append([7])
    context.begin_turn()
    context.rewrite([[1, 2]])
    context.append([8])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("budget", [1, 13, 512])
def test_reading_in_any_chunks_equals_the_masked_forward_and_keeps_few_rows(policy, budget):
    plain, runner = tiny_model("llama")
    text = torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(3)).tolist()
    context = Context(
        text[:PROMPT], placement=Placement.BESIDE, limit=400, reserved=8, refresh=REFRESH, window=window(policy)
    )
    sequence = Sequence(runner, context, max_rows=400)
    context.append(text[PROMPT:-1])
    sequence.run(runner, budget)
    sequence.settle()
    context.append(text[-1:])
    ours = sequence.run(runner, budget)
    text = list(context.text)
    sees = seen_by(policy, text, len(text))
    ids, _, visible = layout(Placement.BESIDE, text, (), len(text), sees)
    positions = [i if i < SINK else i + 8 for i in range(len(text))]
    reference = reference_logits(plain, ids, positions, visible)
    torch.testing.assert_close(ours[-1], reference[-1], atol=1e-4, rtol=1e-4)
    assert sequence.computed == len(text)  # dropping computes nothing again
    assert sequence.cache.length <= int(sees[-1].sum()) + LONGEST < 0.7 * len(text)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("placement", list(Placement))
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_a_segment_behind_a_text_that_lost_rows_is_exact(kind, placement, policy):
    plain, runner = tiny_model(kind)
    ids = torch.randint(0, 256, (190,), generator=torch.Generator().manual_seed(4)).tolist()
    text, question, piece = ids[:150], ids[150:160], ids[160:182]
    context = Context(
        text[:PROMPT], placement=placement, limit=400, reserved=RESERVED, refresh=4, window=window(policy)
    )
    sequence = Sequence(runner, context, max_rows=500)
    context.append(text[PROMPT:])
    sequence.run(runner)
    sequence.settle()
    assert context.dropped > 20
    text = list(context.text)
    context.begin_turn()
    context.append(question)
    sequence.rewrite([piece[:12], piece[12:]])
    ours = sequence.run(runner)
    rows = layout(
        placement, [*text, *question], (piece[:12], piece[12:]), context.boundary,
        seen_by(policy, text, len(text) + len(question)),
    )  # fmt: skip
    reference = reference_logits(plain, *rows)
    torch.testing.assert_close(ours[-1], reference[-1], atol=1e-4, rtol=1e-4)
