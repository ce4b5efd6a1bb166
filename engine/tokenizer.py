"""Text to token ids and back. Ids are the truth of a session; text is only ever derived from them."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

CLOSING = " \t\"'”’)]}»"  # may stand behind a sentence's end
REPLACEMENT = "�"


@dataclass(frozen=True)
class Frame:
    """How a model wants a conversation spelled, in token ids.

    `prompt`, then the stream (in the user's turn), then a question, then `answer`; after the answer `resume` opens
    the user's turn again, for reading on.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    resume: tuple[int, ...]


class Tokenizer(Protocol):
    """What the engine and the sessions need of a tokenizer."""

    @property
    def eos(self) -> frozenset[int]:
        """Ids that end an answer."""

    @property
    def special(self) -> frozenset[int]:
        """Ids that are not text: never sampled (but `eos`), never part of a query."""

    @property
    def spare(self) -> Sequence[int]:
        """Special ids that neither text nor a conversation uses, ascending: room for marks and anchors."""

    @property
    def size(self) -> int:
        """Token ids there are, counted from 0."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text` on its own, without any added special token; special tokens spelled in it stay text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""

    def frame(self, system: str) -> Frame:
        """The conversation's spelling with a system message."""

    def __hash__(self) -> int:
        """One tokenizer is another than one that spells the same."""


class HFTokenizer:
    """A Hugging Face tokenizer behind `Tokenizer`."""

    def __init__(self, tokenizer: Any, eos: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        ends = {*eos, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])}
        self.eos = frozenset(ends)
        self.special = frozenset(tokenizer.all_special_ids) | frozenset(
            id_ for id_, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special
        )

    @property
    def size(self) -> int:
        """Token ids it can give, counted from 0; an embedding may have more rows."""
        return len(self._tokenizer)

    @property
    def spare(self) -> list[int]:
        """Special ids that neither text nor a conversation uses, ascending: room for marks and anchors."""
        kinds = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
        used = {getattr(self._tokenizer, f"{kind}_token_id", None) for kind in kinds}
        frame = self.frame("")
        return sorted(self.special - used - self.eos - {*frame.prompt, *frame.answer, *frame.resume})

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; a document that spells `<|im_end|>` gets ordinary tokens, not the control token."""
        # the flag is state of the shared tokenizer, so no two threads may be in here
        with self._lock:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, exactly as the tokens spell it."""
        text: str = self._tokenizer.decode(
            [i for i in ids if i not in self.special], clean_up_tokenization_spaces=False
        )
        return text

    def frame(self, system: str) -> Frame:
        """From the model's chat template where it has one, else plain text."""
        if getattr(self._tokenizer, "chat_template", None) is None:
            start = self._tokenizer.bos_token_id
            head = [] if start is None else [start]
            return Frame(
                (*head, *self.encode(f"{system}\n\n")),
                tuple(self.encode("\nAnswer:")),
                tuple(self.encode("\n\n")),
            )
        mark = "\x00"
        turns = [
            {"role": "system", "content": system},
            {"role": "user", "content": mark},
            {"role": "assistant", "content": mark},
            {"role": "user", "content": mark},
        ]
        spelled: str = self._tokenizer.apply_chat_template(turns, tokenize=False)
        prompt, answer, resume, _ = spelled.split(mark)
        return Frame(tuple(self._control(prompt)), tuple(self._control(answer)), tuple(self._control(resume)))

    def _control(self, text: str) -> list[int]:
        """Ids of template text, whose control tokens are meant."""
        with self._lock:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
        return ids


@dataclass(frozen=True)
class Punctuation:
    """Ids of tokens that end a sentence, and of those that separate anything (lines too)."""

    ends: frozenset[int]
    separators: frozenset[int]


@lru_cache(maxsize=4)
def punctuation(tokenizer: Tokenizer) -> Punctuation:
    """A tokenizer's punctuation: tokens that are nothing else, in whatever quotes or brackets."""
    texts = [(i, tokenizer.decode([i])) for i in range(tokenizer.size) if i not in tokenizer.special]
    marks = [(i, text, text.strip(CLOSING)) for i, text in texts]
    return Punctuation(
        frozenset(i for i, text, mark in marks if mark and not mark.strip(".?!")),
        frozenset(i for i, text, mark in marks if "\n" in text or (mark and not mark.strip(".?!,;:"))),
    )


class StreamDecoder:
    """Ids in, text out, never half a character and never a stop string.

    Text that might still become a stop string, or whose last character is not complete, is held back. `stopped` is
    set when a stop string was met; what follows it is dropped.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._start = 0  # decoding begins here: one emission back, so that spaces between tokens come out right
        self._read = 0  # ids before this are taken into `_held`
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after `token`."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._release(final=False) if self._take(final=False) else ""

    def flush(self) -> str:
        """What is still held back, at the end of the answer."""
        if self.stopped:
            return ""
        self._take(final=True)
        return self._release(final=True)

    def _take(self, *, final: bool) -> bool:
        """Move the text of new ids into `_held`, if it ends with a whole character (no character has 16 tokens)."""
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        text = self._tokenizer.decode(self._ids[self._start :])
        whole = not text.endswith(REPLACEMENT) or len(self._ids) - self._read > 16
        if not whole and not final:
            return False
        self._held += text[len(before) :] if whole else text[len(before) :].rstrip(REPLACEMENT)
        self._start, self._read = self._read, len(self._ids)
        return True

    def _release(self, *, final: bool) -> str:
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = 0
        if not final:
            for stop in self._stops:
                for size in range(min(len(stop) - 1, len(self._held)), keep, -1):
                    if self._held.endswith(stop[:size]):
                        keep = size
                        break
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out
