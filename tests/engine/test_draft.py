"""What is drafted, when it pays and when it does not; what a forward costs."""

import numpy as np
import pytest

from longstride.engine.attention import Slice
from longstride.engine.costs import StepCosts
from longstride.engine.draft import DEEPEST, Drafter, Rates
from longstride.engine.history import GAP
from longstride.engine.ngrams import NONE, NGrams


def line(fixed, slope):
    """The cost of so many drafted tokens."""
    return lambda further: fixed + slope * further


CHEAP = line(1.0, 0.01)  # a drafted token costs a hundredth of a forward
DEAR = line(1.0, 1.0)


def paths(draft):
    """The drafted tokens, each with what stands before it."""
    found = []
    for node in draft.nodes:
        tokens, at = [], node
        while at.parent is not None:
            tokens.insert(0, at.token)
            at = at.parent
        found.append(tokens)
    return found


def test_a_long_match_is_drafted_to_the_depth_asked_for():
    drafter = Drafter()
    drafter.read.extend(range(100))
    drafter.begin([200, 201])
    draft = drafter.propose(range(20, 50), 12, CHEAP)
    assert paths(draft)[-1] == list(range(50, 62))
    assert [node.row for node in draft.nodes] == list(range(len(draft.nodes)))


def test_a_tree_holds_several_continuations_and_a_single_branch_one():
    texts = [*[1, 2, 3, 4, GAP] * 3, *[1, 2, 7, 8, GAP] * 2, 1, 2, 9, GAP]
    both = {}
    for branches in (True, False):
        drafter = Drafter(branches=branches)
        drafter.read.extend(texts)
        both[branches] = paths(drafter.propose([1, 2], 4, CHEAP))
    assert {tuple(p) for p in both[True]} >= {(3,), (3, 4), (7,), (7, 8), (9,)}
    assert both[True][0] == [3]  # the most frequent first
    assert both[False] == [[3], [3, 4]]


def test_nothing_is_drafted_where_it_does_not_pay():
    def drafted(tail, depth, cost, **others):
        drafter = Drafter()
        drafter.read.extend(range(100))
        return len(drafter.propose(tail, depth, cost, **others).nodes)

    assert drafted(range(20, 50), 12, CHEAP) == 12
    assert drafted(range(20, 50), 12, DEAR) == 0
    assert drafted(range(20, 50), 0, CHEAP) == 0
    assert drafted([500, 501], 12, CHEAP) == 0
    assert drafted(range(20, 50), 12, CHEAP, most=5) == 5
    # others get a token of the same forward: what slows them must bring more
    assert 0 < drafted([1, 2, 3], 30, line(1.4, 0.05), beside=4) < drafted([1, 2, 3], 30, line(1.0, 0.05))


def test_tokens_that_cost_nothing_are_drafted_as_soon_as_they_may_be_right():
    """The first rows of a forward come with the one that is due (a convex cost)."""

    def drafted(cost):
        drafter = Drafter()
        drafter.read.extend([*[1, 2, 3, 4, GAP] * 3, *[1, 2, 7, 8, GAP] * 2, 1, 2, 9, GAP])
        return len(drafter.propose([1, 2], 4, cost).nodes)

    assert drafted(lambda further: max(further, 3)) >= 3 > drafted(lambda further: 3 + further)


