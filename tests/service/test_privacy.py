"""No text of one session reaches another's context, drafts, answers, errors or the logs."""

import asyncio
import json
import logging
import random

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from longstride.engine.runner import ModelRunner
from longstride.service.settings import load_worker_settings
from longstride.service.worker import Worker
from longstride.storage.jobs import Job
from tests.broker import free_port, until
from tests.service.test_worker import opened

NAMES = ("a", "b", "c")
COLLECTIONS = {"a": ["default"], "b": ["default", "beta"], "c": []}
SECRETS = {"a": "apricot", "b": "bergamot", "c": "cinnamon", "default": "damson", "beta": "blackberry"}
ALLOWED = {name: {SECRETS[name], *(SECRETS[c] for c in COLLECTIONS[name])} for name in NAMES}

steps = st.lists(
    st.tuples(st.sampled_from(NAMES), st.sampled_from(["feed", "ask", "remember", "bad", "close"])),
    min_size=8, max_size=16,
)  # fmt: skip


def message(number: int, session: str, kind: str) -> Job:
    secret = SECRETS[session]
    question = {"question": f"What of {secret}, {' and '.join(SECRETS.values())}?" if kind == "ask" else secret}
    body = {
        "feed": {"text": f"{secret} is what number {number} is about. " * 4},
        "ask": question,
        "remember": {**question, "remember": True},
        "bad": {"question": secret, "stride": secret},
        "close": {},
    }[kind]
    if kind == "ask":
        body["question"] = f"What of {secret}?"
    topic = {"remember": "ask", "bad": "ask"}.get(kind, kind)
    payload = json.dumps({"id": str(number), **body}).encode()
    return Job(f"{session}/{topic}/{number}", session, topic, f"t/sessions/{session}/{topic}", payload)


def found(text: str, name: str) -> set[str]:
    """Secrets in a text that session `name` must not know."""
    return {secret for secret in SECRETS.values() if secret in text} - ALLOWED[name]


@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])  # an example takes a second: no shrinking
@given(plan=steps, seed=st.integers(0, 1000))
def test_nothing_of_a_session_reaches_another(tmp_path_factory, plan, seed):
    looked_at, said = asyncio.run(_run(tmp_path_factory.mktemp("privacy"), plan, random.Random(seed)))
    assert looked_at
    assert "started" in said
    assert not any(secret in said for secret in SECRETS.values())


class Seen(logging.Handler):
    """All that is logged at info level and above, with what goes along."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(str({**vars(record), "message": record.getMessage()}))


async def _run(folder, plan, rng) -> tuple[int, str]:
    """Works a plan off and asserts of each session that it saw nothing of others; (slices looked at, the logs)."""
    seen = Seen()
    logger = logging.getLogger("longstride")
    logger.addHandler(seen)
    logger.setLevel(logging.INFO)
    forwards: list[tuple[object, list[int]]] = []
    original = ModelRunner.forward

    def forward(self, slices):
        forwards.extend((piece.cache, list(piece.ids)) for piece in slices)
        return original(self, slices)

    ModelRunner.forward = forward
    try:
        async with opened(folder) as assistant:
            for collection in ("default", "beta"):
                secret = SECRETS[collection]
                await assistant.add_document(collection, f"{secret} and nothing else. " * 6, collection=collection)
            for name in NAMES:
                session = await assistant.session(name, collections=COLLECTIONS[name])
                await session.feed(f"It begins with {SECRETS[name]}. ")
            nobody = load_worker_settings(broker=f"mqtt://127.0.0.1:{free_port()}", topics="t")
            worker = Worker(assistant, nobody)  # what it received in an earlier life is in the database
            order = list(enumerate(plan))
            rng.shuffle(order)
            for number, (name, kind) in order:
                job = message(number, name, kind)
                assistant.database.write(lambda tables, job=job: worker.jobs.receive(tables, job))
            working = asyncio.create_task(worker.run())
            caches = {}
            tokenizer = assistant.model.tokenizer
            while not working.done() and worker.jobs.depth() != (0, 0):
                for name, session in list(assistant._open.items()):
                    caches[id(session.sequence.cache)] = (name, session.sequence.cache, session)
                await asyncio.sleep(0.005)
            await until(lambda: worker.jobs.depth() == (0, 0))
            worker.stop()
            await working

            for name in NAMES:
                session = await assistant.session(name)
                caches[id(session.sequence.cache)] = (name, session.sequence.cache, session)
                assert not found(tokenizer.decode(session.stream), name)
                texts = session.memory.texts
                for history in (texts.read, texts.said, texts.view):
                    assert not found(tokenizer.decode([i for i in history.ids.tolist() if 0 <= i < 256]), name)
                for answer in assistant.sessions.answers(session.id):
                    assert not found(json.dumps(answer), name)
            looked_at = 0
            for cache, ids in forwards:
                if id(cache) in caches:
                    looked_at += 1
                    assert not found(tokenizer.decode(ids), caches[id(cache)][0])
            for _, reply in worker.jobs.outgoing(10_000):
                data = json.loads(reply.payload)
                assert not found(reply.payload.decode(), data["session"])
                if "reason" in data or "error" in data:
                    assert not any(secret in reply.payload.decode() for secret in SECRETS.values())
            return looked_at, "\n".join(seen.lines)
    finally:
        ModelRunner.forward = original
        logger.removeHandler(seen)
        logger.setLevel(logging.NOTSET)
