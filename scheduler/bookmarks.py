"""`Unread`: what a session has not read of a file yet."""

import hashlib
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlite_utils import Database as Tables

from longstride.errors import StorageError
from longstride.scheduler.core import Also
from longstride.storage.bookmarks import Bookmark

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

    A text that has grown is read on behind what was read. Raises `StorageError` if the session's bookmarks are damaged;
    with `again` those are removed.
    """
    bookmarks = session.core.bookmarks
    if again:
        bookmarks.database.write(lambda tables: bookmarks.mend(tables, session.id))
    before = bookmarks.get(session.id, name)
    stored = None if again else before
    start = min(stored.characters, len(text)) if stored is not None else 0
    marker = _Marker(session, text, start)
    done = stored.tokens if stored is not None else 0
    known = stored is not None and marker.at(done) == stored
    if not known:
        marker, done = _Marker(session, text, 0), 0

    def also(tables: Tables, read: int) -> None:
        nonlocal before
        if bookmarks.at(tables, session.id, name) != before:
            raise StorageError(f"{name} was read into session {session.name!r} by another reader meanwhile; try again")
        before = marker.at(done + read)
        bookmarks.put(tables, session.id, name, before)

    return Unread(marker.ids[done:], known, stored is not None and not known, also)


class _Marker:
    """Makes the bookmarks of a text whose first `start` characters were read; `ids` are what follows."""

    def __init__(self, session: "Session", text: str, start: int) -> None:
        self.rest = text[start:]
        self.ids = session.core.model.tokenizer.encode(self.rest)
        self.start = start
        self._hash = hashlib.sha256(text[:start].encode())
        self._tokens, self._so_far = 0, self._hash.copy()

    def at(self, tokens: int) -> Bookmark:
        """The bookmark behind `tokens` of the ids. At the end there are characters only: a text that has grown may have
        other tokens where it ended."""
        if tokens >= len(self.ids):
            digest = self._hash.copy()
            digest.update(self.rest.encode())
            return Bookmark(self.start + len(self.rest), 0, digest.digest())
        if tokens < self._tokens:
            self._tokens, self._so_far = 0, self._hash.copy()
        self._so_far.update(array("I", self.ids[self._tokens : tokens]).tobytes())
        self._tokens = tokens
        return Bookmark(self.start, tokens, self._so_far.digest())
