"""What all sessions of an assistant share."""

from dataclasses import dataclass

from longstride.engine.model import Model
from longstride.engine.pieces import MemoryPieces
from longstride.scheduler.device import Device
from longstride.scheduler.residency import Residency
from longstride.scheduler.retriever import Retriever
from longstride.storage.blocks import Blocks
from longstride.storage.sessions import Sessions


@dataclass(frozen=True)
class Core:
    """One of each, made by `Assistant`."""

    model: Model
    device: Device
    retriever: Retriever
    sessions: Sessions
    blocks: Blocks
    pieces: MemoryPieces
    residency: Residency
    block_tokens: int
