"""Sets of questions with their gold answers, recognised by the fields of their records.

- Two files: documents (`id`, `text`) and questions about them (`doc_id`, `question`, `answers`; `paragraph`, counted
  from 0, or `sections`, counted from 1, say which paragraph holds the answer; `answerable`; `metric`).
- One file of questions that bring their contexts (`contexts`: objects with `title` and `text`; `gold`: titles).
- One file of questions with one gold passage each (`passage`, `title`); all of them together are what is searched.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from longstride.errors import BadInput
from longstride.tuning.texts import records

METRICS = ("f1", "exam", "rouge")
BATCH = 50  # questions of a case when all share their documents: what a rerun repeats at most


@dataclass(frozen=True)
class Gold:
    """Where an answer stands: characters of a document, None for the text that is read."""

    document: str | None
    start: int
    stop: int


@dataclass(frozen=True)
class Question:
    """A question. `document`: what it is about; questions about one document resemble each other."""

    id: str
    document: str
    text: str
    answers: tuple[str, ...]
    metric: str = "f1"
    gold: tuple[Gold, ...] = ()


@dataclass(frozen=True)
class Document:
    """What a question is to be answered from."""

    name: str
    text: str


@dataclass(frozen=True)
class Case:
    """Questions for one session: `text` is read as its stream, `documents` are what it may search."""

    name: str
    text: str
    documents: tuple[Document, ...]
    questions: tuple[Question, ...]

    @property
    def sha256(self) -> str:
        """Hash of everything in it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def collection(self) -> str:
        """The name of the collection that holds its documents and no others."""
        return hashlib.sha256(json.dumps([asdict(d) for d in self.documents]).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class QuestionSet:
    """Questions with what they are about. One of the three is filled: `texts` by document, `contexts` by question,
    `passages` for all. `left_out`: how many questions are not asked, and why."""

    name: str
    questions: tuple[Question, ...]
    texts: dict[str, str] = field(default_factory=dict)
    contexts: dict[str, tuple[Document, ...]] = field(default_factory=dict)
    passages: tuple[Document, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)

    def chosen(self, documents: int | None, questions: int | None, seed: int) -> "QuestionSet":
        """At most so many documents and, about those, so many questions; the same for the same seed, and a larger
        choice holds the smaller."""
        kept = _first({q.document for q in self.questions}, documents, seed)
        asked = _first({q.id for q in self.questions if q.document in kept}, questions, seed)
        return replace(self, questions=tuple(q for q in self.questions if q.id in asked))

    def cases(self) -> list[Case]:
        """The questions with what a session needs to be asked them."""
        if self.passages:
            starts = range(0, len(self.questions), BATCH)
            return [Case(f"{i}", "", self.passages, self.questions[i : i + BATCH]) for i in starts]
        if self.contexts:
            return [Case(q.id, "", self.contexts[q.id], (q,)) for q in self.questions]
        by_document: dict[str, list[Question]] = {}
        for question in self.questions:
            by_document.setdefault(question.document, []).append(question)
        return [Case(name, self.texts[name], (), tuple(asked)) for name, asked in by_document.items()]


def _first(names: Iterable[str], count: int | None, seed: int) -> set[str]:
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    return set(ranked[:count])


def load(spec: str) -> QuestionSet:
    """The set `NAME=PATH[,PATH]`. Raises `BadInput` naming file, record and field."""
    name, _, paths = spec.partition("=")
    files = [Path(path) for path in paths.split(",") if path]
    if not re.fullmatch(r"[\w.-]{1,60}", name) or len(files) not in (1, 2):
        raise BadInput(
            f"{spec!r} is no set: write NAME=QUESTIONS.jsonl, or NAME=DOCUMENTS.jsonl,QUESTIONS.jsonl, with a name of "
            "letters, digits, dots, dashes"
        )
    read = [[_Record(file, i, record) for i, record in enumerate(records(file), 1)] for file in files]
    for file, found in zip(files, read, strict=True):
        if not found:
            raise BadInput(f"{file} holds no records")
    if len(read) == 2:
        loaded = _about_documents(name, read)
    elif "contexts" in read[0][0].fields:
        loaded = _with_contexts(name, read[0])
    elif "passage" in read[0][0].fields:
        loaded = _with_passages(name, read[0])
    else:
        raise BadInput(
            f'{files[0]}: its records bring no "contexts" and no "passage"; name the file of documents and the file '
            f"of questions: {name}=DOCUMENTS.jsonl,QUESTIONS.jsonl"
        )
    if not loaded.questions:
        raise BadInput(f"{files[-1]}: no question can be asked ({_reasons(loaded.left_out)})")
    return loaded


def _reasons(left_out: dict[str, int]) -> str:
    return ", ".join(f"{count} {why}" for why, count in left_out.items()) or "there are none"


@dataclass(frozen=True)
class _Record:
    """One record and where it stands, for errors."""

    file: Path
    number: int
    fields: dict[str, Any]

    def wrong(self, what: str) -> BadInput:
        return BadInput(f"{self.file}, record {self.number}: {what}")

    def string(self, name: str) -> str:
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(f'no "{name}" that is a string with text')
        return value

    def id(self, name: str) -> str:
        return str(self.fields.get("id") or f"{name}-{self.number}")

    def strings(self, name: str) -> tuple[str, ...]:
        value = self.fields.get(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(f'no "{name}" that is a list of strings')
        return tuple(value)

    def metric(self) -> str:
        value = self.fields.get("metric", "f1")
        if value not in METRICS:
            raise self.wrong(f'"metric" is {value!r}; it must be one of {", ".join(METRICS)}')
        return str(value)


def _asked(
    name: str, found: list[_Record], make: Callable[[_Record, Question], Question]
) -> tuple[tuple[Question, ...], dict[str, int]]:
    """The questions that have an answer; `make` adds what is special to the kind."""
    out, without, ids = [], 0, set[str]()
    for record in found:
        text, answers = record.string("question"), record.strings("answers")
        answers = tuple(answer for answer in answers if answer.strip())
        if record.fields.get("answerable") is False or not answers:
            without += 1
            continue
        id_ = record.id(name)
        if id_ in ids:  # published sets have such
            id_ = f"{id_}#{record.number}"
        ids.add(id_)
        out.append(make(record, Question(id_, id_, text, answers, record.metric())))
    return tuple(out), ({"unanswerable": without} if without else {})


def _about_documents(name: str, read: list[list[_Record]]) -> QuestionSet:
    documents, found = read if "question" not in read[0][0].fields else read[::-1]
    if "question" in documents[0].fields or "doc_id" not in found[0].fields:
        raise BadInput(
            f'set {name}: one of its two files must hold documents ("id", "text"), the other questions ("doc_id", '
            '"question", "answers")'
        )
    texts: dict[str, str] = {}
    for record in documents:
        if (id_ := record.string("id")) in texts:
            raise record.wrong(f'"id" {id_!r} was there before')
        texts[id_] = record.string("text")

    def make(record: _Record, question: Question) -> Question:
        document = record.string("doc_id")
        if document not in texts:
            raise record.wrong(f'"doc_id" {document!r} is no document of {documents[0].file}')
        return replace(question, document=document, gold=_paragraphs(record, texts[document]))

    questions, left_out = _asked(name, found, make)
    return QuestionSet(name, questions, texts=texts, left_out=left_out)


def _paragraphs(record: _Record, text: str) -> tuple[Gold, ...]:
    """The paragraphs that hold the answer, as spans of the text (which joins them by blank lines)."""
    if (first := record.fields.get("paragraph")) is not None:
        numbers = [first]
    elif (sections := record.fields.get("sections")) is not None:
        try:
            numbers = [int(part) - 1 for part in str(sections).split(",")]
        except ValueError:
            raise record.wrong(f'"sections" is {sections!r}; it must be numbers, such as 3 or 3,4') from None
    else:
        return ()
    spans, at = [], 0
    for paragraph in text.split("\n\n"):
        spans.append(Gold(None, at, at + len(paragraph)))
        at += len(paragraph) + 2
    if not all(isinstance(number, int) and 0 <= number < len(spans) for number in numbers):
        which = "paragraph" if first is not None else "sections"
        raise record.wrong(f'"{which}" is {record.fields[which]!r}, but its document has {len(spans)} paragraphs')
    return tuple(spans[number] for number in numbers)


def _with_contexts(name: str, found: list[_Record]) -> QuestionSet:
    contexts: dict[str, tuple[Document, ...]] = {}

    def make(record: _Record, question: Question) -> Question:
        given = record.fields.get("contexts")
        if not isinstance(given, list) or not given:
            raise record.wrong('no "contexts" that is a list of objects')
        documents = []
        for item in given:
            if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("title", "text")):
                raise record.wrong('an item of "contexts" is no object with strings "title" and "text"')
            if not item["text"].strip():
                raise record.wrong(f'the "text" of {item["title"]!r} in "contexts" is empty')
            documents.append(Document(item["title"], f"{item['title']}\n{item['text']}"))
        sizes = {document.name: len(document.text) for document in documents}
        gold = record.strings("gold")
        if lost := [title for title in gold if title not in sizes]:
            raise record.wrong(f'"gold" names {lost[0]!r}, which is no title in "contexts"')
        contexts[question.id] = tuple(documents)
        return replace(question, gold=tuple(Gold(title, 0, sizes[title]) for title in gold))

    questions, left_out = _asked(name, found, make)
    return QuestionSet(name, questions, contexts=contexts, left_out=left_out)


def _with_passages(name: str, found: list[_Record]) -> QuestionSet:
    documents: dict[str, Document] = {}  # by text: the same passage is one document
    for record in found:
        text = f"{record.fields.get('title') or ''}\n{record.string('passage')}".strip()
        documents.setdefault(text, Document(record.id(name), text))

    def make(record: _Record, question: Question) -> Question:
        text = f"{record.fields.get('title') or ''}\n{record.string('passage')}".strip()
        document = documents[text].name
        return replace(question, document=document, gold=(Gold(document, 0, len(text)),))

    questions, left_out = _asked(name, found, make)
    return QuestionSet(name, questions, passages=tuple(documents.values()), left_out=left_out)
