"""`WorkerLock`: one worker a database."""

from types import TracebackType

from filelock import FileLock, Timeout

from longstride.errors import StorageError
from longstride.storage.database import Database


class WorkerLock:
    """Held while a worker works off a database's messages.

    The operating system lets go of it when the process dies, so a worker that was killed keeps nobody waiting, and no
    clock decides who may work.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self._lock = FileLock(f"{database.path.resolve()}-worker", mode=0o600)  # the same through any link

    def __enter__(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise StorageError(
                f"another worker is at work on {self.database.path}; stop it first, or give this one a database of "
                "its own (--db)"
            ) from None
        except OSError as error:
            raise StorageError(f"the lock file {self._lock.lock_file} cannot be used: {error.strerror}") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