def test_a_pass_over_the_weights_is_filled_or_not_begun():
    """Up to three rows cost alike, and so do four to six."""

    def drafted(step):
        drafter = Drafter()
        drafter.read.extend(range(100))
        return len(drafter.propose(range(20, 50), 30, lambda further: 1.0 + step * (further // 3), most=7).nodes)

    assert drafted(0.5) == 5  # not four, nor six and seven, which begin a third
    assert drafted(3.0) == 2
    assert drafted(0.05) == 7


def test_drafts_stop_when_they_are_wrong_and_come_back_when_they_would_be_right():
    """What was not drafted is watched as well, so finding out costs no forward."""
    drafter = Drafter()
    drafter.read.extend(list(range(100)) * 2)
    cost = line(1.0, 0.3)

    def step(tail, token):
        draft = drafter.propose(tail, 1, cost)
        drafter.observe(draft.root, token)
        return bool(draft.nodes)

    before = [step([i - 2, i - 1], i) for i in range(10, 20)]
    wrong = [step([i - 2, i - 1], 777) for i in range(20, 90)]
    right = [step([i - 2, i - 1], i) for i in range(2, 90)]
    assert before[-1]
    assert not any(wrong[-30:])
    assert all(right[-10:])


def test_a_new_question_follows_no_lead_of_the_last():
    drafter = Drafter()
    drafter.read.extend(range(100))
    drafter.begin([200])
    drafter.propose(range(20, 50), 12, CHEAP)
    assert drafter.leads
    drafter.begin([201])
    assert drafter.propose([201], 12, CHEAP).nodes == []


def test_even_where_rows_cost_nothing_an_improbable_token_is_not_drafted():
    drafter = Drafter()
    drafter.read.extend([1, *range(500, 600)])
    nodes = drafter.propose([1], 40, line(1.0, 0.0)).nodes
    assert nodes
    assert all(node.probability >= 0.02 for node in nodes)
    assert len(nodes) < 40


def test_a_lead_is_followed_over_a_difference():
    """A log line with another time: what comes after it is drafted at once, not after the next match."""
    line = [50, 51, 52, 53, 1, 60, 61, 62, 63, 64]
    drafter = Drafter()
    drafter.read.extend([*line, GAP])
    drafter.begin([])
    tail = line[:4]
    drafter.propose(tail, 8, CHEAP)
    drafter.say(2)  # not 1
    draft = drafter.propose([*tail, 2], 8, CHEAP)
    assert paths(draft)[-1] == [60, 61, 62, 63, 64]


def test_the_passages_of_another_question_are_not_drafted_from():
    drafter = Drafter()
    drafter.begin([1])
    drafter.show([[70, 71, 72, 73]])
    assert paths(drafter.propose([70, 71], 4, CHEAP))[-1] == [72, 73]
    drafter.begin([2])
    assert drafter.propose([70, 71], 4, CHEAP).nodes == []


def test_what_is_kept_of_answers_is_bounded(monkeypatch):
    monkeypatch.setattr(Drafter, "SAID_LIMIT", 100)
    drafter = Drafter()
    for i in range(50):
        drafter.begin(range(1000 * i, 1000 * i + 20))
        drafter.say(7)
    drafter.propose([1], 1, CHEAP)
    assert drafter.said.size <= 130
    assert paths(drafter.propose([49_001, 49_002], 2, CHEAP))[-1] == [49_003, 49_004]


def test_rates_follow_what_is_seen():
    rates = Rates()
    kind, other = rates.kinds(2, 1, step=False)[0], rates.kinds(30, 3, step=True)[-1]
    start = rates[other]
    for _ in range(400):
        rates.observe(kind, right=False)
    assert rates[kind] < 0.03
    for _ in range(400):
        rates.observe(kind, right=True)
    assert rates[kind] > 0.9
    assert rates[other] == start


def test_evidence_grows_with_every_token_that_is_right():
    rates = Rates()
    kinds = rates.kinds(30, DEEPEST + 1, step=False)
    assert len(kinds) == DEEPEST + 1
    assert kinds[:3] == [rates.kinds(n, 1, step=False)[0] for n in (30, 31, 32)]
    assert set(kinds[2:]) == {kinds[2]}  # from WINDOW on all are alike


def tendencies(after):
    """N-grams of {pair: [(what may follow, in 255ths)]}; a pair's first is NONE where a single token is meant."""
    rows = sorted(((before + 1) * 1000 + last, found) for (before, last), found in after.items())
    tokens, chances = (np.array([[each[i] for each in found] for _, found in rows]) for i in (0, 1))
    return NGrams(np.array([key for key, _ in rows]), tokens, chances.astype(np.uint8), vocabulary="numbers", size=1000)


def test_what_no_text_foretells_the_model_may():
    ngrams = tendencies({(NONE, 5): [(6, 100), (7, 50)], (4, 5): [(8, 200), (9, 0)], (NONE, 8): [(1, 250), (0, 0)]})
    drafter = Drafter(ngrams)
    draft = drafter.propose([3, 4, 5], 4, CHEAP)
    assert paths(draft) == [[8], [8, 1]]  # the pair says more than its last token; a chance of 0 is none
    first, then = 200 / 255 * Rates.TENDENCY, 250 / 255 * Rates.TENDENCY
    assert [node.probability for node in draft.nodes] == pytest.approx([first, first * then])
    assert paths(drafter.propose([4, 4, 5], 1, CHEAP)) == [[8]]
    assert paths(drafter.propose([3, 3, 5], 1, CHEAP)) == [[6], [7]]
    assert paths(drafter.propose([5], 1, CHEAP)) == [[6], [7]]
    assert Drafter().propose([3, 4, 5], 4, CHEAP).nodes == []


def test_the_texts_come_first_and_the_model_has_what_they_leave():
    drafter = Drafter(tendencies({(NONE, 5): [(6, 60), (30, 100)]}))
    drafter.read.extend([1, 2, 3, 4, 5, 30, 31, 32])
    root = drafter.propose([8, 5], 4, CHEAP).root
    assert list(root.children) == [30, 6]
    right = drafter.rates[drafter.rates.kinds(1, 1, step=False)[0]]
    assert root.children[30].probability == pytest.approx(right)
    assert root.children[6].probability == pytest.approx((1 - right) * 60 / 255 * Rates.TENDENCY)


def test_a_second_branch_that_promises_little_is_left_out():
    def drafted(tail, depth):
        drafter = Drafter(tendencies({(NONE, 5): [(6, 100)]}))
        drafter.read.extend([1, 2, 3, 4, 5, 30, 31, 32])
        return paths(drafter.propose(tail, depth, CHEAP))

    assert drafted([1, 2, 3, 4, 5], 4) == [[30], [30, 31], [30, 31, 32]]
    assert drafted([8, 5], 1) == [[6], [30]]  # where it promises as much as the first, it stays


def test_of_equal_evidence_the_latest_place_counts_twice():
    drafter = Drafter()
    drafter.read.extend([*[1, 2, 3, GAP] * 3, 1, 2, 4, GAP])
    shares = {p: node.probability for p, node in drafter.propose([1, 2], 1, CHEAP).root.children.items()}
    assert shares[4] / shares[3] == pytest.approx(2 / 3)


def test_the_models_chances_are_believed_as_far_as_they_hold():
    drafter = Drafter(tendencies({(NONE, 5): [(6, 128), (7, 64)]}))

    def chance():
        nodes = drafter.propose([5], 1, CHEAP).nodes
        return nodes[0].probability if nodes else 0.0

    start = chance()
    for _ in range(60):
        drafter.observe(drafter.propose([5], 1, CHEAP).root, 99)
    assert chance() < 0.3 * start
    for _ in range(400):
        drafter.observe(drafter.propose([5], 1, CHEAP).root, 7)
    assert chance() > start  # one of its two came every time, which is more than it promised
    assert 0.5 < sum(node.probability for node in drafter.propose([5], 1, CHEAP).root.children.values()) <= 1.0


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_costs_are_learned_from_forwards(scale):
    """Terms of another machine than the one whose proportions they begin with."""
    true = scale * np.array([0.010, 0.001, 0.0001, 0.0004, 0.002, 0.002, 0.0001])
    costs = StepCosts(free=8)
    rng = np.random.default_rng(0)
    for _ in range(300):
        rows, keys = int(rng.choice([1, rng.integers(2, 40)])), int(rng.integers(50, 4000))
        seconds = float(true @ [1, rows > 1, rows, max(0, rows - 8), (rows - 1) // 8, keys / 1000, rows * keys / 1000])
        costs.observe([Slice(None, [0] * rows, range(rows), keys - rows)], seconds * rng.uniform(0.9, 1.1))
    cost = costs.curve(1, 2000)
    assert cost(0) == pytest.approx(true @ [1, 0, 1, 0, 0, 2, 2], rel=0.15)
    assert cost(15) - cost(8) == pytest.approx(7 * true @ [0, 0, 1, 1, 0, 0, 2], rel=0.3)
    # rows 16 to 24: a pass begins among them, with the ninth further row as well as with the seventeenth
    assert cost(23) - cost(15) == pytest.approx(8 * true @ [0, 0, 1, 1, 1 / 8, 0, 2], rel=0.15)
    assert cost(16) - cost(15) > 2 * (cost(15) - cost(14))
    assert cost(8) - cost(7) == pytest.approx(cost(16) - cost(15))
    assert cost(2) - cost(1) == pytest.approx(true @ [0, 0, 1, 0, 0, 0, 2], abs=0.02 * cost(0))  # there is noise of 0.1
    assert cost(7) - cost(6) == pytest.approx(cost(2) - cost(1))


def test_a_slow_beginning_is_forgotten():
    """A cold forward of many rows, then plain steps: no draft is needed to find out that rows are cheap."""
    costs = StepCosts()
    for rows, seconds in ((40, 3.0), (40, 1.5), *[(1, 0.04)] * 80):
        costs.observe([Slice(None, [0] * rows, range(rows), 500)], seconds)
    cost = costs.curve(1, 500)
    assert cost(0) == pytest.approx(0.04, rel=0.1)
    assert cost(11) - cost(10) < 0.25 * cost(0)


def test_one_slow_forward_does_not_change_what_is_known():
    costs = StepCosts()
    piece = [Slice(None, [0], [0], 500)]
    for _ in range(50):
        costs.observe(piece, 0.030)
    costs.observe(piece, 30.0)
    assert costs.curve(1, 500)(0) < 0.040
    costs.observe([Slice(None, [0] * 500, range(500), 0)], 2.0)  # a forward that reads says nothing
    assert costs.curve(1, 500)(0) < 0.040
