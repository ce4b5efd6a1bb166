"""What a broker may do to a worker, and what others may send through it."""

import asyncio
import os
import signal

import aiomqtt
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from longstride.service.mqtt import Link
from longstride.service.settings import load_worker_settings
from tests.broker import Broker, peer, until
from tests.service.test_worker import working

ROOT = "link"


def brokered(tmp_path, *lines):
    return Broker(tmp_path / "broker", lines=lines)


@pytest.fixture
def broker(tmp_path):
    made = brokered(tmp_path).start()
    yield made
    made.stop()


async def asked(client, id_="q", **more):
    await client.send(f"{ROOT}/sessions/s/ask", {"id": id_, "question": "what?"}, **more)


async def test_any_text_that_mqtt_allows_may_stand_in_a_property(tmp_path, broker):
    async with working(tmp_path, broker, ROOT):
        pass  # the broker knows it now, and keeps what comes
    async with peer(broker, ROOT) as client:
        for number, (name, value) in enumerate(
            [
                ("UserProperty", ("note", "\ufeffx")),
                ("ContentType", "\ufefftext"),
                ("ResponseTopic", f"{ROOT}/replies/\ufeff"),
            ]
        ):
            properties = Properties(PacketTypes.PUBLISH)
            setattr(properties, name, value)
            await client.client.publish(f"{ROOT}/sessions/s/feed", f"Line {number}.", 1, properties=properties)
        async with working(tmp_path, broker, ROOT) as worker:
            await asked(client)
            await client.wait(lambda: client.on("/answers"))
            session = await worker.assistant.session("s")
            assert worker.assistant.model.tokenizer.decode(session.stream) == "Line 0.\nLine 1.\nLine 2.\n"


async def test_a_response_topic_that_no_broker_takes_is_refused_at_once(tmp_path, broker):
    async with peer(broker, ROOT) as client, working(tmp_path, broker, ROOT):
        await client.send(f"{ROOT}/sessions/s/feed", "text")
        for number, topic in enumerate(
            ["x/" * 200, f"{ROOT}/sessions/other/answers", f"{ROOT}/dead", f"{ROOT}/workers/w/status"]
        ):
            await asked(client, str(number), reply=topic)
            await client.wait(lambda n=number: len(client.on("/dead")) == n + 1)
        assert all("response topic" in letter["reason"] for letter in client.on("/dead"))
        await asked(client)
        (answer,) = await client.wait(lambda: [a for a in client.on("/answers") if a["id"] == "q"])
        assert "error" not in answer


async def test_a_reply_that_breaks_the_connection_is_set_aside_and_the_others_go_out(tmp_path, monkeypatch):
    monkeypatch.setattr("longstride.service.worker.backoff_s", lambda _failures: 0.02)
    broker = brokered(tmp_path, "max_packet_size 400").start()
    try:
        async with peer(broker, ROOT) as client, working(tmp_path, broker, ROOT) as worker:
            await client.send(f"{ROOT}/sessions/s/feed", "text")
            await client.send(f"{ROOT}/sessions/s/ask", {"id": "q", "question": "what?"})  # its answer is longer
            await client.send(f"{ROOT}/sessions/t/feed", {"id": "after", "text": "text"}, reply=f"{ROOT}/replies/fed")
            await client.wait(lambda: client.on("/fed"))
            await until(lambda: worker.jobs.outbox_counts() == (0, 1))
            assert not client.on("/answers")
    finally:
        broker.stop()


async def test_a_reply_that_the_broker_refuses_is_kept_and_sent_when_it_may_be(tmp_path):
    rules = tmp_path / "acl"
    rules.write_text(f"topic readwrite {ROOT}/#\n")
    broker = brokered(tmp_path, f"acl_file {rules}").start()
    try:
        async with peer(broker, ROOT) as client, working(tmp_path, broker, ROOT) as worker:
            await client.send(f"{ROOT}/sessions/s/feed", "text")
            await asked(client, reply="elsewhere/replies")
            await until(lambda: worker.jobs.outbox_counts() == (0, 1))
            await asked(client, "second")
            await client.wait(lambda: client.on("/answers"))
        broker.stop()
        rules.write_text(f"topic readwrite {ROOT}/#\ntopic readwrite elsewhere/#\n")
        broker.start()
        async with aiomqtt.Client("127.0.0.1", broker.port, protocol=aiomqtt.ProtocolVersion.V5) as listener:
            await listener.subscribe("elsewhere/replies", 1)
            async with working(tmp_path, broker, ROOT) as worker:
                message = await asyncio.wait_for(anext(aiter(listener.messages)), 30)
                assert b'"text"' in message.payload
                await until(lambda: worker.jobs.outbox_counts() == (0, 0))
    finally:
        broker.stop()


