"""Drafts are verified in one forward and change nothing about what is written."""

import itertools
import math
from collections import Counter

import pytest
import torch

from longstride.engine.context import Context, Placement
from longstride.engine.draft import Drafter, Node, ordered
from longstride.engine.pieces import MemoryPieces
from longstride.engine.sampling import Choice, Sampler, Sampling
from longstride.engine.sequence import Sequence
from longstride.engine.verify import Decoding, generate
from tests.engine.test_exactness import layout
from tests.tiny import reference_logits, tiny_model

PROMPT = [3, 1, 4, 1, 5, 9]
PIECES = [[20, 21, 22, 23], [30, 31, 32]]


def new_sequence(runner, placement=Placement.END, text=(), limit=400):
    context = Context(PROMPT, placement=placement, limit=limit, reserved=24, refresh=5)
    sequence = Sequence(runner, context, max_rows=limit + 48)
    sequence.context.append(text)
    return sequence


def in_view(runner, placement, seed):
    """A sequence in the middle of an answer, passages in view, some of the tail not computed yet."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 250, (40,), generator=generator).tolist()
    sequence = new_sequence(runner, placement, text)
    sequence.context.begin_turn()
    sequence.context.append([7, 8, 9])
    sequence.run(runner)
    sequence.rewrite(PIECES)
    sequence.context.append([11, 12])
    return sequence


def fresh_logits(plain, sequence, more):
    """Logits after the sequence's text and `more`, from the definition."""
    context = sequence.context
    text = [*context.text, *more]
    return reference_logits(plain, *layout(context.placement, text, context.segment, context.boundary))[-1]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("placement", list(Placement))
@pytest.mark.parametrize("seed", range(3))
def test_every_node_of_a_tree_has_the_logits_of_its_path(kind, placement, seed):
    """Wrong siblings stand before the right ones, with children of their own: each row sees its ancestors only."""
    plain, runner = tiny_model(kind)
    sequence = in_view(runner, placement, seed)
    root = right = Node(-1, None, 0, 1.0, [])
    nodes, path = [], []
    for depth in range(1, 5):
        best = int(fresh_logits(plain, sequence, path).argmax())
        wrong = Node((best + 1 + seed) % 250, right, depth, 1.0, [])
        below = Node((best + 2) % 250, wrong, depth + 1, 1.0, [])
        right = Node(best, right, depth, 1.0, [])
        nodes += [wrong, below, right]
        path.append(best)
    sequence.draft = ordered(root, nodes)
    logits = sequence.run(runner)
    assert logits.shape[0] == 1 + len(nodes)
    for node in nodes:
        ancestors, at = [], node
        while at.parent is not None:
            ancestors.insert(0, at.token)
            at = at.parent
        expected = fresh_logits(plain, sequence, ancestors)
        torch.testing.assert_close(logits[1 + node.row], expected, atol=1e-4, rtol=1e-4)
    kept = [node for node in nodes if node.token in path and node.row in right_rows(right)]
    assert [node.row for node in kept] != list(range(len(kept)))  # so rows really have to be moved
    sequence.keep(kept)
    assert sequence.context.text[-4:] == path
    assert sequence.pending == 0
    sequence.context.append([77])
    after = sequence.run(runner)[-1]
    torch.testing.assert_close(after, fresh_logits(plain, sequence, []), atol=1e-4, rtol=1e-4)


def right_rows(node):
    rows = set()
    while node.parent is not None:
        rows.add(node.row)
        node = node.parent
    return rows


def test_a_cache_that_grows_for_a_draft_keeps_what_was_copied_behind_a_part_to_compute():
    """Rows of a known passage lie behind those of a new one, past what is valid, when the buffer has to grow."""
    plain, runner = tiny_model("llama")
    store = MemoryPieces("tiny", 1 << 20)
    known, new = [30, 31, 32, 33], [40, 41, 42]

    def sequence_of(length):
        context = Context(PROMPT, placement=Placement.BESIDE, limit=600, reserved=24, refresh=5)
        sequence = Sequence(runner, context, max_rows=700, store=store)
        context.append([i % 250 for i in range(length)])
        return sequence

    first = sequence_of(40)
    first.rewrite([known])
    first.run(runner)
    sequence = sequence_of(256 - len(PROMPT) - len(known) - len(new) - 2)
    sequence.run(runner)
    sequence.rewrite([new, known])
    root = Node(-1, None, 0, 1.0, [])
    sequence.draft = ordered(root, [Node(7, root, 1, 1.0, []), Node(8, root, 1, 1.0, []), Node(9, root, 1, 1.0, [])])
    assert sequence.context.rows < 256 < sequence.context.rows + 3  # a cache begins with 256 rows
    assert sequence.copied == 0
    logits = sequence.run(runner)
    assert sequence.copied == len(known)
    torch.testing.assert_close(logits[0], fresh_logits(plain, sequence, []), atol=1e-4, rtol=1e-4)


