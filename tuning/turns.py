"""`Turns`: questions about a text and what the untrained model answers that has all of it in view.

What anchors hold is worth what the model can say from them, so that is what they are trained for: some questions about
the whole text, some about names anywhere in it, and sentences to go on with word by word.
"""

import random
import re
from collections.abc import Sequence as Ids

from longstride.engine.context import Context, Placement
from longstride.engine.model import Model
from longstride.engine.sequence import Sequence
from longstride.engine.tokenizer import Frame, Tokenizer
from longstride.engine.verify import generate

WHOLE = (
    "What is the text about?",
    "Sum up the text in two sentences.",
    "What happens at the beginning of the text?",
    "What happens at the end of the text?",
)
NAMED = ("What does the text say about {}?", "Who or what is {}?", "Where in the text does {} occur, and how?")
QUOTED = 'How does the sentence go on that begins with "{}"?'
NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+(?: [A-Z][a-z]+)*")  # a capital that begins no sentence
SENTENCE = re.compile(r"(?<=[.!?]\s)((?:\S+ ){5})(\S[^.!?]{20,240}[.!?])")
ANSWER = 48  # tokens of an answer at most

Turn = tuple[list[int], list[int]]  # a question with what stands around it, and its answer


class Turns:
    """Draws turns about texts. `model` answers those that the text itself does not."""

    def __init__(self, model: Model, frame: Frame) -> None:
        self.model = model
        self.frame = frame

    def about(self, ids: Ids[int], count: int, rng: random.Random) -> list[Turn]:
        """`count` of them about the text `ids`, which stands behind the frame's prompt; fewer where it is odd."""
        tokenizer = self.model.tokenizer
        text = tokenizer.decode(ids)
        asked = [rng.choice(WHOLE)]
        names = sorted(set(NAME.findall(text)))
        asked += [rng.choice(NAMED).format(name) for name in rng.sample(names, min(len(names), max(0, count - 2)))]
        turns = self._answered(ids, [self._turn(question) for question in asked[:count]])
        sentences = SENTENCE.findall(text)
        if sentences and len(turns) < count:
            begun, rest = rng.choice(sentences)
            turns.append((self._turn(QUOTED.format(begun.strip())), tokenizer.encode(rest)[:ANSWER]))
        return turns

    def _turn(self, question: str) -> list[int]:
        return [*self.model.tokenizer.encode(f"\n\n{question}"), *self.frame.answer]

    def _answered(self, ids: Ids[int], turns: list[list[int]]) -> list[Turn]:
        """`turns` with the model's greedy answers, all of the text in view."""
        tokenizer: Tokenizer = self.model.tokenizer
        limit = len(self.frame.prompt) + len(ids) + max(map(len, turns), default=0) + ANSWER + 1
        context = Context([*self.frame.prompt, *ids], placement=Placement.TURN, limit=limit + 8, reserved=0)
        sequence = Sequence(self.model.runner, context, max_rows=limit + 8)
        sequence.run(self.model.runner)
        banned = sorted(tokenizer.special - tokenizer.eos)
        ending = [i for i in self.frame.resume if i in tokenizer.eos][:1]
        out: list[Turn] = []
        for turn in turns:
            context.begin_turn()
            context.append(turn)
            said = generate(self.model.runner, sequence, ANSWER, ends=tokenizer.eos, banned=banned)
            answer = said.tokens + (ending if said.ended else [])  # that it ends is part of it
            out += [(turn, answer)] if answer else []
            sequence.end_turn(keep=False)
        return out
