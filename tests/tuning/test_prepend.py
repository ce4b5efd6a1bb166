"""Prepending against plain transformers over the same ids: the text it writes, and the tokens it counts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longstride import Assistant
from longstride.engine.tokenizer import REPLACEMENT
from longstride.errors import BadInput
from longstride.scheduler.retriever import Passage
from longstride.tuning.prepend import SEPARATOR, common, prepended
from tests.tiny import tiny_assistant_model, tiny_model

TEXT = "".join(f"Sentence {i} speaks of thing{i} and of nothing else. " for i in range(40))
QUERY = 24
SETTINGS = {
    "system": "s", "passage_tokens": 24, "passages": 2, "refresh": 8, "context_tokens": 400, "window": "sinks",
    "max_tokens": 400, "drafting": "off", "query_tokens": QUERY,
}  # fmt: skip
QUESTION = "What of thing3 and thing5?"


def opened(path, **changes):
    return Assistant.open(path / "t.db", model=tiny_assistant_model(), **{**SETTINGS, **changes})


async def read(assistant):
    session = await assistant.session("s")
    await session.feed(TEXT)
    assert session.window_start > 0
    return session


def passages(session, query):
    """Two passages of the stream that follow from the query alone, none for some queries."""
    spans = session.memory.index.spans
    start = sum(query.encode())
    numbers = [] if start % 5 == 0 else [start % len(spans), (start // 7) % len(spans)]
    return [session.memory.index.passage(n, 1.0) for n in dict.fromkeys(numbers)]


def said(text):
    """An answer never ends with a part of a character."""
    return text.rstrip(REPLACEMENT)


@torch.inference_mode()
def reference(session, question, stride, limit):
    """Everything afresh by transformers: (ids written, tokens encoded, tokens that a kept prefix would save)."""
    plain, tokenizer = tiny_model("llama")[0], session.core.model.tokenizer
    banned = sorted(tokenizer.special - tokenizer.eos)
    head = tokenizer.encode(f"\n\n{question}")
    window = session.stream[session.window_start :].tolist()
    written, encoded, saved, before, found, ids = [], 0, 0, [], None, []
    while len(written) < limit:
        if len(written) % stride == 0:
            query = [*head, *written][-QUERY:]
            now = passages(session, tokenizer.decode(query))
            if now != found:
                found = now
                front = [
                    i for p in reversed(found) for i in (*tokenizer.encode(p.text)[:24], *tokenizer.encode(SEPARATOR))
                ]
                ids = [*session.frame.prompt, *front, *window, *head, *session.frame.answer, *written]
                encoded += len(ids)
                saved += common(before, ids)
        before = list(ids)  # what has rows once the next token is known
        logits = plain(torch.tensor([ids])).logits[0, -1]
        logits[banned] = -torch.inf
        token = int(logits.argmax())
        if token in tokenizer.eos:
            break
        written.append(token)
        ids.append(token)
    return written, encoded, saved


@pytest.mark.parametrize("stride", [3, 5, 1000])
async def test_the_text_and_the_counters_are_those_of_transformers(tmp_path, monkeypatch, stride):
    async with opened(tmp_path) as assistant:
        session = await read(assistant)

        async def search(query, *_):
            return passages(session, query)

        monkeypatch.setattr(assistant.retriever, "search", search)
        before = list(session.sequence.context.text)
        answer, saved, held = await prepended(session, QUESTION, stride=stride, max_tokens=14)
        written, encoded, would_save = reference(session, QUESTION, stride, 14)
        assert answer.text == said(session.core.model.tokenizer.decode(written))
        assert answer.usage.generated == len(written)
        assert answer.usage.encoded + answer.usage.rewritten == encoded
        assert saved == would_save
        assert (answer.usage.rewrites > 0) == (stride < 14)
        assert answer.usage.cached == 0
        # the session lent its text, and is as it was
        assert session.sequence.context.text == before
        assert held[: len(session.frame.prompt)] == list(session.frame.prompt)


async def test_generate_writes_the_same(tmp_path):
    """Retrieving once, with the session's own search: transformers' `generate` over the same ids."""
    async with opened(tmp_path) as assistant:
        session = await read(assistant)
        answer, *_ = await prepended(session, QUESTION, stride=1000, max_tokens=16)
        tokenizer = session.core.model.tokenizer
        found = await assistant.retriever.search(
            f"\n\n{QUESTION}"[-QUERY:], 2, session.memory.index, session.window_start, ["default"]
        )
        assert [p.id for p in found] == [s.passage for s in sorted(answer.sources, key=lambda s: -s.score)]
        assert len(found) == 2
        front = "".join(f"{p.text}{SEPARATOR}" for p in reversed(found))
        window = session.stream[session.window_start :].tolist()
        ids = [*session.frame.prompt, *tokenizer.encode(front), *window, *tokenizer.encode(f"\n\n{QUESTION}")]
        ids = torch.tensor([[*ids, *session.frame.answer]])
        out = tiny_model("llama")[0].generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=16,
            suppress_tokens=sorted(tokenizer.special - tokenizer.eos),
            pad_token_id=257,
        )
        assert answer.text == said(tokenizer.decode(out[0, ids.shape[1] :].tolist()))


async def test_it_retrieves_what_the_product_retrieves(tmp_path):
    async with opened(tmp_path) as assistant:
        session = await read(assistant)
        beside = await session.answer(QUESTION, stride=1000, max_tokens=8)
        answer, *_ = await prepended(session, QUESTION, stride=1000, max_tokens=8)
        assert [s.passage for s in answer.sources] == [s.passage for s in beside.sources]
        assert answer.usage.retrievals == beside.usage.retrievals == 1
        assert beside.usage.encoded < answer.usage.encoded


async def test_the_same_question_again_is_all_prefix_but_its_last_row(tmp_path):
    async with opened(tmp_path) as assistant:
        session = await read(assistant)
        first, saved, held = await prepended(session, QUESTION, stride=1000, max_tokens=4)
        assert saved == 0
        again, saved, _ = await prepended(session, QUESTION, held, stride=1000, max_tokens=4)
        assert again.text == first.text
        assert again.usage.encoded == first.usage.encoded  # computed all the same
        assert saved == first.usage.encoded - 1


async def test_without_retrieval_nothing_stands_in_front(tmp_path):
    async with opened(tmp_path) as assistant:
        session = await read(assistant)
        plain = await session.answer("zzz?", stride=1000, max_tokens=6)
        answer, *_ = await prepended(session, "zzz?", stride=1000, max_tokens=6)
        assert plain.sources == answer.sources == []
        # the range reserved for passages is the only difference, and rotary models do not see where a text begins
        assert answer.text == plain.text
        assert answer.usage.encoded == len(session.sequence.context.text) + len("\n\nzzz?") + 1


async def test_a_context_that_the_model_does_not_have_is_refused(tmp_path):
    async with opened(tmp_path, context_tokens=1000) as assistant:
        session = await read(assistant)
        with pytest.raises(BadInput, match="prepending 2 passages of 24 tokens needs a context of 1028"):
            await prepended(session, QUESTION)


async def test_a_passage_is_cut_as_in_the_product(tmp_path, monkeypatch):
    async with opened(tmp_path) as assistant:
        session = await read(assistant)
        long = Passage("x", "x", 0, 80, "word " * 16)

        async def search(*_):
            return [long]

        monkeypatch.setattr(assistant.retriever, "search", search)
        answer, *_ = await prepended(session, QUESTION, stride=1000, max_tokens=2)
        text = session.sequence.context.text
        assert answer.usage.encoded == len(text) + 24 + len(SEPARATOR) + len(f"\n\n{QUESTION}") + 1


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_is_the_longest_common_prefix(a, b):
    n = common(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]
