"""`longstride tune`: fine-tune an adapter on your own text; count what a model tends to write."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longstride.cli import common as c
from longstride.errors import BadInput

if TYPE_CHECKING:
    from longstride.engine.model import PlainModel
    from longstride.tuning.recipe import Marks, Recipe

Corpora = Annotated[list[Path], typer.Option("--corpus", help="Texts to train on; files and folders, repeatable.")]
Out = Annotated[Path, typer.Option("--out", help="The adapter's folder; a run that was stopped goes on there.")]
Steps = Annotated[int, typer.Option("--steps", help="Windows trained on, one a step.")]
Rate = Annotated[float, typer.Option("--rate", help="Learning rate at its highest.")]
Warmup = Annotated[float, typer.Option("--warmup", help="Share of the steps in which the rate rises to it.")]
Rank = Annotated[int, typer.Option("--rank", help="Rank of the LoRA.")]
Alpha = Annotated[int, typer.Option("--alpha", help="Its scale, times the rank.")]
Dropout = Annotated[float, typer.Option("--dropout", help="Dropout of the LoRA.")]
Modules = Annotated[
    str | None, typer.Option("--modules", help="Names of adapted modules, with commas.", show_default="all linear ones")
]
Frame = Annotated[
    bool, typer.Option("--frame", help="Read texts behind the chat's prompt, as sessions do; else alone.")
]
Seed = Annotated[int, typer.Option("--seed", help="Everything drawn follows from it.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Write a plot of the losses to this file.")]

app = typer.Typer(help="Adapters, and n-grams for drafts, from your own text.", no_args_is_help=True)


@app.callback()
def root() -> None:
    """Adapters, and n-grams for drafts, from your own text."""


@app.command()
def marks(
    corpus: Corpora,
    out: Out,
    layout: Annotated[
        str, typer.Option("--layout", help="What is trained for: a layout as in `eval perplexity`.")
    ] = "end,passages=3",
    acts: Annotated[
        str, typer.Option("--acts", help="Where the adapter acts: on the segment and what follows it, or everywhere.")
    ] = "segment",
    steps: Steps = 1000,
    rate: Rate = 1e-3,
    warmup: Warmup = 0.1,
    rank: Rank = 16,
    alpha: Alpha = 32,
    dropout: Dropout = 0.05,
    modules: Modules = None,
    mark_ids: Annotated[
        str | None,
        typer.Option(
            "--mark-ids", help="Two token ids for the marks, with a comma.", show_default="two that nothing else uses"
        ),
    ] = None,
    window: Annotated[int, typer.Option("--window", min=1, help="Tokens of text before the first target.")] = 368,
    strides: Annotated[int, typer.Option("--strides", min=1, help="Strides in a window.")] = 8,
    stride: Annotated[int, typer.Option("--stride", min=1, help="Targets of a stride.")] = 16,
    query_tokens: Annotated[int, typer.Option("--query-tokens", min=1, help="Tokens of a query.")] = 32,
    passage_tokens: Annotated[int, typer.Option("--passage-tokens", min=1, help="Tokens of a passage.")] = 128,
    chance: Annotated[float, typer.Option("--chance", help="Share of strides with passages at random.")] = 0.2,
    distil: Annotated[
        float,
        typer.Option(
            "--distil", help="Share of the loss that is the difference from the base with the passages beside."
        ),
    ] = 0.5,
    frame: Frame = False,
    turns: Annotated[
        float | None,
        typer.Option("--turns", help="Share of windows that end with a question.", show_default="0.3 with --frame"),
    ] = None,
    seed: Seed = 0,
    model: c.ModelName = None,
    device: c.Device = None,
    dtype: c.Dtype = None,
    plot: Plot = None,
) -> None:
    """LoRA and two marks, for passages at the end of the text (FlashBack) or anywhere else."""
    from longstride.tuning.layouts import Layout
    from longstride.tuning.recipe import Recipe
    from longstride.tuning.strides import Shape

    wanted = Layout.parse(layout)
    if acts not in {"segment", "everywhere"}:
        raise BadInput(f"--acts is segment or everywhere, not {acts!r}")
    recipe = Recipe(
        layout=wanted, shape=Shape(window, strides, stride, query_tokens, passage_tokens, wanted.passages),
        acts="segment" if acts == "segment" else "everywhere", steps=steps, rate=rate,
        rank=rank, alpha=alpha, dropout=dropout, modules=tuple(name for name in (modules or "").split(",") if name),
        warmup=warmup, chance=chance, distil=distil, turns=(0.3 if frame else 0.0) if turns is None else turns,
        seed=seed,
    )  # fmt: skip
    train(recipe, corpus, out, (model, device, dtype), mark_ids, plot, frame=frame)


@app.command()
def anchors(
    corpus: Corpora,
    out: Out,
    span: Annotated[
        int, typer.Option("--span", min=2, help="Tokens that an anchor stands for at most; also half and a quarter.")
    ] = 128,
    added: Annotated[
        bool, typer.Option("--added", help="For --window anchors-added: anchors are tokens put behind each span.")
    ] = False,
    recent: Annotated[
        int, typer.Option("--recent", min=0, help="Last tokens that stay whole; in half of the steps none do.")
    ] = 128,
    length: Annotated[int, typer.Option("--length", min=128, help="Tokens of text a step.")] = 1024,
    steps: Steps = 1000,
    rate: Rate = 1e-3,
    warmup: Warmup = 0.1,
    rank: Rank = 16,
    alpha: Alpha = 32,
    dropout: Dropout = 0.05,
    modules: Modules = None,
    distil: Annotated[
        float, typer.Option("--distil", help="Share of the loss that is the difference from the base with all in view.")
    ] = 1.0,
    seed: Seed = 0,
    model: c.ModelName = None,
    device: c.Device = None,
    dtype: c.Dtype = None,
    plot: Plot = None,
) -> None:
    """LoRA for `--window anchors`, of what anchors hold (AnLLM): the model itself asks and answers from it.

    It is trained on texts behind the chat's prompt, and on questions about each, which the model answers by itself
    with all of the text in view.
    """
    from longstride.tuning.layouts import Layout
    from longstride.tuning.recipe import Recipe
    from longstride.tuning.strides import Shape

    first = 64  # where the text is cut into a window and its targets makes no difference here
    recipe = Recipe(
        layout=Layout.parse(f"none,window=anchors{'-added' if added else ''}:{span}:{recent}"),
        shape=Shape(first, 1, length - first, first // 2, first - 1, 1),
        acts="text", steps=steps, rate=rate, rank=rank, alpha=alpha, dropout=dropout, distil=distil,
        modules=tuple(name for name in (modules or "").split(",") if name), warmup=warmup, seed=seed,
    )  # fmt: skip
    train(recipe, corpus, out, (model, device, dtype), None, plot, frame=True)


@app.command()
def ngrams(
    corpus: Annotated[list[Path], typer.Option("--corpus", help="Texts to ask about; files and folders, repeatable.")],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of answers, in all.")] = 200_000,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file.", show_default="where this model's are looked for")
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work", help="Folder for finished answers; a run that was stopped goes on there.", show_default="by --out"
        ),
    ] = None,
    seed: Seed = 0,
    model: c.ModelName = None,
    device: c.Device = None,
    dtype: c.Dtype = None,
) -> None:
    """Count what a model tends to write, for drafts of what no text foretells.

    It answers questions about the texts; what it found likely after each one and two tokens is kept. No text of a
    session is in it. The embedded model comes with such a file.
    """
    from longstride.engine.model import load_model, ngrams_file
    from longstride.tuning.kept import Kept
    from longstride.tuning.ngrams import Answers, counted
    from longstride.tuning.texts import texts

    if out is not None and out.is_dir():
        raise BadInput(f"{out} is a folder; --out names the file to write")
    documents = texts(corpus)
    loaded = c.loaded(load_model, model, device, dtype)
    to = out or ngrams_file(loaded.content)
    answers = Answers(loaded, documents, seed, Kept(work or to.with_suffix(".answers")))
    with Progress(
        TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn(),
        console=c.err, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=tokens)
        taken = answers.take(tokens, lambda count: progress.update(task, completed=min(count, tokens)))
    size = loaded.runner.vocab_size
    found = counted(taken, map(loaded.tokenizer.encode, (d.body for d in documents)), loaded.vocabulary, size)
    found.save(to)
    c.out.print(
        f"{to}: {len(found):,} n-grams of {len(taken):,} answers, {sum(len(a.likely) for a in taken):,} tokens",
        markup=False,
    )


def train(
    recipe: "Recipe",
    corpus: list[Path],
    out: Path,
    base: tuple[str | None, str | None, str | None],
    mark_ids: str | None,
    plot: Path | None,
    *,
    frame: bool,
) -> None:
    """Run a recipe over a corpus, with its bar. `base`: model, device and dtype; `frame`: behind the chat's prompt."""
    from longstride.engine.model import load_model, load_plain
    from longstride.scheduler.settings import SYSTEM
    from longstride.tuning.recipe import Steps
    from longstride.tuning.report import need_matplotlib
    from longstride.tuning.strides import Corpus, Places
    from longstride.tuning.texts import texts
    from longstride.tuning.training import Run
    from longstride.tuning.training import plot as draw
    from longstride.tuning.turns import ANSWER, Turns

    shape, wanted = recipe.shape, recipe.layout
    if plot is not None:
        need_matplotlib()
    documents = texts(corpus)
    plain = c.loaded(load_plain, *base)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(), console=c.err, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("indexing", total=len(documents), told="documents")
        library = Corpus(documents, plain.tokenizer, shape.passage, lambda n: progress.advance(task, n))
        progress.update(task, description="looking for windows", total=None, told="")
        positions = plain.model.config.max_position_embeddings
        rows = shape.span + (wanted.passages + 1) * shape.passage
        if wanted.window:  # anchors may be added, and behind the prompt and the text stand turns
            rows = len(plain.tokenizer.frame(SYSTEM).prompt) + 2 * shape.span + 2 * ANSWER
        if rows > positions:
            raise BadInput(
                f"a window of {shape.window} with its targets and passages passes the model's {positions} positions"
            )
        places = Places(documents, library, shape)
        pair = chosen_marks(plain, mark_ids) if wanted.marks else ((), ())
        around = plain.tokenizer.frame(SYSTEM) if frame else None
        turns = Turns(c.loaded(load_model, *base), around) if wanted.window and around is not None else None
        steps = Steps(recipe, places, pair, around, turns)
        run = Run(plain, recipe, steps, pair, out, manifest(plain, documents))
        progress.update(task, description="training", total=recipe.steps, completed=run.step, told="steps")

        def tell(line: dict[str, float]) -> None:
            told = f"steps, loss {line['loss']:.3f}" + (f" (none {line['none']:.3f})" if "none" in line else "")
            progress.update(task, completed=run.step, told=told)

        run.go(tell)
    if plot is not None:
        draw(run.log, plot)
    last = run.log[-min(len(run.log), 50) :]
    c.out.print(
        f"{out}: {recipe.steps:,} steps, {int(sum(line['targets'] for line in run.log)):,} targets, "
        f"{sum(line['seconds'] for line in run.log):,.0f} s; loss of the last {len(last)} steps "
        f"{sum(line['loss'] for line in last) / len(last):.3f}",
        markup=False,
    )


