"""`Marks`: what stands left and right of retrieved passages in a segment."""

from collections.abc import Iterable
from dataclasses import dataclass

from longstride.engine.adapter import Adapter
from longstride.engine.context import Placement
from longstride.engine.tokenizer import Tokenizer

WORDS = ("\n[Retrieved passage]\n", "\n[End of the retrieved passage]\n")


@dataclass(frozen=True)
class Marks:
    """Ids left and right of passages: an adapter's own, which are never sampled (`banned`), else plain words, which end
    an answer that spells them (`stops`), else nothing (`beside`, which needs none)."""

    left: tuple[int, ...] = ()
    right: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()
    banned: frozenset[int] = frozenset()

    @classmethod
    def of(cls, tokenizer: Tokenizer, placement: Placement, adapter: Adapter | None) -> "Marks":
        """Those of a session."""
        if adapter is not None and adapter.brings_marks:
            left, right = adapter.marks
            return cls(left, right, banned=frozenset((*left, *right)))
        if placement is Placement.BESIDE:
            return cls()
        left, right = (tuple(tokenizer.encode(word)) for word in WORDS)
        return cls(left, right, stops=tuple(text for m in (left, right) if (text := tokenizer.decode(m).strip())))

    @property
    def size(self) -> int:
        """Tokens that they take."""
        return len(self.left) + len(self.right)

    def around(self, ids: Iterable[int]) -> list[int]:
        """`ids` between them."""
        return [*self.left, *ids, *self.right]
