"""`longstride eval perplexity`: the grid of layouts over sets of text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longstride.cli import common as c
from longstride.errors import BadInput

if TYPE_CHECKING:
    from longstride.engine.adapter import Adapter
    from longstride.engine.model import Model
    from longstride.tuning.layouts import Layout, Scorer
    from longstride.tuning.perplexity import Cell
    from longstride.tuning.strides import Corpus, Shape
    from longstride.tuning.texts import Text

Layouts = Annotated[
    list[str] | None,
    typer.Option(
        "--layout",
        help="Where passages stand: none, prepend, end, turn or beside, with options as in beside,passages=3,refresh=64"
        " (also source=found|chance|oracle, marks=true|false, every=STRIDES, adapter=NAME); repeat for more.",
        show_default="eleven of them",
    ),
]


def run(
    sets: Annotated[
        list[str], typer.Option("--set", help="Texts: NAME=PATH[,PATH...] of files and folders; repeat for more.")
    ],
    corpus: Annotated[
        list[Path] | None, typer.Option("--corpus", help="Documents to retrieve from, beside each text's own past.")
    ] = None,
    layouts: Layouts = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="NAME=FOLDER of an adapter that layouts name; repeat for more."),
    ] = None,
    windows: Annotated[
        list[int] | None,
        typer.Option(
            "--window", min=1, help="Tokens of text before the first target; repeat for more.", show_default="368"
        ),
    ] = None,
    targets: Annotated[int, typer.Option("--targets", min=1, help="Targets of a set, rounded up to windows.")] = 1000,
    strides: Annotated[int, typer.Option("--strides", min=1, help="Strides in a window.")] = 8,
    stride: Annotated[int, typer.Option("--stride", min=1, help="Targets of a stride.")] = 16,
    query_tokens: Annotated[int, typer.Option("--query-tokens", min=1, help="Tokens of a query.")] = 32,
    passage_tokens: Annotated[int, typer.Option("--passage-tokens", min=1, help="Tokens of a passage.")] = 128,
    frame: Annotated[
        bool, typer.Option("--frame", help="Read texts behind the chat's prompt, as sessions do; else alone.")
    ] = False,
    bos: Annotated[bool, typer.Option("--bos", help="Begin texts with the model's first token.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Which windows are drawn.")] = 0,
    model: c.ModelName = None,
    device: c.Device = None,
    dtype: c.Dtype = None,
    work: Annotated[
        Path | None, typer.Option("--work", help="A folder for what is finished; a rerun with it goes on.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the table to this file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a plot to this file.")] = None,
) -> None:
    """Perplexity of texts with passages placed in different ways, with intervals and costs."""
    from longstride.engine.adapter import load_adapter
    from longstride.engine.model import load_model
    from longstride.scheduler.marks import WORDS
    from longstride.scheduler.settings import SYSTEM
    from longstride.tuning.layouts import Layout, Scorer
    from longstride.tuning.perplexity import LAYOUTS
    from longstride.tuning.strides import Corpus, Shape
    from longstride.tuning.texts import texts

    if frame and bos:
        raise BadInput("--frame brings its own first token; leave --bos out")
    asked = list(LAYOUTS) if layouts is None else [Layout.parse(spelled) for spelled in layouts]
    folders = pairs("--adapter", adapters or [])
    unknown = sorted({layout.adapter for layout in asked if layout.adapter} - set(folders))
    if unknown:
        raise BadInput(f"adapter {unknown[0]!r} is named by a layout only; give its folder with --adapter NAME=FOLDER")
    found = {name: texts(map(Path, paths.split(","))) for name, paths in pairs("--set", sets).items()}
    if plot is not None:
        from longstride.tuning.report import need_matplotlib

        need_matplotlib()
    documents = texts(corpus) if corpus else []
    opened = c.loaded(load_model, model, device, dtype)
    tokenizer = opened.tokenizer
    prompt = list(tokenizer.frame(SYSTEM).prompt) if frame else first_token(opened) if bos else []
    marks = tokenizer.encode(WORDS[0]), tokenizer.encode(WORDS[1])
    scorer = Scorer(opened, prompt, marks)
    loaded = {name: load_adapter(folder, opened) for name, folder in folders.items()}
    most = max((layout.passages for layout in asked), default=1)
    shapes = [
        Shape(window, strides, stride, query_tokens, passage_tokens, most) for window in dict.fromkeys(windows or [368])
    ]
    for shape in shapes:
        for layout in asked:
            scorer.check(layout, shape, loaded.get(layout.adapter))
    with bar("passages") as progress:
        task = progress.add_task("indexing documents", total=len(documents) or None)
        library = Corpus(documents, tokenizer, passage_tokens, lambda n: progress.advance(task, n))
    cells: list[Cell] = []
    for shape in shapes:
        for name, of in found.items():
            cells += measure(name, of, library, shape, asked, scorer, loaded, (opened, targets, seed, work))
    settings = {
        "corpus": " ".join(path.name for path in corpus or ()) or "none", "targets": targets, "seed": seed,
        "frame": frame, "bos": bos, "query": query_tokens, "strides": strides, "stride": stride,
        "passage": passage_tokens, **{f"adapter {name}": one.fingerprint[:16] for name, one in loaded.items()},
    }  # fmt: skip
    report(cells, opened, settings, (json, markdown, plot))


def measure(
    name: str,
    texts: "list[Text]",
    library: "Corpus",
    shape: "Shape",
    layouts: "list[Layout]",
    scorer: "Scorer",
    adapters: "dict[str, Adapter]",
    how: "tuple[Model, int, int, Path | None]",
) -> "list[Cell]":
    """One set at one window, with its bar."""
    from longstride.tuning.perplexity import Grid
    from longstride.tuning.strides import windows

    model, targets, seed, work = how
    grid = Grid(model, shape, scorer, adapters, work)
    with bar("windows") as progress:
        task = progress.add_task(f"{name}: retrieving", total=None)
        drawn = windows(texts, library, shape, targets, seed)
        progress.update(task, total=len(drawn) * len(layouts))
        out = []
        for layout in layouts:
            progress.update(task, description=f"{name}, window {shape.window:,}: {layout}")
            out.append(grid.measure(name, drawn, layout, lambda: progress.advance(task)))
    return out


def report(
    cells: "list[Cell]", model: "Model", settings: dict[str, Any], files: tuple[Path | None, Path | None, Path | None]
) -> None:
    """The table on the terminal, and what was asked for in files."""
    from rich.markdown import Markdown

    from longstride.tuning import perplexity
    from longstride.tuning.report import provenance, write_json, write_text

    table = perplexity.table(cells)
    c.out.print(Markdown(table))
    json, markdown, plot = files
    origin = provenance(model)
    if json is not None:
        write_json(json, {"provenance": origin, "settings": settings, "cells": perplexity.data(cells)}, indent=None)
    if markdown is not None:
        told = ", ".join(f"{name} {value}" for name, value in {**origin, **settings}.items())
        write_text(markdown, f"{table}\n{told}\n")
    if plot is not None:
        perplexity.plot(cells, plot)


def pairs(option: str, spelled: list[str]) -> dict[str, str]:
    """Values by name, of NAME=VALUE each. Raises `BadInput`, also for a name that comes twice."""
    found: dict[str, str] = {}
    for one in spelled:
        name, _, value = one.partition("=")
        if not name or not value:
            raise BadInput(f"{option} {one!r}: write NAME=PATH")
        if name in found:
            raise BadInput(f"{option}: {name!r} is given twice; give each its own name")
        found[name] = value
    return found


def first_token(model: "Model") -> list[int]:
    """The token that texts begin with. Raises `BadInput` where the model has none."""
    start = getattr(model.runner.model.config, "bos_token_id", None)
    if start is None:
        raise BadInput(f"model {model.name} has no token that texts begin with; leave --bos out")
    return [int(start)]


def bar(what: str) -> Progress:
    """A progress bar on standard error."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(what)
    return Progress(*columns, TimeRemainingColumn(), console=c.err, transient=True)
