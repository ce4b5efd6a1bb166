"""`checksum`: what stored values must hash to. SQLite notices damage to its own structure; this notices the rest."""

import hashlib


def checksum(kind: str, *values: object) -> bytes:
    """A hash of values as SQLite gives them, and of lists of rows; `kind` names what they are together.

    Python writes them down: types, sizes and nesting show, and `ascii` is the same in every version.
    """
    return hashlib.sha256(ascii((kind, *values)).encode()).digest()