def chosen_marks(plain: "PlainModel", spelled: str | None) -> "Marks":
    """Two token ids, one for each mark. Raises `BadInput` where the model has none to spare."""
    if spelled is not None:
        ids = [int(part) if part.strip().isdecimal() else -1 for part in spelled.split(",")]
        if len(ids) != 2 or ids[0] == ids[1] or not all(0 <= id_ < plain.model.config.vocab_size for id_ in ids):
            raise BadInput(f"--mark-ids {spelled!r}: write two different token ids of this model, as in 15,16")
        frame = plain.tokenizer.frame("")
        if {*ids} & {*plain.tokenizer.eos, *frame.prompt, *frame.answer, *frame.resume}:
            raise BadInput(f"--mark-ids {spelled!r}: conversations use these tokens; take two that nothing uses")
        return (ids[0],), (ids[1],)
    spare = plain.spare
    if len(spare) < 2:
        raise BadInput("this model has no two tokens that nothing else uses; name two that you never use (--mark-ids)")
    return (spare[-2],), (spare[-1],)


def manifest(plain: "PlainModel", documents: list[Any]) -> dict[str, Any]:
    """What an adapter came from."""
    from longstride.tuning.report import trained_with

    return {
        "base": plain.content,
        "vocabulary": plain.vocabulary,
        "data": [[document.name, document.sha256[:16]] for document in documents],
        **trained_with(plain),
    }
