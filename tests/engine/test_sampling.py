"""Choosing tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longstride.engine.sampling import Sampler, Sampling
from longstride.errors import BadInput

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])


def test_greedy_takes_the_best_that_is_not_banned():
    assert Sampler(Sampling()).choose(LOGITS).token == 0
    choice = Sampler(Sampling(), banned=[0, 1]).choose(LOGITS)
    assert choice.token == 2
    assert choice.probability == pytest.approx(1 / (1 + math.exp(-1) + math.exp(-2)), rel=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-8, 8), min_size=2, max_size=20),
    st.floats(0.1, 3),
    st.integers(0, 20),
    st.floats(0.05, 1),
    st.floats(0, 1),
)
def test_the_distribution_is_one_and_keeps_the_best_token(logits, temperature, top_k, top_p, min_p):
    tensor = torch.tensor(logits)
    p = Sampler(Sampling(temperature, top_k, top_p, min_p)).distribution(tensor)
    assert float(p.sum()) == pytest.approx(1, abs=1e-4)
    everyone = torch.softmax(tensor / temperature, -1)
    assert p[everyone == everyone.max()].sum() > 0  # one of the best, if several tie
    if top_k:
        # at most k, and who ties with the last of them
        assert int((p > 0).sum()) <= int((everyone >= everyone.topk(min(top_k, len(logits))).values[-1]).sum())


def test_top_k_top_p_and_min_p_cut_where_they_say():
    def kept(**options):
        return (Sampler(Sampling(temperature=1.0, **options)).distribution(LOGITS) > 0).tolist()

    assert kept(top_k=2) == [True, True, False, False, False]
    # softmax: 0.636, 0.234, 0.086, 0.032, 0.012
    assert kept(top_p=0.63) == [True, False, False, False, False]
    assert kept(top_p=0.64) == [True, True, False, False, False]
    assert kept(min_p=0.1) == [True, True, True, False, False]


def test_samples_follow_the_distribution_and_a_seed_repeats_them():
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=5)
    sampler = Sampler(sampling)
    draws = [sampler.choose(LOGITS).token for _ in range(4000)]
    expected = sampler.distribution(LOGITS)
    for token, p in enumerate(expected.tolist()):
        assert draws.count(token) / 4000 == pytest.approx(p, abs=0.03)
    again = Sampler(sampling)
    assert [again.choose(LOGITS).token for _ in range(50)] == draws[:50]


def test_the_repetition_penalty_divides_what_was_seen():
    scores = Sampler(Sampling(repetition_penalty=2.0)).process(LOGITS, [0, 4])
    assert scores.tolist() == [1.0, 1.0, 0.0, -1.0, -4.0]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"min_p": 2}, {"repetition_penalty": 0}]
)
def test_senseless_settings_are_refused(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        Sampling(**wrong)
