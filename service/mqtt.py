"""`Link`: one connection to the broker. What is received stays the broker's until it is acknowledged here."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiomqtt
import paho.mqtt.properties as paho_properties
from paho.mqtt.exception import MalformedPacket
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from longstride.errors import BadInput, LongstrideError
from longstride.service.requests import Topics, encode
from longstride.service.settings import WorkerSettings

AT_LEAST_ONCE = 1
RETAINED_IF_NEW = 1  # a retained request is sent with the first subscription, not with each that follows


UNSURE_LIMIT = 100  # messages of QoS 0 that wait at most; no Receive Maximum holds them back
ANSWER_S = 10.0  # the broker's time to acknowledge


class LinkLost(LongstrideError):
    """The broker cannot be reached, or the connection broke."""


class Refused(LongstrideError):
    """The broker does not take this message (its access rules, its limits); the connection is in order."""


_properties: Callable[[int], Properties] = Properties  # paho's own has no types


def _text(buffer: bytes, most: int) -> tuple[str, int]:
    size = 2 + int.from_bytes(buffer[:2], "big")
    if len(buffer) < 2 or size > most:
        raise MalformedPacket("a text is longer than its packet")
    return bytes(buffer[2:size]).decode(), size


# paho breaks the connection over U+FEFF in a property, which MQTT 5 allows (1.5.4) and brokers pass on: one such
# message, delivered again after each connect, would stop the worker for good
paho_properties.readUTF = _text


class _Incoming(asyncio.Queue[aiomqtt.Message]):
    """Drops what came at QoS 0 where too much of it waits; that is what QoS 0 means."""

    def put_nowait(self, item: aiomqtt.Message) -> None:
        if item.qos or self.qsize() < UNSURE_LIMIT:
            super().put_nowait(item)


@dataclass(frozen=True)
class Message:
    """What was received. `number`: the broker's, to acknowledge it by."""

    topic: str
    payload: bytes
    reply_topic: str | None
    correlation: bytes | None
    number: int
    qos: int


@contextmanager
def _cancellable() -> Iterator[None]:
    """Waits of aiomqtt, whose `asyncio.wait_for` loses (before Python 3.12) a cancellation that comes as they end."""
    try:
        yield
    finally:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError


class Link:
    """An async context manager: connected and subscribed within. Raises `LinkLost` wherever the connection breaks.

    aiomqtt acknowledges a message as it enters its own queue, where a crash loses it; this class alone knows how it is
    kept from that.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self.topics = Topics(settings.topics)
        self._status = self.topics.status(settings.name)
        host, port, tls = settings.address
        properties = _properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = settings.away_s
        properties.ReceiveMaximum = 1  # the broker holds what was not acknowledged, so one is enough
        self._client = aiomqtt.Client(
            host,
            port,
            identifier=f"{settings.topics}-{settings.name}".replace("/", "-"),  # the broker keeps the session under it
            protocol=aiomqtt.ProtocolVersion.V5,
            clean_start=False,
            properties=properties,
            username=settings.user,
            password=settings.secret(),
            tls_context=_tls(settings) if tls else None,
            keepalive=settings.keepalive_s,
            queue_type=_Incoming,
            will=aiomqtt.Will(self._status, encode({"state": "lost"}), AT_LEAST_ONCE, retain=True),
        )
        self._client._client.manual_ack_set(True)  # there is no public call for it
        self._client._client.on_publish = self._acknowledged  # aiomqtt does not look at the reason
        self._waiting: dict[int, asyncio.Future[str]] = {}  # by the message's number: why it was refused, or ""

    async def __aenter__(self) -> Self:
        try:
            await self._client.__aenter__()
        except aiomqtt.MqttError as error:
            with _cancellable():
                raise LinkLost(str(error)) from error
        try:
            with _cancellable():
                await self._subscribe()
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        return self

    async def _subscribe(self) -> None:
        options = SubscribeOptions(qos=AT_LEAST_ONCE, retainHandling=RETAINED_IF_NEW)
        try:
            codes = await self._client.subscribe([(topic, options) for topic in self.topics.requests])
        except aiomqtt.MqttError as error:
            raise LinkLost(str(error)) from error
        refused = [code for code in codes if getattr(code, "is_failure", False)]
        if refused:
            raise LinkLost(f"the broker refuses the subscriptions: {refused[0]}")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with _cancellable():
                await self._client.__aexit__(kind, error, trace)
        except aiomqtt.MqttError as gone:
            if kind is None:  # else the reason to leave is what matters: a cancellation, above all
                raise LinkLost(str(gone)) from gone
        finally:
            ended = self._client._disconnected
            if ended.done() and not ended.cancelled():
                ended.exception()  # or asyncio would say that nobody looked at it

    async def lost(self) -> None:
        """Wait until the connection breaks."""
        await asyncio.wait([self._client._disconnected])
        raise LinkLost("the connection broke")

    async def messages(self) -> AsyncIterator[Message]:
        """Requests as they come: one at a time, the next when this one was acknowledged."""
        try:
            async for message in self._client.messages:
                properties = message.properties
                payload = message.payload
                yield Message(
                    str(message.topic),
                    bytes(payload) if isinstance(payload, bytes | bytearray) else str(payload or "").encode(),
                    getattr(properties, "ResponseTopic", None),
                    getattr(properties, "CorrelationData", None),
                    message.mid,
                    message.qos,
                )
        except aiomqtt.MqttError as error:
            raise LinkLost(str(error)) from error

    def acknowledge(self, message: Message) -> None:
        """The message is safe; the broker may forget it."""
        self._client._client.ack(message.number, message.qos)  # there is no public call for it

    async def publish(self, topic: str, payload: bytes, correlation: bytes | None = None, *, sure: bool = True) -> None:
        """Publish; with `sure`, until the broker has it. Raises `Refused`."""
        properties = _properties(PacketTypes.PUBLISH)
        properties.ContentType = "application/json"
        if correlation is not None:
            properties.CorrelationData = correlation
        await self._publish(topic, payload, AT_LEAST_ONCE if sure else 0, properties=properties)

    async def announce(self, state: dict[str, object]) -> None:
        """The worker's retained status."""
        await self._publish(self._status, encode(state), AT_LEAST_ONCE, retain=True)

    async def _publish(
        self, topic: str, payload: bytes, qos: int, *, retain: bool = False, properties: Properties | None = None
    ) -> None:
        info = self._client._client.publish(topic, payload, qos, retain, properties)
        if info.rc != 0:
            raise LinkLost(f"cannot publish: {info.rc!r}")
        if qos == 0:
            return
        answer = self._waiting[info.mid] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait([answer, self._client._disconnected], timeout=ANSWER_S, return_when="FIRST_COMPLETED")
        finally:
            del self._waiting[info.mid]
        if not answer.done():
            raise LinkLost("the broker did not acknowledge a message")
        if answer.result():
            raise Refused(f"{answer.result()} (topic {topic})")

    def _acknowledged(self, _client: object, _data: object, number: int, reason: Any, _properties: object) -> None:
        answer = self._waiting.get(number)
        if answer is not None and not answer.done():
            answer.set_result(str(reason) if getattr(reason, "is_failure", False) else "")


def _tls(settings: WorkerSettings) -> ssl.SSLContext:
    """What the connection is trusted by. Raises `BadInput`."""
    try:
        context = ssl.create_default_context(cafile=settings.tls_ca)
        if settings.tls_cert is not None:
            context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise BadInput(f"the certificates (tls_ca, tls_cert, tls_key) cannot be used: {error}") from error
    return context
