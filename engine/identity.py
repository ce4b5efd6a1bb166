"""Identity of stored KV: rows are named by all that decided their values, never by a display name.

A chain id covers the model's fingerprint (with that of the adapter that acted on the rows), everything before (the
parent's id), the token ids and their positions. Rows under one id were computed seeing exactly the parent chain and,
causally, themselves. Stream blocks chain on one another; a passage beside the text chains on the sink.
"""

import hashlib
from array import array
from collections.abc import Sequence

FORMAT = b"longstride-kv-1"


def chain_id(fingerprint: str, parent: bytes, ids: Sequence[int], positions: Sequence[int]) -> bytes:
    """32-byte id of rows `ids` at `positions` behind `parent` (b"" at the start); a hash of tagged, sized fields."""
    digest = hashlib.sha256()
    for tag, value in (
        (b"format", FORMAT),
        (b"fingerprint", fingerprint.encode()),
        (b"parent", parent),
        (b"ids", pack_ids(ids)),
        (b"positions", pack_ids(positions)),
    ):
        digest.update(len(tag).to_bytes(1, "little") + tag + len(value).to_bytes(8, "little") + value)
    return digest.digest()


def adapted(fingerprint: str, *others: str) -> str:
    """The fingerprint of a model with what else decides its rows (an adapter, a window); its own where all are ""."""
    for other in others:
        if other:
            fingerprint = hashlib.sha256(f"{fingerprint}\0{other}".encode()).hexdigest()
    return fingerprint


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as little-endian 32-bit numbers."""
    packed = array("I", ids)
    if packed.itemsize != 4:  # pragma: no cover - no supported platform has it otherwise
        raise RuntimeError("this platform's unsigned int is not 32 bits")
    return packed.tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """The inverse of `pack_ids`. Raises `ValueError` if the length is not a multiple of 4."""
    unpacked = array("I")
    unpacked.frombytes(data)
    return unpacked.tolist()
