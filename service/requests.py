"""What may be asked by message, and the words of the replies."""

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from longstride.errors import BadInput
from longstride.scheduler.answer import Answer
from longstride.storage.jobs import Job, Reply

Id = Annotated[str, Field(min_length=1, max_length=200)]
NAME_LIMIT = 200
TOPIC_LIMIT, LEVELS_LIMIT = 1000, 200  # Mosquitto takes no more levels


class Request(BaseModel):
    """A message's JSON. `id`: the sender's name for it, given back in the reply; makes repetitions known."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Id | None = None


class Feed(Request):
    """`.../feed`: read on. A newline follows the text, unless it ends in one."""

    text: str = Field(min_length=1)
    notes_every: int | None = Field(default=None, ge=16)


class Ask(Request):
    """`.../ask`: answer a question. `stream`: publish the text on `.../stream` as it comes."""

    question: str = Field(min_length=1)
    stream: bool = False
    remember: bool = False
    policy: Literal["tokens", "sentence", "confidence", "drift", "never"] | None = None
    stride: int | None = Field(default=None, ge=1)
    query_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    drafting: Literal["off", "lookup", "tree"] | None = None

    OWN: ClassVar[set[str]] = {"id", "question", "stream", "remember"}

    def changes(self) -> dict[str, Any]:
        """Settings for this answer."""
        return self.model_dump(exclude=self.OWN, exclude_none=True)


class Close(Request):
    """`.../close`: let go of the session's memory. `remove`: and of all its text."""

    remove: bool = False


KINDS: dict[str, type[Request]] = {"feed": Feed, "ask": Ask, "close": Close}


@dataclass(frozen=True)
class Topics:
    """The topics, all beginning with `root`."""

    root: str

    @property
    def requests(self) -> list[str]:
        """What the worker subscribes to."""
        return [f"{self.root}/sessions/+/{kind}" for kind in KINDS]

    def split(self, topic: str) -> tuple[str, str]:
        """(session, kind) of a request's topic."""
        session, _, kind = topic.removeprefix(f"{self.root}/sessions/").rpartition("/")
        return session, kind

    def of(self, session: str, what: str) -> str:
        """A session's topic: answers, notes or stream."""
        return f"{self.root}/sessions/{session}/{what}"

    @property
    def dead(self) -> str:
        """Where it is told what could not be done."""
        return f"{self.root}/dead"

    def status(self, worker: str) -> str:
        """A worker's retained status."""
        return f"{self.root}/workers/{worker}/status"

    def may_reply(self, topic: str) -> bool:
        """Whether a reply may go there: it must be a topic, and no request must come of it."""
        # nobody gets at others' topics, or at the worker's own, through the worker's rights
        own = [f"{self.root}/{part}" for part in ("sessions", "workers", "dead")]
        private = any(topic == part or topic.startswith(f"{part}/") for part in own)
        sound = 0 < len(topic) <= TOPIC_LIMIT and topic.count("/") < LEVELS_LIMIT and topic[0] != "$"
        return sound and not private and not {"#", "+", "\0"} & set(topic)


def key_of(session: str, kind: str, payload: bytes, correlation: bytes | None) -> str:
    """What makes a message the same as its repetitions: its id, else its correlation data, else all of it."""
    try:
        id_ = json.loads(payload)["id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        id_ = None
    if isinstance(id_, str) and 0 < len(id_) <= NAME_LIMIT and not _lone_surrogates(id_):
        name = f"id {id_}"
    elif correlation:
        name = f"correlation {hashlib.sha256(correlation).hexdigest()}"
    else:
        name = f"sha256 {hashlib.sha256(payload).hexdigest()}"
    return f"{session}/{kind}/{name}"


def _lone_surrogates(text: str) -> bool:
    """JSON can spell what is no text."""
    return any("\ud800" <= c <= "\udfff" for c in text)


def parse(kind: str, payload: bytes) -> Request:
    """The request in a message. Raises `BadInput` with what is wrong, without repeating any of the text."""
    if kind not in KINDS:
        raise BadInput("there are no messages of this kind")
    if not payload:
        raise BadInput("the message is empty")
    try:
        text = payload.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"the message is not UTF-8 text (byte {error.start})") from error
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        if kind == "feed" and not text.lstrip().startswith("{"):
            return Feed(text=text)
        raise BadInput("the message is not JSON") from error
    if not isinstance(data, dict):
        if kind == "feed":  # a line of a log may be a number
            return Feed(text=text)
        raise BadInput("the message is not a JSON object")
    try:
        return KINDS[kind].model_validate_json(text)
    except ValidationError as error:
        raise BadInput(_sentence(error, sorted(KINDS[kind].model_fields))) from error


