"""`Unread`: what a session has not read of a file yet."""

import hashlib
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlite_utils import Database as Tables

from longstride.scheduler.core import Also
from longstride.storage.bookmarks import Bookmark, Bookmarks

if TYPE_CHECKING:
    from longstride.scheduler.session import Session


@dataclass(frozen=True)
class Unread:
    """What is left of a text: its token `ids`, and the change that moves the bookmark as they are read.

    `known` says that something of it was read before and is left out; `changed` that something was, but the text begins
    in another way by now, so that all of it counts as unread.
    """

    ids: list[int]
    known: bool
    changed: bool
    also: Also[int]

    def and_also(self, also: Also[int] | None) -> Also[int]:
        """The change that moves the bookmark, with another one."""
        if also is None:
            return self.also

        def both(tables: Tables, read: int) -> None:
            self.also(tables, read)
            also(tables, read)

        return both


def unread(session: "Session", name: str, text: str, *, again: bool = False) -> Unread:
    """What `session` has not read of the `text` called `name`; with `again` all of it. It blocks: not for the loop.

    A text that has grown is read on behind what was read. Raises `StorageError` if the session's bookmarks are damaged.
    """
    encode = session.core.model.tokenizer.encode
    stored = None if again else session.core.bookmarks.get(session.id, name)
    start = min(stored.characters, len(text)) if stored is not None else 0
    ids = encode(text[start:])
    done = stored.tokens if stored is not None else 0
    known = stored is not None and _Marker(text, start, ids).at(done) == stored
    if not known:
        start, done, ids = 0, 0, encode(text) if start else ids
    marker = _Marker(text, start, ids)

    def also(tables: Tables, read: int) -> None:
        Bookmarks.put(tables, session.id, name, marker.at(done + read))

    return Unread(ids[done:], known, stored is not None and not known, also)


class _Marker:
    """Makes the bookmarks of a text whose first `start` characters were read, and `ids` are what follows."""

    def __init__(self, text: str, start: int, ids: list[int]) -> None:
        self.text = text
        self.start = start
        self.packed = array("I", ids).tobytes()

    def at(self, tokens: int) -> Bookmark:
        """The bookmark behind `tokens` of the ids. At the end there are characters only: a text that has grown may have
        other tokens where it ended."""
        whole = 4 * tokens >= len(self.packed)
        characters = len(self.text) if whole else self.start
        digest = hashlib.sha256(self.text[:characters].encode())
        if not whole:
            digest.update(self.packed[: 4 * tokens])
        return Bookmark(characters, 0 if whole else tokens, digest.digest())
