"""The engine without sessions: token ids in, logits out; a passage beside the text, replaced while decoding."""

from longstride.engine.context import Context, Placement
from longstride.engine.model import load_model
from longstride.engine.sequence import Sequence


def main() -> None:
    """Greedy decoding with two passages, one after the other."""
    model = load_model()
    encode, decode = model.tokenizer.encode, model.tokenizer.decode
    context = Context(encode("Facts about a town."), placement=Placement.BESIDE, limit=1024, reserved=64)
    sequence = Sequence(model.runner, context, max_rows=1200)
    context.append(encode(" The old lighthouse of Skerry stands on a cliff. Every visitor is told that its lamp"))
    for passage in (" The lamp of the lighthouse burns green.", " The lamp was made in Lisbon."):
        sequence.rewrite([encode(passage)])
        before = sequence.computed
        for _ in range(8):
            logits = sequence.run(model.runner)
            if logits is None:
                raise RuntimeError("nothing was due")
            context.append([int(logits[-1].argmax())])
        print(f"{decode(context.text)!r}: {sequence.computed - before} rows computed")


if __name__ == "__main__":
    main()
