"""The texts that are evaluated and trained on, from files of any kind that can be read."""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from longstride.errors import BadInput
from longstride.scheduler.convert import text_of

RECORDS = (".jsonl", ".jsonl.gz")
ARTICLE = re.compile(r"^ = [^=\n]+ = $", re.MULTILINE)


@dataclass(frozen=True)
class Text:
    """One document. `sha256` names its content."""

    name: str
    body: str

    @property
    def sha256(self) -> str:
        """Hash of the text."""
        return hashlib.sha256(self.body.encode()).hexdigest()


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl or .jsonl.gz file. Raises `BadInput` naming the line that is none."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _record(line, f"{path}, line {number}")
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, EOFError) as error:
        raise BadInput(f"{path} is damaged: {error}") from error


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise BadInput(f"{where}: not an object")
    return record


def texts(paths: Iterable[Path]) -> list[Text]:
    """Documents: each record's "text" of a .jsonl(.gz) file, each other file as one; folders are walked.

    Raises `BadInput` for what cannot be read, for a record without text, and when nothing is found.
    """
    found: list[Text] = []
    asked = list(paths)
    for path in asked:
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))
        else:
            files = [path]
        for file in files:
            found += _texts(file)
    if not found:
        raise BadInput(f"no text in {', '.join(map(str, asked)) or 'nothing'}; name files or folders that hold some")
    return found


def _texts(file: Path) -> list[Text]:
    if not file.name.endswith(RECORDS):
        try:
            return _articles(file.name, text_of(file))
        except BadInput as error:
            raise BadInput(f"{file}: {error}") from error
    out = []
    for number, record in enumerate(records(file), 1):
        body = record.get("text")
        if not isinstance(body, str):
            raise BadInput(f'{file}, record {number}: no "text" that is a string')
        if body.strip():
            out.append(Text(str(record.get("id") or record.get("title") or f"{file.name}:{number}"), body))
    return out


def _articles(name: str, body: str) -> list[Text]:
    """The articles of a file in WikiText's form (` = Title = ` before each); any other text whole."""
    starts = [match.start() for match in ARTICLE.finditer(body)]
    if len(starts) < 2:
        return [Text(name, body)]
    cuts = [*([0] if body[: starts[0]].strip() else []), *starts, len(body)]
    return [Text(f"{name}:{a}", body[a:b]) for a, b in pairwise(cuts)]
