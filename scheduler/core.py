"""What all sessions of an assistant share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sqlite_utils import Database as Tables

from longstride.engine.model import Model
from longstride.engine.pieces import MemoryPieces
from longstride.scheduler.device import Device
from longstride.scheduler.residency import Residency
from longstride.scheduler.retriever import Retriever
from longstride.storage.blocks import Blocks
from longstride.storage.bookmarks import Bookmarks
from longstride.storage.sessions import Sessions

T = TypeVar("T")
Change = Callable[[Tables], None]  # part of a transaction
Also = Callable[[Tables, T], None]  # the same, told of what else the transaction stores


@dataclass(frozen=True)
class Core:
    """One of each, made by `Assistant`."""

    model: Model
    device: Device
    retriever: Retriever
    sessions: Sessions
    bookmarks: Bookmarks
    blocks: Blocks
    pieces: MemoryPieces
    residency: Residency
    block_tokens: int
