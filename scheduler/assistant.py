"""`Assistant`: a database, a model, a device; opens sessions and keeps documents."""

import asyncio
import sqlite3
from array import array
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from weakref import WeakValueDictionary

from sqlite_utils import Database as Tables

from longstride.engine.embedded import Progress, silent
from longstride.engine.identity import pack_ids, unpack_ids
from longstride.engine.model import Model, load_model
from longstride.engine.pieces import MemoryPieces
from longstride.errors import BadInput
from longstride.scheduler.adapters import Adapters
from longstride.scheduler.core import Change, Core
from longstride.scheduler.device import Device
from longstride.scheduler.passages import split_text
from longstride.scheduler.residency import Residency
from longstride.scheduler.retriever import Passage, Retriever
from longstride.scheduler.session import Session
from longstride.scheduler.settings import SessionSettings, Settings, changed, load_settings
from longstride.scheduler.windows import prepare
from longstride.storage.blocks import Blocks
from longstride.storage.bookmarks import Bookmarks
from longstride.storage.database import Database
from longstride.storage.documents import DEFAULT, Documents, check_collection
from longstride.storage.sessions import Sessions, StoredSession


class Assistant:
    """Made by `Assistant.open`; an async context manager."""

    def __init__(self, settings: Settings, progress: Progress = silent, model: Model | None = None) -> None:
        self.settings = settings
        self._progress = progress
        self._given = model
        self._open: dict[str, Session] = {}
        self._opening: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by name

    @classmethod
    def open(
        cls,
        db: str | Path | None = None,
        *,
        progress: Progress = silent,
        model: str | Model | None = None,
        **settings: Any,
    ) -> Self:
        """An assistant over the database `db`; `settings` as in `Settings`. `model` may be a loaded `Model`.

        Raises `BadInput` for wrong settings here, `ModelError` and `StorageError` on entering.
        """
        if db is not None:
            settings["db"] = db
        if isinstance(model, str):
            settings["model"] = model
        return cls(load_settings(**settings), progress, model if isinstance(model, Model) else None)

    async def __aenter__(self) -> Self:
        settings = self.settings
        self.database = await asyncio.to_thread(Database, settings.db)
        try:
            self.model = await self._load()
        except BaseException:
            self.database.close()
            raise
        self.adapters = Adapters(self.model)
        self.documents = Documents(self.database)
        self.sessions = Sessions(self.database)
        self.blocks = Blocks(self.database, settings.blocks_limit_bytes)
        self.retriever = Retriever(self.documents)
        self.device = Device(self.model.runner, budget_tokens=settings.budget_tokens)
        self.pieces = MemoryPieces(self.model.fingerprint, settings.pieces_limit_bytes)
        self.core = Core(
            self.model,
            self.device,
            self.retriever,
            self.sessions,
            Bookmarks(self.database),
            self.blocks,
            self.pieces,
            Residency(settings.cache_limit_bytes),
            settings.block_tokens,
        )
        return self

    async def _load(self) -> Model:
        if self._given is not None:
            return self._given
        name, device, dtype = self.settings.model, self.settings.device, self.settings.dtype
        return await asyncio.to_thread(load_model, name, device=device, dtype=dtype, progress=self._progress)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Finish the forward and the writes under way, then let go of everything."""
        await asyncio.to_thread(self.device.close)
        self.retriever.close()
        await asyncio.to_thread(self.database.close)
        for name in list(self._open):
            self.close_session(name, "its assistant was closed")

    # --- sessions ---

    async def session(self, name: str, *, create: bool = True, **changes: Any) -> Session:
        """The session `name`: open already, resumed from the database, or (with `create`) new.

        `changes` are settings of this session; those of an existing one are kept otherwise. Raises `BadInput` for an
        unknown session without `create`, for wrong settings and for a session read with another tokenizer.
        """
        if not name.strip() or len(name) > 200 or any(ord(c) < 32 for c in name):
            raise BadInput(f"a session needs a name of 1 to 200 printable characters, not {name!r}")
        async with self._opening.setdefault(name, asyncio.Lock()):
            held = self._open.get(name)
            if held is not None and held.healthy and (not changes or changed(held.settings, changes) == held.settings):
                return held
            stored = await asyncio.to_thread(self.sessions.find, name)
            if stored is None:
                if not create:
                    await asyncio.to_thread(self.sessions.get, name)
                session = await self._create(name, changed(self.settings.for_sessions(), changes))
            else:
                session = await self._resume(stored.id, changes)
            self.close_session(name, "it was opened with other settings")
            self._open[name] = session
            self.core.residency.admit(session.snapshot)
            return session

    async def has_session(self, name: str) -> bool:
        """Whether a session of this name is stored."""
        return await asyncio.to_thread(self.sessions.find, name) is not None

    async def _create(self, name: str, settings: SessionSettings) -> Session:
        data = settings.model_dump(mode="json")
        prompt = pack_ids(self.model.tokenizer.frame(settings.system).prompt)
        row = StoredSession(0, name, self.model.name, self.model.vocabulary, data, prompt, 0, 0, "", "")
        adapter = await asyncio.to_thread(self.adapters.of, settings)
        await asyncio.to_thread(prepare, settings, self.model.tokenizer)
        session = Session(self.core, row, settings, adapter)  # checks the settings before anything is stored
        session.id = await self.database.awrite(
            lambda tables: self.sessions.create(tables, name, self.model.name, self.model.vocabulary, data, prompt)
        )
        return session

    async def _resume(self, session_id: int, changes: dict[str, Any]) -> Session:
        stored, ids, passages = await asyncio.to_thread(self.sessions.load, session_id)
        if stored.vocabulary != self.model.vocabulary:
            raise BadInput(
                f"session {stored.name!r} was read with another tokenizer (model {stored.model}); open it with "
                f"--model {stored.model}, or start a session of another name"
            )
        settings = changed(self.settings.for_sessions(), {**stored.settings, **changes})
        await asyncio.to_thread(prepare, settings, self.model.tokenizer)
        session = Session(self.core, stored, settings, await asyncio.to_thread(self.adapters.of, settings))
        await session.restore(stored, array("I", unpack_ids(ids)), passages)
        if changes:
            data = settings.model_dump(mode="json")
            await self.database.awrite(lambda tables: self.sessions.change(tables, stored.id, data))
        return session

    def close_session(self, name: str, why: str = "it was closed") -> None:
        """Let go of a session's memory, once what it is doing has ended; what is stored of it stays."""
        held = self._open.pop(name, None)
        if held is not None:
            held.close(why)
            self.core.residency.forget(held.snapshot)

    async def remove_session(self, name: str, *, jobs_before: int | None = None, also: Change | None = None) -> None:
        """Delete a session with all its text and messages, and the stored KV that no other session holds.

        `jobs_before`: only messages received before that one; `also` joins the transaction.
        """
        stored = await asyncio.to_thread(self.sessions.get, name)

        def change(tables: Tables) -> None:
            self.sessions.remove(tables, stored.id, jobs_before=jobs_before)
            if also is not None:
                also(tables)

        self.close_session(name, "it was removed")
        await self.database.awrite(change)

    # --- documents ---

    async def add_document(
        self, name: str, text: str, path: str | None = None, collection: str = DEFAULT
    ) -> int | None:
        """Put a document into a collection, for retrieval; returns its passages, or None if the same text is there
        already (it goes by this name and path then). One that was added from the same `path` is an older version of it,
        and goes.

        Raises `BadInput` for a text without words and for a collection that cannot have this name.
        """
        check_collection(collection)
        if not text.strip():
            raise BadInput("the file is empty" if not text else "the file holds no text")
        id_ = self.documents.identity(text)
        if await asyncio.to_thread(self.documents.exists, id_, collection):
            if path is not None and not await asyncio.to_thread(self.documents.stands_at, id_, path, collection):
                await self.database.awrite(lambda t: self.documents.found_at(t, id_, name, path, collection))
            return None
        spans = await asyncio.to_thread(split_text, text, self.model.tokenizer, self.settings.passage_tokens)
        try:
            ids = await self.database.awrite(
                lambda tables: self.documents.add(tables, name, path, text, spans, collection)
            )
        except sqlite3.IntegrityError:
            return None  # another process added the same text a moment ago
        return len(ids)

    async def search(self, query: str, count: int = 5, collections: Collection[str] | None = None) -> list[Passage]:
        """The best passages for `query` of the documents in `collections` (None: in any)."""
        return await self.retriever.search(query, count, collections=collections)
