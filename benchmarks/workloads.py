"""Prompts of the kinds that people ask, as token ids: what drafting is measured and tested on."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common import shipped_text
from longstride.engine.tokenizer import Tokenizer
from longstride.scheduler.settings import SYSTEM

LOGS = ("apache", "hdfs", "hpc", "openssh", "spark", "zookeeper")
TOPICS = (
    "a lighthouse keeper who finds a letter",
    "why the sea is salty",
    "a morning in a small bakery",
    "how to learn to play the violin",
    "a dog that is afraid of thunder",
    "what a city could look like in a hundred years",
    "the first snow of the year",
    "an old clock that runs backwards",
)


@dataclass(frozen=True)
class Prompt:
    """A `text` to read and a `question` about it; `ids`: both as the model sees them, up to its first own token."""

    task: str
    name: str
    text: str
    question: str
    ids: list[int]


class Workloads:
    """Prompts from the folder `data` (the evaluation texts); without it, from the chapters that are shipped."""

    def __init__(self, tokenizer: Tokenizer, data: Path | None) -> None:
        self.tokenizer = tokenizer
        self.data = data

    def _about(self, task: str, name: str, text: str, question: str, tokens: int) -> Prompt:
        """A question behind a text cut to `tokens` tokens, spelled as a session spells it."""
        frame = self.tokenizer.frame(SYSTEM)
        body = self.tokenizer.encode(text)[:tokens]
        head = self.tokenizer.encode(f"\n\n{question}" if text else question)
        return Prompt(task, name, self.tokenizer.decode(body), question, [*frame.prompt, *body, *head, *frame.answer])

    def _records(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self._folder / name).read_text(encoding="utf-8").splitlines()]

    @property
    def _folder(self) -> Path:
        if self.data is None:
            raise ValueError("this task needs the folder of evaluation texts")
        return self.data

    def quote(self, count: int, tokens: int = 200, begun: int = 16) -> list[Prompt]:
        """Repeat what was read; the first `begun` tokens of it are given, as small models ramble otherwise."""
        texts = [("alice", shipped_text())]
        if self.data is not None:
            texts = [(d["title"], d["text"]) for d in self._records("qa/squad.docs.jsonl")]
        question = "Copy the text above, word for word."
        prompts = []
        for i in range(count):
            name, text = texts[i % len(texts)]
            ids = self.tokenizer.encode(text)
            at = tokens * (i // len(texts)) % max(1, len(ids) - tokens)
            body = self.tokenizer.decode(ids[at : at + tokens])
            prompt = self._about("quote", f"{name} from token {at}", body, question, tokens)
            prompts.append(replace(prompt, ids=[*prompt.ids, *self.tokenizer.encode(body)[:begun]]))
        return prompts

    def question(self, count: int, tokens: int = 1200, *, quoted: bool = True) -> list[Prompt]:
        """Questions about a text that holds the answer, which is to be quoted or given freely."""
        task = "question, quoting" if quoted else "question"
        more = " Quote the paragraph that says so." if quoted else ""
        if self.data is None:
            asked = ["What did Alice find on the glass table?", "Why did Alice follow the rabbit?"]
            return [self._about(task, q, shipped_text(), q + more, tokens) for q in asked[:count]]
        texts = {d["id"]: d["text"].split("\n\n") for d in self._records("qa/squad.docs.jsonl")}
        records = [record for record in self._records("qa/squad.qa.jsonl") if record["answers"]]
        # one document after the other, then the next question of each
        rank: dict[str, int] = {}
        order = []
        for record in records:
            rank[record["doc_id"]] = rank.get(record["doc_id"], 0) + 1
            order.append(rank[record["doc_id"]])
        prompts = []
        for _, record in sorted(zip(order, records, strict=True), key=lambda pair: pair[0])[:count]:
            at = int(record["paragraph"])
            body = "\n\n".join(texts[record["doc_id"]][max(0, at - 1) : at + 3])
            prompts.append(self._about(task, record["id"], body, record["question"] + more, tokens))
        return prompts

    def summary(self, count: int, tokens: int = 2000) -> list[Prompt]:
        """Summaries of reports and stories."""
        texts = [("alice", shipped_text())]
        if self.data is not None:
            texts = [
                (d["id"], d["text"])
                for name in ("leval/gov_report_summ.docs.jsonl", "summ/squality.docs.jsonl")
                for d in self._records(name)
            ]
        asked = ("Summarize the text.", "Write a summary of the text in five sentences.")
        cuts = [(name, text[at:], q) for at in (0, 9000) for q in asked for name, text in texts]
        return [self._about("summary", f"{name}, {q}", text, q, tokens) for name, text, q in cuts[:count]]

    def log(self, count: int, tokens: int = 1500) -> list[Prompt]:
        """Logs to be continued, as they are."""
        prompts = []
        for i in range(count):
            name, start = LOGS[i % len(LOGS)], 400 * (i // len(LOGS)) % 1600
            text = (self._folder / "streams" / f"log_{name}.txt").read_text(encoding="utf-8", errors="replace")
            ids = self.tokenizer.encode("".join(text.splitlines(keepends=True)[start : start + 400]))[:tokens]
            read = self.tokenizer.decode(ids)
            prompts.append(Prompt("log", f"{name} from line {start}", read, "Continue the log.", ids))
        return prompts

    def free(self, count: int) -> list[Prompt]:
        """Writing with nothing to copy."""
        asked = [f"{kind} about {topic}." for kind in ("Write a short story", "Tell me") for topic in TOPICS]
        return [self._about("free", q, "", q, 0) for q in asked[:count]]

    def all(self, count: int) -> list[Prompt]:
        """`count` prompts of each kind that there are texts for."""
        asked = [*self.question(count), *self.question(count, quoted=False)]
        logs = self.log(count) if self.data is not None else []
        return [*self.quote(count), *asked, *self.summary(count), *logs, *self.free(count)]
