"""Which LoRA adapter a session gets, and whether it may."""

from pathlib import Path
from threading import Lock

from longstride.engine.adapter import Adapter, load_adapter, shipped_adapter
from longstride.engine.context import Placement
from longstride.engine.model import Model
from longstride.errors import BadInput
from longstride.scheduler.settings import SessionSettings
from longstride.scheduler.windows import ANCHORS


class Adapters:
    """Adapters by their folders, loaded once and shared, loaded again when their files have changed."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._loading = Lock()
        self._held: dict[Path, tuple[list[tuple[str, int, int]], Adapter]] = {}  # with files' names, sizes and times

    def of(self, settings: SessionSettings) -> Adapter | None:
        """What a session's settings ask for. Blocks. Raises `ModelError`."""
        name = settings.adapter
        # a window that must be trained for goes before a placement
        trained = settings.window if settings.window in ANCHORS else settings.placement
        folder = shipped_adapter(self.model.name, trained) if name == "auto" else Path(name).resolve()
        if name == "none" or folder is None:
            return None
        with self._loading:
            files = sorted(folder.iterdir()) if folder.is_dir() else []
            stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            held = self._held.get(folder)
            if held is None or held[0] != stats:
                held = self._held[folder] = stats, load_adapter(folder, self.model)
            return held[1]


def refresh_of(asked: int | None, placement: Placement, adapter: Adapter | None) -> int:
    """Text tokens that stand behind a segment: as asked for, else as the adapter was trained, else the placement's."""
    if asked is not None:
        return asked
    trained = adapter.refresh if adapter is not None and adapter.placement == placement else None
    return placement.refresh if trained is None else trained


def check_adapter(adapter: Adapter | None, settings: SessionSettings, session: str) -> None:
    """Raises `BadInput` where an adapter was trained for another placement or window than the session's."""
    if adapter is None:
        return
    for name, trained, given in (
        ("placement", adapter.placement if adapter.placement in set(Placement) else "", settings.placement),
        ("window", adapter.window, settings.window),
    ):
        if trained not in {"", given}:
            raise BadInput(
                f"adapter {adapter.name} was trained for {name} {trained}, and session {session!r} has {given}; "
                f"open one with --{name} {trained}, or take --adapter none"
            )
