"""Where drafts come from: what this session has seen, looked up by its longest match (Lookahead, arXiv 2312.12728), and
the model's own n-grams.

`History` finds earlier occurrences of the last few tokens; `Drafter` merges what followed them into a tree, most
probable first, and stops where another token would cost more than it promises. What no text foretells the model's own
n-grams may. Probabilities are learned as answers are written: how often a match of a given length was right, drafted or
not, so a probe costs no forward.
"""

import heapq
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from longstride.engine.history import GAP, WINDOW, History, last_hashes
from longstride.engine.ngrams import NONE, NGrams

MOST_NODES = 48
DEEPEST = 32
LEAST = 0.02  # a token less probable than this is never drafted
GAIN = 1.05  # a draft that promises less is not made: looking it up and the first row behind another cost something too
BRANCHING = 1.04  # several branches must promise so much more than the likeliest one: on logs less does not pay
FIRST = 2  # where equal evidence names several tokens, the first, of the latest place, counts twice: logs gain by it
LEAD = 4  # a match this long is followed in step from then on
LEADS = 2
DIFFERENCES = 4  # after so many, with no `SETTLED` tokens alike between them, it is given up
SETTLED = 8


class Rates:
    """How often the next token was one of those that a kind of evidence named, against how often it promised so.

    Evidence is an exact match of some length, or a text followed in step since its last difference (`Lead`); a class
    is such a kind with a range of lengths. One more is the model's n-grams, which state chances of their own. Begins
    with a guess, as if seen `WEIGHT` times, and forgets with a memory of `MEMORY` observations, so that it follows the
    text.
    """

    EDGES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # from each to the next
    EXACT = (0.05, 0.1, 0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.95, 0.98)
    STEP = (0.15, 0.65, 0.8, 0.85, 0.85, 0.85, 0.9, 0.9, 0.9, 0.95, 0.98)
    TENDENCY = 0.3  # a log is not written as answers are; where they fit, that is soon found out
    NGRAMS = len(EXACT) + len(STEP)
    WEIGHT = 6.0
    MEMORY = 128.0

    def __init__(self) -> None:
        start = (*self.EXACT, *self.STEP, self.TENDENCY)
        self._right = [self.WEIGHT * rate for rate in start]
        self._seen = [self.WEIGHT] * len(start)
        exact = [
            max(i for i, edge in enumerate(self.EDGES) if edge <= min(n, WINDOW)) for n in range(WINDOW + DEEPEST + 1)
        ]
        self._kinds = exact, [kind + len(self.EDGES) for kind in exact]

    def kinds(self, length: int, count: int, *, step: bool) -> list[int]:
        """The classes of evidence of `length` tokens (up to WINDOW) and of as much more as turns out to be right
        (`count` of them, up to DEEPEST + 1)."""
        return self._kinds[step][length : length + count]

    def __getitem__(self, kind: int) -> float:
        return self._right[kind] / self._seen[kind]

    def observe(self, kind: int, *, right: bool, promised: float = 1.0) -> None:
        """Evidence of this class named the token that came, or did not."""
        keep = 1 - 1 / self.MEMORY
        self._right[kind] = self._right[kind] * keep + right
        self._seen[kind] = self._seen[kind] * keep + promised


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


Place = tuple[list[int], list[int]]  # a continuation, and the class of the evidence for each of its tokens


