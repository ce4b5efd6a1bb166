"""`Kept`: finished parts of a long evaluation in a folder, under all that decides them, so that a rerun goes on."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from longstride.tuning.report import write_json

T = TypeVar("T")


class Kept:
    """Without a folder nothing is kept. An identity is whatever JSON can hold; `label` is for people who look."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def _path(self, identity: Any, label: str) -> Path | None:
        if self.folder is None:
            return None
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        name = re.sub(r"[^\w.-]", "-", label)
        return self.folder / f"{name}-{digest[:20]}.json"

    def get(self, identity: Any, label: str, make: Callable[[Any], T]) -> T | None:
        """`make` of what was kept under just this identity; None too for what is damaged, which is then made anew."""
        path = self._path(identity, label)
        if path is None or not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            same = found["identity"] == json.loads(json.dumps(identity))
            return make(found["part"]) if same else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, identity: Any, label: str, part: Any) -> None:
        """Keep `part`, whole or not at all."""
        path = self._path(identity, label)
        if path is not None:
            write_json(path, {"identity": identity, "part": part})
