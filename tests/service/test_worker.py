"""The worker against a real broker, on a tiny random model."""

import asyncio
import json
import subprocess
import urllib.request
from contextlib import asynccontextmanager

import pytest

from longstride import Assistant
from longstride.errors import StorageError
from longstride.service.settings import load_worker_settings
from longstride.service.worker import Worker
from tests.broker import Broker, free_port, peer, until
from tests.tiny import tiny_assistant_model

SETTINGS = {
    "system": "s", "passage_tokens": 24, "passages": 2, "refresh": 8, "stride": 4, "max_tokens": 8, "block_tokens": 16,
    "budget_tokens": 64, "context_tokens": 512, "window": "sinks",
}  # fmt: skip
FACTS = "".join(f"Sentence number {i} speaks of thing{i} and of nothing else. " for i in range(20))


def opened(path, **changes):
    return Assistant.open(path / "t.db", model=tiny_assistant_model(), **{**SETTINGS, **changes})


@asynccontextmanager
async def working(path, broker, root, assistant_settings=None, **changes):
    """A worker at work, until the end of the block."""
    async with opened(path, **(assistant_settings or {})) as assistant:
        settings = load_worker_settings(broker=broker.url, topics=root, **changes)
        worker = Worker(assistant, settings)
        task = asyncio.create_task(worker.run())
        try:
            # the broker keeps what is sent from the first connection on
            waiting = asyncio.create_task(worker.connected.wait())
            done, _ = await asyncio.wait([task, waiting], timeout=60, return_when=asyncio.FIRST_COMPLETED)
            assert done, worker.problem
            yield worker
        finally:
            worker.stop()
            await asyncio.wait_for(task, 60)


async def test_a_stream_is_read_in_order_and_questions_are_answered_with_sources(tmp_path, broker):
    async with peer(broker, "a") as client, working(tmp_path, broker, "a") as worker:
        await worker.assistant.add_document("facts", FACTS)
        for i in range(10):
            await client.send("a/sessions/talk/feed", {"id": f"f{i}", "text": f"Line {i} is of thing{i}."})
        await client.send("a/sessions/talk/ask", {"id": "q", "question": "What of thing3?"})
        (answer,) = await client.wait(lambda: client.on("/answers"))
        session = await worker.assistant.session("talk")
        expected = "".join(f"Line {i} is of thing{i}.\n" for i in range(10))
        assert worker.assistant.model.tokenizer.decode(session.stream) == expected
        assert answer["id"] == "q"
        assert answer["session"] == "talk"
        assert answer["usage"]["generated"] == 8
        assert {source["document"] for source in answer["sources"]} == {"facts"}
        stored = worker.assistant.sessions.answers(session.id)
        assert [a["text"] for a in stored] == [answer["text"]]


async def test_replies_go_to_the_response_topic_with_the_correlation_data(tmp_path, broker):
    async with peer(broker, "b") as client, working(tmp_path, broker, "b"):
        await client.send("b/sessions/s/feed", FACTS, reply="b/replies/fed", correlation=b"one")
        await client.send("b/sessions/s/ask", {"question": "thing1?"}, reply="b/replies/answer", correlation=b"two")
        await client.wait(lambda: len(client.on("/fed")) + len(client.on("/answer")) == 2)
        by_topic = {topic: (data, correlation) for topic, data, correlation in client.seen if "/replies/" in topic}
        fed, answered = by_topic["b/replies/fed"], by_topic["b/replies/answer"]
        assert fed == ({"id": None, "session": "s", "read": len(FACTS) + 1}, b"one")
        assert answered[1] == b"two"
        assert answered[0]["text"]


async def test_the_same_message_twice_is_done_once(tmp_path, broker):
    async with peer(broker, "c") as client, working(tmp_path, broker, "c") as worker:
        for _ in range(2):
            await client.send("c/sessions/s/feed", {"id": "1", "text": "once"})
            await client.send("c/sessions/s/feed", "plain text, known by its hash")
            await client.send("c/sessions/s/feed", {"text": "known by it"}, correlation=b"correlation")
            await client.send("c/sessions/s/ask", {"id": "1", "question": "what?"})
        await client.send("c/sessions/s/ask", {"id": "2", "question": "and?"})
        await client.wait(lambda: [a for a in client.on("/answers") if a["id"] == "2"])
        session = await worker.assistant.session("s")
        text = worker.assistant.model.tokenizer.decode(session.stream)
        assert text == "once\nplain text, known by its hash\nknown by it\n"
        assert [a["id"] for a in client.on("/answers")] == ["1", "2"]


