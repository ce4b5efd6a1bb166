"""`NGrams`: what a model tends to write after its last one or two tokens; made once a model, from no session's text.

For what no text foretells. The model's own likely next tokens are what is counted (as token recycling does, arXiv
2408.08696), in answers that `tuning/ngrams.py` has it write.
"""

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from longstride.errors import BadInput, ModelError

NONE = -1  # before the first of a pair
ONE = 255  # how certainty is stored
ABOUT = "longstride"

Ints = npt.NDArray[np.int64]


class NGrams:
    """Read-only; any number of sessions share one. `vocabulary`: that of the model they are of, `Model.vocabulary`;
    `size`: how many token ids it has. `keys` [n]: (one before the last token + 1) * size + the last token, ascending,
    NONE for the one before where a single token is meant. `tokens` [n, k]: what may follow, likeliest first; `chances`
    [n, k]: in 255ths, 0 where there are fewer than k."""

    def __init__(
        self,
        keys: Ints,
        tokens: npt.NDArray[np.integer],
        chances: npt.NDArray[np.uint8],
        *,
        vocabulary: str,
        size: int,
    ) -> None:
        self._keys, self._tokens, self._chances = keys, tokens, chances
        self.vocabulary, self.size = vocabulary, size

    def __len__(self) -> int:
        return len(self._keys)

    def after(self, before: int, last: int) -> list[tuple[int, float]]:
        """What may follow `last`, which stands behind `before` (NONE: nothing does), and how likely it is."""
        for key in ((before + 1) * self.size + last, last) if before != NONE else (last,):
            at = int(self._keys.searchsorted(key))
            if at < len(self._keys) and self._keys[at] == key:
                found = zip(self._tokens[at].tolist(), self._chances[at].tolist(), strict=True)
                return [(token, chance / ONE) for token, chance in found if chance]
        return []

    def save(self, path: Path) -> None:
        """Write to a file (safetensors), whole or not at all."""
        kind = np.uint16 if self.size <= 1 << 16 else np.uint32
        tensors = {"keys": self._keys, "tokens": self._tokens.astype(kind), "chances": self._chances}
        about = {ABOUT: json.dumps({"vocabulary": self.vocabulary, "size": self.size})}  # one: their order is not kept
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_bytes(save(tensors, about))
            scratch.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise BadInput(f"{path} cannot be written: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: Path, vocabulary: str, size: int) -> "NGrams":
        """Raises `ModelError` for a file that is damaged or of a model with another vocabulary or number of ids."""
        try:
            with safe_open(path, "np") as file:
                about = json.loads((file.metadata() or {})[ABOUT])
                keys, tokens, chances = (file.get_tensor(name) for name in ("keys", "tokens", "chances"))
                own = about["vocabulary"], about["size"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{path} holds no n-grams that can be read ({error}); remove it or make it anew"
            ) from error
        if own != (vocabulary, size):
            raise ModelError(f"{path} is of a model with another vocabulary; remove it or make it anew")
        whole = keys.ndim == 1 and tokens.ndim == 2 and tokens.shape == chances.shape == (len(keys), tokens.shape[1])
        whole = whole and keys.dtype.kind == "i" and tokens.dtype.kind == "u" and chances.dtype == np.uint8
        # an id that the model does not have would only be noticed in the middle of an answer
        if not whole or (np.diff(keys) <= 0).any() or (tokens >= size).any():
            raise ModelError(f"{path} is damaged; remove it or make it anew")
        return cls(keys, tokens, chances, vocabulary=vocabulary, size=size)
