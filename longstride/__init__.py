"""Longstride: a streaming long-document assistant with retrieval on a stride.

The public names are loaded when they are first used, so `longstride.engine` works where only torch and
transformers are installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from longstride.errors import (
    BadInput,
    Busy,
    ContextFull,
    LongstrideError,
    ModelError,
    StorageError,
)

if TYPE_CHECKING:
    from longstride.scheduler.answer import Answer, Piece, ReadReport, Source, Timing, Usage
    from longstride.scheduler.assistant import Assistant
    from longstride.scheduler.session import Session
    from longstride.scheduler.settings import Settings

__version__ = "0.1.0"

_HOMES = {
    "Answer": "scheduler.answer",
    "Assistant": "scheduler.assistant",
    "Piece": "scheduler.answer",
    "ReadReport": "scheduler.answer",
    "Session": "scheduler.session",
    "Settings": "scheduler.settings",
    "Source": "scheduler.answer",
    "Timing": "scheduler.answer",
    "Usage": "scheduler.answer",
}

__all__ = [
    "Answer",
    "Assistant",
    "BadInput",
    "Busy",
    "ContextFull",
    "LongstrideError",
    "ModelError",
    "Piece",
    "ReadReport",
    "Session",
    "Settings",
    "Source",
    "StorageError",
    "Timing",
    "Usage",
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'longstride' has no attribute {name!r}")
    return getattr(import_module(f"longstride.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