@dataclass(eq=False, slots=True)
class Node:
    """A drafted token. `probability`: that it and all before it are right; `places`: what continues it; `expected`:
    what may follow it, as (class of evidence, tokens, their chance as the evidence has it), best evidence first."""

    token: int
    parent: "Node | None"
    depth: int
    probability: float
    places: list[Place]
    expected: list[tuple[int, Collection[int], float]] = field(default_factory=list)
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
    """Drafts for one session, from nothing but that session's own texts and what the model writes whatever it reads.

    `read`: the stream. `said`: what was drafted for, questions and answers, the present one's last (after a restart the
    answers alone). `view`: passages in view. `ngrams`: the model's, if it has some. `branches`: whether a token may
    have several successors. Not thread-safe.
    """

    SAID_LIMIT = 1 << 16  # tokens of questions and answers kept; half are dropped when it is passed

    def __init__(self, ngrams: NGrams | None = None, *, branches: bool = True) -> None:
        self.ngrams = ngrams
        self.read = History()
        self.said = History()
        self.view = History()
        self.branches = branches
        self.rates = Rates()
        self.leads: list[Lead] = []
        self._new: list[int] = []
        self._before = NONE  # the token before the last, where a draft begins

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
        """What may follow `tail`: at most `depth` tokens deep (up to DEEPEST) and `most` in all, as many as make the
        expected tokens a second largest, where a forward with so many drafted tokens takes `cost` and brings a token to
        `beside` other texts. A draft without nodes: it does not pay.
        """
        self.said.extend(self._new)
        self._new = []
        depth = min(depth, DEEPEST)
        found: list[Place] = []
        longest: Lead | None = None
        keys = last_hashes(tail)
        for history in (self.view, self.said, self.read):
            places, lengths = history.matches(tail, keys)
            if not len(places):
                continue
            follow = history.continuations(places, depth + 1, live=history is self.said).tolist()
            kinds = [self.rates.kinds(length, depth + 1, step=False) for length in lengths.tolist()]
            found += zip(follow, kinds, strict=True)
            if longest is None or lengths[0] > longest.agreed:
                longest = Lead(history, int(places[0]), int(lengths[0]))
        for lead in self.leads:
            place = np.array([lead.place])
            follow = lead.history.continuations(place, depth + 1, live=lead.history is self.said).tolist()
            found.append((follow[0], self.rates.kinds(min(lead.agreed, WINDOW), depth + 1, step=True)))
        match = 0 if longest is None else longest.agreed
        self._lead(longest)
        self._before = tail[-2] if len(tail) > 1 else NONE
        root = Node(tail[-1], None, 0, 1.0, found)
        taken: list[Node] = []
        waiting: list[tuple[float, int, Node]] = []
        tie = count()
        most = max(0, min(most, MOST_NODES)) if depth > 0 else 0
        costs = [cost(further) for further in range(most + 1)]
        expected = 1.0 + beside
        rate = GAIN * expected / costs[0]  # the best so far, in tokens for what a forward costs
        node = root
        while True:
            for child in self._children(node) if node.depth < depth or node is root else ():
                heapq.heappush(waiting, (-child.probability, next(tie), child))
            if not waiting or len(taken) == most:
                break
            node = heapq.heappop(waiting)[2]
            # the next most probable token: no other is more so, so it may be known that all of them cannot pay
            if node.probability < LEAST or not _pays(node.probability, expected, rate, costs[len(taken) + 1 :]):
                break
            taken.append(node)
            expected += node.probability
            rate = max(rate, expected / costs[len(taken)])
        several, best = _fastest(taken, 1.0 + beside, costs)
        single, branch = _fastest(_likeliest(root, taken), 1.0 + beside, costs)
        if branch and several < BRANCHING * single:
            best = branch
        return Draft(root, ordered(root, best), match)

    def _lead(self, longest: Lead | None) -> None:
        """Follow the longest match from now on, if it is long enough and not followed yet."""
        if longest is None or longest.agreed < LEAD:
            return
        if all(lead.history is not longest.history or lead.place != longest.place for lead in self.leads):
            self.leads = [longest, *self.leads][:LEADS]

    def _children(self, node: Node) -> list[Node]:
        """What may follow `node`: tokens after the longest match share its rate, those after shorter ones what is left
        (as prediction by partial matching does; Cleary and Witten 1984)."""
        depth, rates = node.depth, self.rates
        left = node.probability
        made: dict[int, Node] = {}
        kinds: dict[int, dict[int, list[Place]]] = {}
        for place in node.places:
            token, kind = place[0][depth], place[1][depth]
            if token == GAP:
                continue
            shares = kinds.get(kind)
            if shares is None:
                kinds[kind] = {token: [place]}
            elif token in shares:
                shares[token].append(place)
            else:
                shares[token] = [place]
        for kind in sorted(kinds, key=rates.__getitem__, reverse=True) if len(kinds) > 1 else kinds:
            new: dict[int, list[Place]] = {}
            for token, places in kinds[kind].items():
                if token in made:
                    made[token].places += places
                else:
                    new[token] = places
            if not new:
                continue
            votes = [len(places) * (1 if rank else FIRST) for rank, places in enumerate(new.values())]
            right = left * rates[kind]
            share = right / sum(votes)
            node.expected.append((kind, new.keys(), 1.0))
            for (token, places), vote in zip(new.items(), votes, strict=True):
                made[token] = Node(token, node, depth + 1, share * vote, places)
            left -= right
            if left < LEAST:
                break
        if self.ngrams is not None and left >= LEAST:
            self._tend(node, left, made, self.ngrams)
        if self.branches or not made:
            return list(made.values())
        return [max(made.values(), key=lambda child: child.probability)]

    def _tend(self, node: Node, left: float, made: dict[int, Node], ngrams: NGrams) -> None:
        """Add to what may follow `node` what the model tends to write there, with a share of the probability `left`."""
        before = self._before if node.parent is None else node.parent.token
        named = {token: chance for token, chance in ngrams.after(before, node.token) if token not in made}
        if not named:
            return
        promised = sum(named.values())
        node.expected.append((Rates.NGRAMS, named.keys(), promised))
        share = left * min(self.rates[Rates.NGRAMS], 1 / promised)
        for token, chance in named.items():
            if share * chance >= LEAST:
                made[token] = Node(token, node, node.depth + 1, share * chance, [])

    def observe(self, node: Node, token: int) -> None:
        """`token` followed the text that `node` stands for: learn whose evidence was right."""
        for kind, tokens, promised in node.expected:
            right = token in tokens
            self.rates.observe(kind, right=right, promised=promised)
            if right:
                break


def _pays(probability: float, expected: float, rate: float, costs: Sequence[float]) -> bool:
    """Whether further tokens of at most `probability` each may bring more than `rate`; `costs`: with one more, ..."""
    return any(expected + number * probability > rate * cost for number, cost in enumerate(costs, 1))


def _likeliest(root: Node, taken: list[Node]) -> list[Node]:
    """Of `taken`, the most probable first, those that the likeliest path has: each the first to follow the last."""
    path = [root]
    for node in taken:
        if node.parent is path[-1]:
            path.append(node)
    return path[1:]


def _fastest(nodes: list[Node], expected: float, costs: Sequence[float]) -> tuple[float, list[Node]]:
    """As many of the first of `nodes` as bring most tokens for what a forward costs, and how many; none do where that
    does not pay."""
    rate, size = GAIN * expected / costs[0], 0
    for number, node in enumerate(nodes, 1):
        expected += node.probability
        if expected > rate * costs[number]:
            rate, size = expected / costs[number], number
    return rate, nodes[:size]


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