async def test_messages_that_nothing_holds_back_do_not_fill_the_memory(tmp_path, broker):
    async with peer(broker, ROOT) as client, working(tmp_path, broker, ROOT, inbox_limit=1) as worker:
        await client.send(f"{ROOT}/sessions/s/feed", "text " * 200)
        for number in range(3000):
            await client.client.publish(f"{ROOT}/sessions/s/feed", f"Unsure {number}.", 0)
        await client.send(f"{ROOT}/sessions/s/feed", "Sure.")
        assert len(worker._link._client.messages) <= 101
        await asked(client)
        await client.wait(lambda: client.on("/answers"))
        session = await worker.assistant.session("s")
        assert "Sure.\n" in worker.assistant.model.tokenizer.decode(session.stream).splitlines(keepends=True)


async def test_a_connection_that_breaks_while_nothing_may_be_taken_in_is_noticed(tmp_path, broker, monkeypatch):
    async with working(tmp_path, broker, ROOT, inbox_limit=1) as worker:
        async with peer(broker, ROOT) as client:
            monkeypatch.setattr(worker, "_room", asyncio.Event().wait)  # there is never room
            await client.send(f"{ROOT}/sessions/s/feed", "text")
        broker.stop()
        await until(lambda: not worker.connected.is_set())
        assert "no connection" in worker.problem
        broker.start()
        await until(worker.connected.is_set)


async def test_told_to_stop_it_stops_also_where_the_broker_hangs(tmp_path, broker):
    async with peer(broker, ROOT) as client, working(tmp_path, broker, ROOT) as worker:
        await client.send(f"{ROOT}/sessions/s/feed", "text")
        await asked(client)
        await client.wait(lambda: client.on("/answers"))
        os.kill(broker._process.pid, signal.SIGSTOP)
        try:
            worker.stop()
            await until(lambda: worker._link is None, 40)
            assert not worker.connected.is_set()
        finally:
            os.kill(broker._process.pid, signal.SIGCONT)


async def test_told_to_stop_it_stops_also_where_the_broker_hangs_over_a_reply(tmp_path, broker, caplog):
    caplog.set_level("INFO", "longstride.worker")
    async with peer(broker, ROOT) as client, working(tmp_path, broker, ROOT) as worker:
        await client.send(f"{ROOT}/sessions/s/feed", "text")
        await client.send(f"{ROOT}/sessions/s/ask", {"id": "q", "question": "what?", "max_tokens": 200})
        # the text and the question: a broker that stops between the two would keep the question
        await until(lambda: [record.message for record in caplog.records].count("received") == 2)
        os.kill(broker._process.pid, signal.SIGSTOP)
        try:
            await until(lambda: worker.jobs.outbox_counts()[0])
            worker.stop()
            # the link gives the reply up while the worker says goodbye: the stop must not get lost between the two
            await until(lambda: "stopped" in [record.message for record in caplog.records], 40)
            assert worker._link is None
            assert worker.jobs.outbox_counts()[0]  # the reply is kept for the next start
        finally:
            os.kill(broker._process.pid, signal.SIGCONT)


async def test_what_goes_wrong_while_it_runs_is_waited_out(tmp_path):
    """A status that may not be published, a password that is just being written: reasons to try again, not to end."""
    rules, secret = tmp_path / "acl", tmp_path / "password"
    rules.write_text(f"pattern readwrite {ROOT}/#\n")
    secret.write_text("sesame\n")
    broker = brokered(tmp_path, f"acl_file {rules}").start()
    try:
        async with working(tmp_path, broker, ROOT, user="me", password_file=secret) as worker:
            await until(worker.connected.is_set)
            broker.stop()
            rules.write_text(f"pattern read {ROOT}/#\n")
            broker.start()
            await until(lambda: f"topic {ROOT}/workers/" in worker.problem)
            secret.write_text("")
            await until(lambda: "its first line is the password" in worker.problem)
            broker.stop()
            rules.write_text(f"pattern readwrite {ROOT}/#\n")
            secret.write_text("sesame\n")
            broker.start()
            await until(worker.connected.is_set)
            assert not worker.problem
    finally:
        broker.stop()


async def test_a_stop_that_comes_with_a_refusal_is_no_refusal(tmp_path, broker, monkeypatch):
    """asyncio's `wait_for` before Python 3.12 raises what it waited for instead of the cancellation."""
    link = Link(load_worker_settings(broker=broker.url, topics=ROOT))

    async def refused():
        asyncio.current_task().cancel()
        raise aiomqtt.MqttError("refused")

    monkeypatch.setattr(link._client, "__aenter__", refused)
    task = asyncio.create_task(link.__aenter__())
    await asyncio.wait([task])
    assert task.cancelled()
