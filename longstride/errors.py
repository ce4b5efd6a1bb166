"""The errors Longstride raises on purpose. Each message says what was wrong, where, and what to do."""


class LongstrideError(Exception):
    """Anything Longstride refuses or fails at; the command line prints it as one sentence."""


class BadInput(LongstrideError):
    """What the caller gave cannot be used: a setting, a file, a name."""


class ContextFull(LongstrideError):
    """The context's limit would be passed; nothing was changed."""


class ModelError(LongstrideError):
    """A model or tokenizer cannot be loaded, or its cache cannot be truncated."""


class StorageError(LongstrideError):
    """The database cannot be opened or written; what was stored before is unharmed."""


class StorageUnavailable(StorageError):
    """The database cannot be used now: the disk is full, the file is locked or read-only. Trying again may help."""


class Busy(LongstrideError):
    """The device's queue is at its bound; try again later."""
