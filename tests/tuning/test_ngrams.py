"""What is counted of a model's answers, and how the answers come about."""

import pytest
import torch

from longstride.engine.ngrams import NONE
from longstride.errors import BadInput
from longstride.tuning import ngrams as counting
from longstride.tuning.kept import Kept
from longstride.tuning.ngrams import BACK, TEXTS, Answer, Answers, counted
from longstride.tuning.texts import Text
from tests.lora import tiny_loaded
from tests.tiny import ByteTokenizer, reference_logits, tiny_model

SIZE = 300
DOCUMENTS = [
    Text("tale", "It was raining when they met Old Mary Ann by the river. She had waited there all day. " * 40),
    Text("word", "Hm"),
]


def answer(ids, *likely):
    return Answer(ids, [[token for token, _ in at] for at in likely], [[chance for _, chance in at] for at in likely])


def test_a_pair_leans_on_its_last_token_the_less_the_more_often_it_was_seen():
    often = [answer([1, 5], [(5, 1.0)], [(6, 0.75), (7, 0.25)])] * 4
    once = [answer([2, 5], [(5, 1.0)], [(7, 1.0)])]
    found = counted([*often, *once], [], "v", SIZE)
    # after 5: 3 of 6, 2 of 7 in five places and two imagined ones
    single = {6: 3 / (5 + BACK[0]), 7: 2 / (5 + BACK[0])}
    assert dict(found.after(NONE, 5)) == pytest.approx(single, abs=1 / 255)
    pair = {token: (count + BACK[1] * single[token]) / (4 + BACK[1]) for token, count in ((6, 3), (7, 1))}
    assert dict(found.after(1, 5)) == pytest.approx(pair, abs=1 / 255)
    seldom = {token: (count + BACK[1] * single[token]) / (1 + BACK[1]) for token, count in ((6, 0), (7, 1))}
    assert found.after(2, 5) == [(7, pytest.approx(seldom[7], abs=1 / 255)), (6, pytest.approx(seldom[6], abs=1 / 255))]
    assert dict(found.after(9, 5)) == pytest.approx(single, abs=1 / 255)
    assert found.after(NONE, 6) == []  # nothing was ever written after it


def test_texts_count_for_little_and_only_what_they_hold_often():
    text = [5, 8, NONE] * 1000
    found = counted([answer([1, 5], [(5, 1.0)], [(6, 1.0)])], [text, [70, 71]], "v", SIZE)
    assert dict(found.after(NONE, 5)) == pytest.approx(
        {8: TEXTS / (1 + TEXTS + BACK[0]), 6: 1 / (1 + TEXTS + BACK[0])}, abs=1 / 255
    )
    assert found.after(NONE, 70) == []
    assert found.after(NONE, 8) == []  # texts do not continue one another


def test_no_more_is_kept_than_is_worth_it():
    many = [answer([5], [(token, 0.1) for token in range(10, 16)])] * 20 + [answer([5], [(16, 0.1)])]
    found = counted(many, [], "v", SIZE)
    assert [token for token, _ in found.after(NONE, 5)] == [10, 11, 12, 13, 14, 15]
    assert len(counted([], [], "v", SIZE)) == 0


def answers(kept=None, seed=0):
    return Answers(tiny_loaded("llama"), DOCUMENTS, seed, Kept(kept))


def test_answers_are_the_models_own_and_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "ANSWER", 12)
    monkeypatch.setattr(counting, "PART", 5)
    monkeypatch.setattr(counting, "TOGETHER", 3)
    heard = []
    found = answers(tmp_path).take(100, heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == sum(len(a.likely) for a in found) >= 100
    again = answers(tmp_path)
    monkeypatch.setattr(again, "_written", None)  # nothing is left to be written
    assert again.take(100, heard.append) == found
    assert [answers(seed=1).prompt(n) for n in range(5)] != [again.prompt(n) for n in range(5)]
    plain, _ = tiny_model("llama")
    banned = torch.tensor(sorted(ByteTokenizer.special - ByteTokenizer.eos))
    for number in range(5):
        prompt, written = again.prompt(number), found[number]
        ids = [*prompt, *written.ids[1:]]
        rows = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        logits = reference_logits(plain, ids, range(len(ids)), rows)[len(prompt) - 1 :]
        top = torch.softmax(logits.index_fill(1, banned, -torch.inf), 1).topk(counting.LIKELY)
        assert top.indices.tolist() == written.likely
        torch.testing.assert_close(top.values, torch.tensor(written.chances), atol=1e-4, rtol=1e-3)
        assert written.ids == [prompt[-1], *(likely[0] for likely in written.likely[:-1])]


def test_a_model_with_too_few_positions_is_refused():
    with pytest.raises(BadInput, match="positions"):
        Answers(tiny_loaded("llama", max_position_embeddings=128), DOCUMENTS, 0, Kept(None))
