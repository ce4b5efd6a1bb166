"""Where drafts come from: what this session has seen, looked up by its longest match (Lookahead, arXiv 2312.12728).

`History` finds earlier occurrences of the last few tokens; `Drafter` merges what followed them into a tree, most
probable first, and stops where another token would cost more than it promises. Probabilities are learned as answers
are written: how often a match of a given length was right, drafted or not, so a probe costs no forward.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from longstride.engine.history import GAP, WINDOW, History, hashes

MOST_NODES = 48
LEAST = 0.02  # a token less probable than this is never drafted
GAIN = 1.05  # a draft that promises less is not made: looking it up and the first row behind another cost something too
LEAD = 4  # a match this long is followed in step from then on
LEADS = 2
DIFFERENCES = 4  # after so many, with no `SETTLED` tokens alike between them, it is given up
SETTLED = 8


class Rates:
    """How often the next token was one of those that a kind of evidence named.

    Evidence is an exact match of some length, or a text followed in step since its last difference (`Lead`); a class
    is such a kind with a range of lengths. Begins with a guess, as if seen `WEIGHT` times, and forgets with a memory of
    `MEMORY` observations, so that it follows the text.
    """

    EDGES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # from each to the next
    EXACT = (0.05, 0.1, 0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.95, 0.98)
    STEP = (0.15, 0.65, 0.8, 0.85, 0.85, 0.85, 0.9, 0.9, 0.9, 0.95, 0.98)
    WEIGHT = 6.0
    MEMORY = 128.0

    def __init__(self) -> None:
        start = (*self.EXACT, *self.STEP)
        self._right = [self.WEIGHT * rate for rate in start]
        self._seen = [self.WEIGHT] * len(start)
        self._class = [max(i for i, edge in enumerate(self.EDGES) if edge <= n) for n in range(WINDOW + 1)]

    def kind(self, length: int, *, step: bool) -> int:
        """The class of such evidence."""
        return self._class[min(length, WINDOW)] + (len(self.EDGES) if step else 0)

    def __getitem__(self, kind: int) -> float:
        return self._right[kind] / self._seen[kind]

    def observe(self, kind: int, *, right: bool) -> None:
        """Evidence of this class named the token that came, or did not."""
        keep = 1 - 1 / self.MEMORY
        self._right[kind] = self._right[kind] * keep + right
        self._seen[kind] = self._seen[kind] * keep + 1


@dataclass(eq=False)
class Lead:
    """A place in a text that is followed in step, over differences (another time of day in the same log line):
    tokens agreed on since the last difference, and differences so far."""

    history: History
    place: int
    agreed: int
    differences: int = 0

    def follow(self, token: int) -> bool:
        """The next token of the text being written; whether to go on following."""
        if self.history.ids[self.place] == token:
            self.agreed += 1
            if self.agreed >= SETTLED:
                self.differences = 0
        else:
            self.agreed = 0
            self.differences += 1
        self.place += 1
        return self.place < self.history.size and self.differences <= DIFFERENCES


Place = tuple[int, int, bool]  # which continuation, its length at the root, whether it is followed in step


@dataclass(eq=False)
class Node:
    """A drafted token. `probability`: that it and all before it are right; `expected`: what may follow it, as
    (class of evidence, tokens), best evidence first."""

    token: int
    parent: "Node | None"
    depth: int
    probability: float
    places: list[Place]
    expected: list[tuple[int, set[int]]] = field(default_factory=list)
    children: dict[int, "Node"] = field(default_factory=dict)
    row: int = -1  # in the order of `Draft.nodes`; the root has none

    @property
    def parent_row(self) -> int:
        """The parent's row, -1 for the last token of the text."""
        return -1 if self.parent is None else self.parent.row


@dataclass(eq=False)
class Draft:
    """A tree of tokens that may come next: `root` stands for the last token of the text, `nodes` for the drafted ones,
    parents before children, the most probable path first. `match`: how long the longest match was (up to WINDOW)."""

    root: Node
    nodes: list[Node]
    match: int = 0


