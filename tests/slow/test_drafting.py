"""Lossless with the embedded model: the same greedy text with and without drafts, all policies and placements.

LONGSTRIDE_DATA names the folder of evaluation texts (without it the shipped chapters are asked about) and
LONGSTRIDE_PROMPTS says how many prompts of each kind are tried.
"""

import itertools
import os
from pathlib import Path

import pytest

from benchmarks.workloads import Workloads
from longstride import Assistant
from longstride.engine.context import Placement
from longstride.engine.costs import StepCosts
from longstride.engine.draft import Drafter
from longstride.engine.model import load_model

pytestmark = pytest.mark.real_model
DATA = Path(os.environ["LONGSTRIDE_DATA"]) if "LONGSTRIDE_DATA" in os.environ else None
PROMPTS = int(os.environ.get("LONGSTRIDE_PROMPTS", "4"))
POLICIES = ["tokens", "sentence", "confidence", "drift", "never"]
READ = 500  # tokens of a prompt's text


@pytest.fixture(scope="module")
def model():
    return load_model(dtype="fp32")


async def test_greedy_text_is_the_same_with_and_without_drafts(tmp_path, model, monkeypatch):
    monkeypatch.setattr(
        StepCosts, "curve", lambda _self, _rows, _keys: lambda further: 1.0 + 0.05 * further
    )  # no clock decides what is drafted
    prompts = Workloads(model.tokenizer, DATA).all(PROMPTS)
    ways = itertools.cycle(itertools.product(POLICIES, Placement))
    drafted = accepted = 0
    different = []
    async with Assistant.open(tmp_path / "t.db", model=model, max_tokens=48) as assistant:
        for number, (prompt, (policy, placement)) in enumerate(zip(prompts, ways, strict=False)):
            session = await assistant.session(f"{number}", placement=placement, context_tokens=1024, window="sinks")
            await session.feed_ids(model.tokenizer.encode(prompt.text)[:READ])
            answers = {}
            for drafting in ("off", "lookup", "tree"):
                session.memory.texts = Drafter(model.ngrams)  # or it would be drafted from the same answer a moment ago
                answers[drafting] = await session.answer(prompt.question, policy=policy, drafting=drafting)
            if len({answer.text for answer in answers.values()}) > 1:
                different.append((prompt.task, prompt.name, policy, placement.value))
            drafted += answers["tree"].usage.drafted
            accepted += answers["tree"].usage.accepted
            await assistant.remove_session(session.name)
    print(f"{len(prompts)} prompts, {drafted} tokens drafted, {accepted} accepted, different: {different}")
    assert not different
    assert accepted > 5 * len(prompts)