def drafted_rightly(runner, placement, count):
    """(what greedy decoding writes, the same begun with a draft that knows it)."""
    expected = generate(runner, in_view(runner, placement, 1), count).tokens
    sequence = in_view(runner, placement, 1)
    decoding = Decoding(sequence, Sampler(Sampling()), frozenset(), drafter=Scripted(expected))
    decoding.draft(20, runner.costs)
    return expected, decoding


def test_a_passage_computed_in_several_forwards_is_kept_for_the_next_time():
    _, runner = tiny_model("llama")
    store = MemoryPieces("tiny", 1 << 20)
    context = Context(PROMPT, placement=Placement.BESIDE, limit=400, reserved=24, refresh=5)
    sequence = Sequence(runner, context, max_rows=448, store=store)
    context.append(range(40))
    sequence.rewrite(PIECES)
    sequence.run(runner, budget=3)
    assert sequence.copied == 0
    computed = sequence.computed
    sequence.rewrite([])
    sequence.rewrite(PIECES)
    sequence.run(runner, budget=3)
    assert sequence.copied == sum(map(len, PIECES))
    assert sequence.computed - computed == context.refresh


def test_what_a_budget_has_no_room_for_is_cut_off_the_end_of_a_draft():
    plain, runner = tiny_model("llama")
    expected, decoding = drafted_rightly(runner, Placement.END, 9)
    sequence = decoding.sequence
    size = len(decoding.proposal.nodes)
    due = sequence.pending
    (*_, last) = slices = sequence.take(due + 4)
    assert last.drafted == 4 < size
    logits = runner.forward(slices)[-1]
    sequence.accept(slices)
    decoding.accept(logits, lambda _choice: True)
    assert decoding.tokens == expected[: len(decoding.tokens)]
    assert decoding.drafted == 4
    assert decoding.accepted in (3, 4)  # one of the four is a wrong sibling
    torch.testing.assert_close(sequence.run(runner)[-1], fresh_logits(plain, sequence, []), atol=1e-4, rtol=1e-4)


def test_writing_needs_a_row_that_is_due():
    _, runner = tiny_model("llama")
    sequence = in_view(runner, Placement.END, 1)
    sequence.run(runner)
    with pytest.raises(ValueError, match="nothing is due"):
        generate(runner, sequence, 3)


class Scripted(Drafter):
    """Drafts a given continuation and, beside it, wrong ones; to try acceptance without luck."""

    def __init__(self, script):
        super().__init__()
        self.script = script
        self.at = 0

    def say(self, token):
        self.at += 1

    def propose(self, tail, depth, cost, *, most, beside=0):
        draft = super().propose(tail, 0, cost, most=most, beside=beside)
        nodes, parent = [], draft.root
        for i, token in enumerate(self.script[self.at : self.at + min(depth, 6)]):
            if i == 1:
                nodes.append(Node((token + 1) % 250, parent, parent.depth + 1, 1.0, []))
            parent = Node(token, parent, parent.depth + 1, 1.0, [])
            nodes.append(parent)
        draft.nodes[:] = ordered(draft.root, nodes)
        return draft


SAMPLINGS = [
    Sampling(),
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=0.8, seed=5),
    Sampling(temperature=1.2, top_k=40, top_p=0.9, min_p=0.02, seed=6),
    Sampling(temperature=1.0, repetition_penalty=1.2, seed=7),
]


@pytest.mark.parametrize("placement", list(Placement))
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("half_wrong", [False, True])
def test_text_of_a_seed_is_the_same_with_drafts_right_or_wrong(placement, sampling, half_wrong):
    _, runner = tiny_model("llama")
    plain = generate(runner, in_view(runner, placement, 1), 40, sampling=sampling, banned=[0, 1])
    script = [(t + 1) % 250 if half_wrong and i % 3 == 2 else t for i, t in enumerate(plain.tokens)]
    drafted = generate(
        runner, in_view(runner, placement, 1), 40, sampling=sampling, banned=[0, 1], drafter=Scripted(script)
    )
    assert drafted.tokens == plain.tokens
    assert drafted.accepted > 10
    assert drafted.steps == 40 - drafted.accepted
    assert drafted.drafted >= drafted.accepted + (5 if half_wrong else 0)