def received(
    topics: Topics, topic: str, payload: bytes, reply_topic: str | None, correlation: bytes | None, *, limit_bytes: int
) -> tuple[Job, str]:
    """A message as it is stored, and what is wrong with it: nothing, or a sentence."""
    session, kind = topics.split(topic)
    problem = ""
    if reply_topic is not None and not topics.may_reply(reply_topic):
        problem, reply_topic = f"the response topic cannot be published to, or is one under {topics.root}/", None
    if len(payload) > limit_bytes:
        problem = f"the message has {len(payload)} bytes; {limit_bytes} are allowed"
        # not looked into: what is large is large to parse
        name = hashlib.sha256(correlation or payload).hexdigest()
        return Job(f"{session}/{kind}/large {name}", session, kind, topic, b"", reply_topic, correlation), problem
    key = key_of(session, kind, payload, correlation)
    try:
        parse(kind, payload)
    except BadInput as error:
        problem = problem or str(error)
    return Job(key, session, kind, topic, payload, reply_topic, correlation), problem


def _sentence(error: ValidationError, known: list[str]) -> str:
    """What is wrong, field by field; of the message itself only names of fields that exist."""
    parts = []
    for item in error.errors(include_input=False, include_url=False)[:5]:
        if item["type"] == "extra_forbidden":
            parts.append(f"there is a field that this kind of message does not have; it has {', '.join(known)}")
        elif item["loc"]:
            parts.append(f"{item['loc'][0]}: {item['msg'][0].lower()}{item['msg'][1:]}")
        else:
            parts.append(f"the message cannot be read: {item['type']}")
    return "; ".join(dict.fromkeys(parts))


def encode(data: dict[str, Any]) -> bytes:
    """A reply's payload."""
    return json.dumps(data, ensure_ascii=False).encode()


def id_of(job: Job) -> str | None:
    """The sender's name for it, if it has one."""
    kind, _, name = job.key.removeprefix(f"{job.session}/{job.kind}/").partition(" ")
    return name if kind == "id" else None


@dataclass(frozen=True)
class Replies:
    """The replies to jobs."""

    topics: Topics

    def _to(self, job: Job, otherwise: str, data: dict[str, Any]) -> Reply:
        head = {"id": id_of(job), "session": job.session}
        topic = job.reply_topic or self.topics.of(job.session, otherwise)
        return Reply(topic, encode({**head, **data}), job.correlation)

    def answer(self, job: Job, answer: Answer) -> Reply:
        """The answer to a question."""
        return self._to(job, "answers", answer.to_dict())

    def note(self, job: Job, tokens: int, answer: Answer) -> Reply:
        """A running note, written after `tokens` tokens of the stream."""
        data = {"id": id_of(job), "session": job.session, "tokens": tokens, **answer.to_dict()}
        return Reply(self.topics.of(job.session, "notes"), encode(data), job.correlation)

    def done(self, job: Job, data: dict[str, Any]) -> list[Reply]:
        """That text was read or a session closed; only said to those who named a topic for it."""
        return [self._to(job, "", data)] if job.reply_topic else []

    def dead(self, job: Job, reason: str) -> list[Reply]:
        """That a message could not be done: to the dead-letter topic, and to whoever waits for a reply."""
        letter = {
            "id": id_of(job), "session": job.session, "kind": job.kind, "topic": job.topic, "key": job.key,
            "reason": reason, "attempts": job.attempts, "received_at": job.received_at,
        }  # fmt: skip
        replies = [Reply(self.topics.dead, encode(letter))]
        if not job.damaged and (job.reply_topic or job.kind == "ask"):
            replies.append(self._to(job, "answers", {"error": reason}))
        return replies
