"""`StreamMemory`: what a session finds of its own stream: passages for retrieval, texts for drafts."""

from array import array
from collections.abc import Iterable

from longstride.engine.draft import Drafter
from longstride.engine.model import Model
from longstride.scheduler.passages import StreamSplitter
from longstride.scheduler.retriever import StreamIndex
from longstride.storage.sessions import StreamPassage


class StreamMemory:
    """Grows with `stream`, which its session owns. `drafts`: whether it keeps texts for drafts as they are read."""

    def __init__(self, name: str, stream: "array[int]", model: Model, passage_tokens: int, *, drafts: bool) -> None:
        tokenizer = model.tokenizer
        self.stream = stream
        self.index = StreamIndex(name, lambda a, b: tokenizer.decode(stream[a:b]))
        self.texts = Drafter(model.ngrams)
        self._tokenizer = tokenizer
        self._splitter = StreamSplitter(tokenizer, passage_tokens)
        self._drafts = drafts
        self._characters = 0

    def restore(self, passages: list[StreamPassage], answers: Iterable[str]) -> None:
        """Take over what was stored: the stream's passages, and earlier answers for drafts. Blocks."""
        if passages:
            self._splitter.start = passages[-1].stop
            self._characters = passages[-1].last_char
        self.learn(passages, len(self.stream))
        for text in answers:
            self.texts.begin(self._tokenizer.encode(text))

    def new_passages(self) -> list[StreamPassage]:
        """Passages that the stream has completed since the last call, with their places in its text."""
        out = []
        for a, b in self._splitter.take(self.stream):
            size = len(self._tokenizer.decode(self.stream[a:b]))
            out.append(StreamPassage(a, b, self._characters, self._characters + size))
            self._characters += size
        return out

    def learn(self, passages: list[StreamPassage], tokens: int) -> None:
        """Take the stream's new passages into the index and its new tokens into the drafts, up to `tokens`: what is
        being read behind them may be taken back. Blocks."""
        if passages:
            self.index.add([(p.start, p.stop, p.first_char, p.last_char) for p in passages])
        if self._drafts:
            self._catch_up(tokens)

    def _catch_up(self, tokens: int) -> None:
        self.texts.read.extend(self.stream[self.texts.read.size : tokens])

    def drafter(self, drafting: str) -> Drafter | None:
        """What an answer's drafts come from: this session's own texts; None where drafting is off."""
        if drafting == "off":
            return None
        self.texts.branches = drafting == "tree"
        self._catch_up(len(self.stream))  # nothing, unless the session drafts rarely
        return self.texts