def test_drafts_are_looked_for_rarely_where_none_is_right_and_again_when_one_is():
    """The longer none was right, the more rarely, but never more than eight steps apart."""

    class Counted(Scripted):
        def propose(self, *given, **more):
            looked.append(self.at)
            return super().propose(*given, **more)

    looked: list[int] = []
    _, runner = tiny_model("llama")
    plain = generate(runner, in_view(runner, Placement.END, 1), 90).tokens
    script = [(token + 1) % 250 if at < 60 else token for at, token in enumerate(plain)]
    assert generate(runner, in_view(runner, Placement.END, 1), 90, drafter=Counted(script)).tokens == plain
    early = [at for at in looked if at < 60]
    assert early[:8] == list(range(8))
    gaps = [b - a for a, b in itertools.pairwise(early)]
    assert max(gaps) == 8
    assert len(early) < 24
    found = next(at for at in looked if at >= 60)
    assert found < 68
    assert len([at for at in looked if at >= 60]) <= 6  # in runs: each draft is right as far as it goes


def test_an_end_in_the_middle_of_a_draft_ends_the_text():
    _, runner = tiny_model("llama")
    plain = generate(runner, in_view(runner, Placement.END, 2), 30)
    end = plain.tokens[7]
    whole = generate(runner, in_view(runner, Placement.END, 2), 30, ends=frozenset({end}))
    sequence = in_view(runner, Placement.END, 2)
    drafted = generate(runner, sequence, 30, ends=frozenset({end}), drafter=Scripted(plain.tokens))
    assert drafted.tokens == whole.tokens == plain.tokens[: plain.tokens.index(end)]
    assert drafted.ended
    assert sequence.context.text[-len(whole.tokens) :] == whole.tokens


def test_who_takes_tokens_can_stop_within_a_draft():
    """A rewrite falls due after three tokens: what comes behind them is not kept, and is right afterwards."""
    plain, runner = tiny_model("llama")
    expected, decoding = drafted_rightly(runner, Placement.BESIDE, 6)
    sequence = decoding.sequence
    heard: list[Choice] = []

    def take(choice):
        heard.append(choice)
        return len(heard) < 3

    assert decoding.accept(sequence.run(runner), take)
    assert [choice.token for choice in heard] == decoding.tokens == expected[:3]
    assert sequence.pending == 1
    sequence.rewrite([[40, 41]])
    after = sequence.run(runner)[-1]
    torch.testing.assert_close(after, fresh_logits(plain, sequence, []), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.0, 0.9), (1.5, 1.0)])
def test_the_distribution_of_samples_is_unchanged(temperature, top_p):
    """Chi-square over all sequences of three tokens of a four-token vocabulary, drafts always there and often wrong."""
    _, runner = tiny_model("llama")
    banned = range(4, 264)
    rounds = 1000
    text = [1, 2, 3, 2, 1, 0, 2, 3, 3, 2, 1]

    def distribution(path):
        sampler = Sampler(Sampling(temperature=temperature, top_p=top_p), banned)
        logits = new_sequence(runner, text=[*text, *path]).run(runner)[-1]
        return sampler.distribution(sampler.process(logits, [])).tolist()

    expected = {}
    for a, b in itertools.product(range(4), repeat=2):
        p = distribution([])[a] * distribution([a])[b] if distribution([])[a] else 0.0
        for c, q in enumerate(distribution([a, b])[:4] if p else []):
            expected[a, b, c] = p * q
    assert math.isclose(sum(expected.values()), 1.0, abs_tol=1e-4)
    sequence = new_sequence(runner, text=text)
    sequence.run(runner)
    counts: Counter[tuple[int, ...]] = Counter()
    accepted = 0
    for seed in range(rounds):
        del sequence.context.text[len(PROMPT) + len(text) :]
        sequence.cache.truncate(sequence.context.rows - 1)
        script = torch.randint(0, 4, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
        sampling = Sampling(temperature=temperature, top_p=top_p, seed=10_000 + seed)
        made = generate(runner, sequence, 3, sampling=sampling, banned=banned, drafter=Scripted(script))
        counts[tuple(made.tokens)] += 1
        accepted += made.accepted
    assert accepted > rounds / 10
    assert set(counts) <= {path for path, p in expected.items() if p > 0}
    # cells that are expected less than five times are taken together, as the test's assumptions want
    common = [path for path, p in expected.items() if p * rounds >= 5]
    rare = sum(p for path, p in expected.items() if path not in set(common)) * rounds
    statistic = sum((counts[path] - expected[path] * rounds) ** 2 / (expected[path] * rounds) for path in common)
    if rare >= 5:
        statistic += (rounds - sum(counts[path] for path in common) - rare) ** 2 / rare
    freedom = len(common) - 1 + (rare >= 5)
    # five standard deviations of a chi-square variable; the seeds are fixed, so this never flickers
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), (statistic, freedom)