async def test_text_streams_as_it_comes_and_notes_are_written(tmp_path, broker):
    async with peer(broker, "d") as client, working(tmp_path, broker, "d"):
        await client.send("d/sessions/s/feed", {"id": "f", "text": FACTS, "notes_every": 400})
        await client.send("d/sessions/s/ask", {"id": "q", "question": "thing1?", "stream": True, "max_tokens": 12})
        (answer,) = await client.wait(lambda: client.on("/answers"))
        await client.wait(lambda: "".join(p["text"] for p in client.on("/stream")) == answer["text"])
        notes = client.on("/notes")
        assert [note["tokens"] for note in notes] == [400 * i for i in range(1, (len(FACTS) + 1) // 400 + 1)]
        assert all(note["id"] == "f" and note["usage"]["generated"] for note in notes)


@pytest.mark.parametrize(
    ("kind", "payload", "words"),
    [
        ("feed", b"", "empty"),
        ("feed", b"\xff\xfe", "UTF-8"),
        ("feed", b'{"text": "a', "not JSON"),
        ("feed", b'{"text": 3}', "text: "),
        ("feed", b'{"text": ""}', "text: "),
        ("feed", b'{"text": "a", "colour": "red"}', "does not have; it has id, notes_every, text"),
        ("feed", b'{"text": "\\ud800"}', "cannot be read"),
        ("ask", b"What?", "not JSON"),
        ("ask", b'["What?"]', "not a JSON object"),
        ("ask", b'{"question": "a", "stride": "16"}', "stride: "),
        ("ask", b'{"question": "a", "stride": 0}', "stride: "),
        ("ask", b'{"question": "   "}', "question is empty"),
        ("ask", b'{"question": "a", "id": ""}', "id: "),
        ("ask", b"[" * 3_900, "not JSON"),
        ("close", b"[]", "not a JSON object"),
        ("feed", b"x" * 5000, "5000 bytes"),
    ],
)
async def test_a_bad_message_is_a_dead_letter_with_a_reason(tmp_path, broker, kind, payload, words):
    root = f"bad-{tmp_path.name}"
    async with peer(broker, root) as client, working(tmp_path, broker, root, message_limit_bytes=4000) as worker:
        await client.send(f"{root}/sessions/s/feed", "So that there is a session.")
        await client.send(f"{root}/sessions/s/{kind}", payload)
        (letter,) = await client.wait(lambda: client.on("/dead"))
        assert words in letter["reason"]
        assert (letter["session"], letter["kind"]) == ("s", kind)
        if kind == "ask":  # whoever asked is told as well
            (reply,) = await client.wait(lambda: client.on("/answers"))
            assert reply["error"] == letter["reason"]
        assert [job.reason for job in worker.jobs.dead()] == [letter["reason"]]
        await client.send(f"{root}/sessions/s/ask", {"question": "still there?"})
        await client.wait(lambda: [a for a in client.on("/answers") if a.get("text")])


async def test_what_was_not_fed_cannot_be_asked_and_no_other_session_is_named(tmp_path, broker):
    async with peer(broker, "e") as client, working(tmp_path, broker, "e"):
        await client.send("e/sessions/secret-name/feed", "text")
        await client.send("e/sessions/other/ask", {"question": "what?"}, reply="e/replies/r", correlation=b"c")
        await client.wait(lambda: client.on("/r") and client.on("/dead"))
        assert "feed it first" in client.on("/r")[0]["error"]
        assert "secret-name" not in json.dumps(
            [data for _, data, _ in client.seen if "reason" in data or "error" in data]
        )


async def test_a_reply_is_never_a_request(tmp_path, broker):
    async with peer(broker, "f") as client, working(tmp_path, broker, "f") as worker:
        await client.send("f/sessions/s/feed", "text")
        await client.send("f/sessions/s/ask", {"question": "what?"}, reply="f/sessions/other/feed")
        (letter,) = await client.wait(lambda: client.on("/dead"))
        assert "response topic" in letter["reason"]
        assert not await worker.assistant.has_session("other")


async def test_dead_messages_can_be_retried_and_dropped(tmp_path, broker):
    async with peer(broker, "g") as client, working(tmp_path, broker, "g") as worker:
        await client.send("g/sessions/s/ask", {"id": "early", "question": "before the text?"})
        await client.send("g/sessions/t/ask", {"id": "never", "question": "no text at all?"})
        await client.wait(lambda: len(client.on("/dead")) == 2)
        await client.send("g/sessions/s/feed", FACTS, reply="g/replies/fed")
        await client.wait(lambda: client.on("/fed"))
        jobs = worker.jobs
        numbers = {job.session: job.seq for job in jobs.dead()}
        assert await jobs.database.awrite(lambda t: jobs.retry(t, numbers["s"])) == 1
        (answer,) = await client.wait(lambda: [a for a in client.on("/answers") if "text" in a])
        assert answer["id"] == "early"
        assert await jobs.database.awrite(jobs.drop) == 1
        assert jobs.dead() == []


async def test_closing_lets_go_of_memory_and_removing_of_text(tmp_path, broker):
    async with peer(broker, "h") as client, working(tmp_path, broker, "h") as worker:
        await client.send("h/sessions/s/feed", {"id": "1", "text": FACTS})
        await client.send("h/sessions/s/close", {"id": "2"}, reply="h/replies/closed")
        await client.wait(lambda: client.on("/closed"))
        assert worker.assistant._open == {}
        await client.send("h/sessions/s/ask", {"id": "3", "question": "thing1?"})
        await client.wait(lambda: client.on("/answers"))
        await client.send("h/sessions/s/close", {"id": "4", "remove": True}, reply="h/replies/removed")
        await client.wait(lambda: client.on("/removed"))
        assert not await worker.assistant.has_session("s")
        left = worker.jobs.database.read(lambda t: t.conn.execute("select kind, payload from jobs").fetchall())
        assert left == [("close", b"")]


async def test_the_status_is_retained_and_told_at_the_end(tmp_path, broker):
    async with peer(broker, "i") as client:
        async with working(tmp_path, broker, "i", name="w1"):
            await client.wait(lambda: client.on("workers/w1/status"))
        await client.wait(lambda: [s["state"] for s in client.on("/status")] == ["online", "stopped"])
    async with peer(broker, "i") as late:
        (status,) = await late.wait(lambda: late.on("/status"))
        assert status["state"] == "stopped"


async def test_a_second_worker_is_refused(tmp_path, broker):
    async with peer(broker, "j") as client, working(tmp_path, broker, "j") as first:
        await client.wait(lambda: client.on("/status"))
        async with opened(tmp_path) as assistant:
            second = Worker(assistant, first.settings)
            with pytest.raises(StorageError, match="another worker is at work"):
                await second.run()


# paho leaves the socket of a failed handshake to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_over_tls_only_with_the_right_certificate(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    await asyncio.to_thread(subprocess.run, make, check=True, capture_output=True)
    broker = Broker(tmp_path / "broker", lines=(f"certfile {certificate}", f"keyfile {key}")).start()
    broker.url = broker.url.replace("mqtt:", "mqtts:")
    try:
        async with working(tmp_path, broker, "t", tls_ca=certificate) as worker:
            assert worker.connected.is_set()
        async with opened(tmp_path) as assistant:
            stranger = Worker(assistant, load_worker_settings(broker=broker.url, topics="t"))
            task = asyncio.create_task(stranger.run())
            await until(lambda: "certificate" in stranger.problem)
            assert not stranger.connected.is_set()
            stranger.stop()
            await task
    finally:
        broker.stop()


async def test_metrics_and_health_say_how_it_is(tmp_path, broker):
    port, health = free_port(), tmp_path / "health.json"
    async with (
        peer(broker, "k") as client,
        working(tmp_path, broker, "k", metrics_port=port, health_file=health) as worker,
    ):
        await client.send("k/sessions/s/feed", FACTS)
        await client.send("k/sessions/s/ask", {"question": "thing1?"})
        await client.send("k/sessions/s/ask", b"bad")
        await client.wait(lambda: len(client.on("/answers")) == 2)
        page = await asyncio.to_thread(
            lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        )
        assert f"longstride_tokens_read_total {len(FACTS) + 1}.0" in page
        assert "longstride_tokens_generated_total 8.0" in page
        assert 'longstride_messages_total{outcome="refused"} 1.0' in page
        assert "longstride_first_token_seconds_count 1.0" in page
        assert "longstride_connected 1.0" in page
        assert json.loads(health.read_text())["state"] == "online"
        assert worker.problem == ""
    assert json.loads(health.read_text())["state"] == "stopped"