class Drafter:
    """Drafts for one session, from nothing but that session's own texts.

    `read`: the stream. `said`: what was drafted for, questions and answers, the present one's last (after a restart the
    answers alone). `view`: passages in view. `branches`: whether a token may have several successors. Not thread-safe.
    """

    SAID_LIMIT = 1 << 16  # tokens of questions and answers kept; half are dropped when it is passed

    def __init__(self, *, branches: bool = True) -> None:
        self.read = History()
        self.said = History()
        self.view = History()
        self.branches = branches
        self.rates = Rates()
        self.leads: list[Lead] = []
        self._new: list[int] = []

    def begin(self, ids: Sequence[int]) -> None:
        """A text begins (a question; a prompt) that what is said from now on continues."""
        if self.said.size > self.SAID_LIMIT:
            self.said = History(self.said.ids[-self.SAID_LIMIT // 2 :].tolist())
        self.said.extend([*self._new, GAP, *ids])
        self._new = []
        self.leads = []
        self.show(())

    def say(self, token: int) -> None:
        """A token was chosen. It is entered before the next draft, with those that came with it."""
        self._new.append(token)
        self.leads = [lead for lead in self.leads if lead.follow(token)]

    def show(self, pieces: Sequence[Sequence[int]]) -> None:
        """These passages are in view now."""
        self.leads = [lead for lead in self.leads if lead.history is not self.view]
        self.view = History([i for piece in pieces for i in (*piece, GAP)])

    def propose(
        self,
        tail: Sequence[int],
        depth: int,
        cost: Callable[[int], float],
        *,
        most: int = MOST_NODES,
        beside: int = 0,
    ) -> Draft:
        """What may follow `tail`: at most `depth` tokens deep and `most` in all, as many as make the expected tokens a
        second largest, where a forward with so many drafted tokens takes `cost` (convex from one on) and brings a token
        to `beside` other texts. A draft without nodes: it does not pay.
        """
        self.said.extend(self._new)
        self._new = []
        found: list[Place] = []
        follow: list[list[int]] = []
        longest: Lead | None = None
        keys = hashes(np.asarray(tail[-WINDOW:], np.int32))
        for history in (self.view, self.said, self.read):
            places, lengths = history.matches(tail, keys)
            if not len(places):
                continue
            found += [(len(follow) + i, length, False) for i, length in enumerate(lengths.tolist())]
            follow += history.continuations(places, depth + 1, live=history is self.said).tolist()
            if longest is None or lengths[0] > longest.agreed:
                longest = Lead(history, int(places[0]), int(lengths[0]))
        for lead in self.leads:
            found.append((len(follow), lead.agreed, True))
            place = np.array([lead.place])
            follow += lead.history.continuations(place, depth + 1, live=lead.history is self.said).tolist()
        match = 0 if longest is None else longest.agreed
        self._lead(longest)
        root = Node(GAP, None, 0, 1.0, found)
        taken: list[Node] = []
        waiting: list[tuple[float, int, Node]] = []
        tie = count()
        expected = 1.0 + beside
        node = root
        while True:
            for child in self._children(node, follow) if node.depth < depth or node is root else ():
                heapq.heappush(waiting, (-child.probability, next(tie), child))
            if not waiting or len(taken) == min(most, MOST_NODES) or depth < 1:
                break
            node = heapq.heappop(waiting)[2]
            # the next most probable token; when it is not worth its cost, none of the others is (what it costs that
            # there is a draft at all is left to the end)
            now, step = cost(len(taken)), cost(max(1, len(taken)) + 1) - cost(max(1, len(taken)))
            if node.probability < LEAST or node.probability * now <= expected * step:
                break
            taken.append(node)
            expected += node.probability
        if expected * cost(0) < GAIN * (1.0 + beside) * cost(len(taken)):
            taken = []
        return Draft(root, ordered(root, taken), match)

    def _lead(self, longest: Lead | None) -> None:
        """Follow the longest match from now on, if it is long enough and not followed yet."""
        if longest is None or longest.agreed < LEAD:
            return
        if all(lead.history is not longest.history or lead.place != longest.place for lead in self.leads):
            self.leads = [longest, *self.leads][:LEADS]

    def _children(self, node: Node, follow: list[list[int]]) -> list[Node]:
        """What may follow `node`: tokens after the longest match share its rate, those after shorter ones what is left
        (as prediction by partial matching does; Cleary and Witten 1984)."""
        left = node.probability
        made: dict[int, Node] = {}
        kinds: dict[int, list[Place]] = {}
        for place in node.places:
            if follow[place[0]][node.depth] != GAP:
                kinds.setdefault(self.rates.kind(place[1] + node.depth, step=place[2]), []).append(place)
        for kind in sorted(kinds, key=self.rates.__getitem__, reverse=True):
            shares: dict[int, list[Place]] = {}
            for place in kinds[kind]:
                token = follow[place[0]][node.depth]
                if token in made:
                    made[token].places.append(place)
                else:
                    shares.setdefault(token, []).append(place)
            if not shares:
                continue
            total = sum(map(len, shares.values()))
            right = left * self.rates[kind]
            node.expected.append((kind, set(shares)))
            for token, places in shares.items():
                made[token] = Node(token, node, node.depth + 1, right * len(places) / total, places)
            left -= right
            if left < LEAST:
                break
        if self.branches or not made:
            return list(made.values())
        return [max(made.values(), key=lambda child: child.probability)]

    def observe(self, node: Node, token: int) -> None:
        """`token` followed the text that `node` stands for: learn whose matches were right."""
        for kind, tokens in node.expected:
            right = token in tokens
            self.rates.observe(kind, right=right)
            if right:
                break


def ordered(root: Node, taken: list[Node]) -> list[Node]:
    """`taken` as a tree below `root`, in depth-first order, children by probability: so the likeliest path is in one
    run of rows and needs no moving when it is accepted."""
    for node in (root, *taken):
        node.children = {}
    for node in taken:  # most probable first, so siblings are in that order
        if node.parent is not None:
            node.parent.children[node.token] = node
    rows: list[Node] = []
    stack = [*reversed(root.children.values())]
    while stack:
        node = stack.pop()
        node.row = len(rows)
        rows.append(node)
        stack += reversed(node.children.values())
    return rows
