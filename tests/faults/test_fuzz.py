"""Malformed messages: each one is a dead letter with a reason, and the worker goes on answering.

`LONGSTRIDE_FUZZ=10000` sends more of them.
"""

import json
import os
import random

import pytest

from tests.broker import Broker, peer, until
from tests.service.test_worker import working

COUNT = int(os.environ.get("LONGSTRIDE_FUZZ", "500"))
LIMIT = 4000


def malformed(rng: random.Random, number: int) -> tuple[str, bytes]:
    """(kind, payload) of a message that cannot be done; no two are the same."""
    tag = f"{number:x}"
    fine = {"feed": {"text": tag}, "ask": {"question": tag}, "close": {}}
    kind = rng.choice(list(fine))
    field = {"feed": "text", "ask": "question", "close": "remove"}[kind]
    wrong_type = rng.choice([number + 2, [tag], {tag: 1}, None, 1.5, f"{tag}" if kind == "close" else False])

    def spell(**more) -> bytes:
        return json.dumps({**fine[kind], "id": tag, **more}).encode()

    whole = spell()
    faults = [
        lambda: whole[: rng.randrange(1, len(whole))],
        lambda: spell(**{rng.choice(["colour", "Text", "ID", "__class__", "stream_"]): tag}),
        lambda: spell(**{field: wrong_type}) if kind != "ask" else spell(question=wrong_type, stride=tag),
        lambda: spell(id=rng.choice([number, [tag], {}, "", "x" * 201])),
        lambda: b"{" + rng.randbytes(rng.randrange(1, 60)) + tag.encode(),
        lambda: b"\xff" + rng.randbytes(rng.randrange(40)) + tag.encode(),
        lambda: b'{"a":' * rng.randrange(50, 700) + tag.encode(),
        lambda: b"{" + b" " * LIMIT + tag.encode(),
        lambda: whole[:-1] + b', "\\ud800": 1}',
        lambda: b"\xef\xbb\xbf{" + tag.encode(),
        lambda: json.dumps({**fine[kind], "id": tag + "\ud800"}).encode(),
    ]
    if kind == "ask":
        numbers = {
            "stride": -number,
            "temperature": -1 - number,
            "top_p": 2 + number,
            "max_tokens": tag,
            "seed": -1 - number,
        }
        faults += [lambda: spell(**dict([rng.choice(list(numbers.items()))])), tag.encode]
        faults += [lambda: spell(question=" " * (1 + number % 50), id=f"{tag} ")]
    if kind != "feed":
        faults += [f"[{number}]".encode, lambda: b"\x00" * (1 + number % 3000)]
    payload = rng.choice(faults)()
    if kind == "feed" and not payload.startswith((b"{", b"\xff")):
        payload = b"{" + payload  # other text would be a line to be read
    return kind, payload


@pytest.fixture
def broker(tmp_path):
    made = Broker(tmp_path / "broker").start()
    yield made
    made.stop()


async def test_each_malformed_message_is_a_dead_letter_with_a_reason(tmp_path, broker):
    rng = random.Random(1)
    async with (
        peer(broker, "z") as client,
        working(tmp_path, broker, "z", message_limit_bytes=LIMIT) as worker,
    ):
        await client.send("z/sessions/s/feed", "So that there is a session.")
        for number in range(COUNT):
            kind, payload = malformed(rng, number)
            await client.send(f"z/sessions/s/{kind}", payload, correlation=f"{number}".encode())
            if number % 250 == 0:
                await client.send("z/sessions/s/ask", {"id": f"fine {number}", "question": "still there?"})
                await client.wait(lambda n=number: [a for a in client.on("/answers") if a["id"] == f"fine {n}"], 120)
        fine = 1 + (COUNT + 249) // 250

        def known() -> int:
            return worker.jobs.database.read(lambda t: t.conn.execute("select count(*) from jobs").fetchone())[0]

        await until(lambda: known() == fine + COUNT, 120)  # the last may still be on their way
        await until(lambda: worker.jobs.depth() == (0, 0), 120)
        assert worker.jobs.dead_count() == COUNT  # none was taken for a good one
        letters = await client.wait(lambda: len(client.on("/dead")) >= COUNT and client.on("/dead"), 120)
        assert len(letters) == COUNT
        assert all(letter["reason"] for letter in letters)
        assert not any("internal error" in letter["reason"] for letter in letters)
        assert worker.problem == ""


async def test_ten_megabytes_are_refused_and_forgotten(tmp_path, broker):
    async with peer(broker, "z") as client, working(tmp_path, broker, "z") as worker:
        await client.send("z/sessions/s/feed", b"x" * 10_000_000)
        (letter,) = await client.wait(lambda: client.on("/dead"))
        assert "10000000 bytes; 1048576 are allowed" in letter["reason"]
        assert worker.jobs.dead()[0].payload == b""
