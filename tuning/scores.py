"""How an answer compares with the gold answers. The best over the gold answers counts."""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_WORD = re.compile(r"\w+")
_GOLD_LETTERS = re.compile(r"\(([A-Z])\)")
_LETTERS = (
    re.compile(r"\(([A-Z])\)"),  # (B)
    re.compile(r"^\W*([A-Z])\s*(?:[).:,\n]|$)"),  # B. or B alone, at the beginning
    re.compile(r"(?i:answer|choice|option)\W+(?i:is\W+)?([A-Z])\b"),  # "The answer is a dog" chooses nothing
)
OPPOSITES = ({"yes", "no"}, {"true", "false"})


def first_line(answer: str) -> str:
    """The first line of an answer that is not blank: what exact match and F1 look at."""
    return next((line.strip() for line in answer.splitlines() if line.strip()), "")


def normalised(text: str) -> str:
    """As SQuAD's own script has it: lower case, no punctuation, no articles, single blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(answer: str, gold: Sequence[str]) -> float:
    """1 if the answer's first line is a gold answer."""
    said = normalised(first_line(answer))
    return float(any(said == normalised(one) for one in gold))


def f1(answer: str, gold: Sequence[str]) -> float:
    """Overlap of the words of the answer's first line and of the gold answer: harmonic mean of precision and recall."""
    said = normalised(first_line(answer)).split()
    return _best(lambda one: _overlap(said, normalised(one).split()), gold)


def _overlap(said: list[str], wanted: list[str]) -> float:
    common = sum((Counter(said) & Counter(wanted)).values())
    if not said or not wanted:
        return float(said == wanted)
    return 2 * common / (len(said) + len(wanted))


def contained(text: str, gold: Sequence[str]) -> float:
    """1 if a gold answer stands in the text, as whole words."""
    inside = f" {normalised(text)} "
    return float(any(f" {words} " in inside for one in gold if (words := normalised(one))))


def rouge_l(answer: str, gold: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004) of the whole answer, F with equal weights: its longest common subsequence of words."""
    said = _WORD.findall(answer.lower())
    return _best(lambda one: _rouge(said, _WORD.findall(one.lower())), gold)


def _rouge(said: list[str], wanted: list[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    lengths = [0] * (len(wanted) + 1)
    for word in said:
        diagonal = 0
        for i, other in enumerate(wanted, 1):
            diagonal, lengths[i] = lengths[i], diagonal + 1 if word == other else max(lengths[i], lengths[i - 1])
    return 2 * lengths[-1] / (len(said) + len(wanted))


def exam(answer: str, gold: Sequence[str]) -> float:
    """1 if the answer names the gold choice: its letter, or the first word of a gold answer that has no letter.

    L-Eval writes "True [fact: False]": the bracket is not about the document.
    """
    return float(any(_chosen(answer, one) for one in gold))


def _chosen(answer: str, gold: str) -> bool:
    letters = _GOLD_LETTERS.findall(gold) or re.findall(r"^([A-Z])\b[).:]?\s*$", gold.strip())
    if letters:
        named = [match[1].upper() for way in _LETTERS if (match := way.search(answer))]
        return named[:1] == letters[:1]
    wanted = next(iter(normalised(gold).split()), "")
    words = normalised(answer).split()
    pair = next((pair for pair in OPPOSITES if wanted in pair), None)
    if pair is not None:
        words = [word for word in words if word in pair]
    return bool(wanted) and words[:1] == [wanted]


def is_opposite(gold: Iterable[str]) -> bool:
    """Whether the answer is yes or no, true or false: then no text holds it in so many words."""
    return any(next(iter(normalised(one).split()), "") in pair for one in gold for pair in OPPOSITES)


def _best(score: Callable[[str], float], gold: Sequence[str]) -> float:
    return max(map(score, gold), default=0.0)
