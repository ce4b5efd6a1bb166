"""`longstride eval`: what comes out, measured."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from longstride.cli import common as c
from longstride.errors import BadInput

if TYPE_CHECKING:
    from longstride.tuning.questions import QuestionSet
    from longstride.tuning.standings import Difference, Row
    from longstride.tuning.systems import Setup, System

WIDTH = 100

app = typer.Typer(help="Measure what comes out: tables, JSON, plots.", no_args_is_help=True)


@app.callback()
def root() -> None:
    """Measure what comes out: tables, JSON, plots."""


@app.command()
def qa(
    sets: Annotated[
        list[str],
        typer.Option(
            "--set",
            help="Questions: NAME=DOCUMENTS.jsonl,QUESTIONS.jsonl, or NAME=QUESTIONS.jsonl that bring their contexts; "
            "repeat for more.",
        ),
    ],
    systems: Annotated[
        str | None,
        typer.Option(
            "--systems",
            help="What is compared, with commas: closed-book, or PLACEMENT:WHEN with beside, end, turn or prepend, and "
            "once, a stride or a policy.",
            show_default="thirteen of them",
        ),
    ] = None,
    model: c.ModelName = None,
    adapter: c.Adapter = None,
    device: c.Device = None,
    dtype: c.Dtype = None,
    documents: Annotated[int | None, typer.Option("--documents", min=1, help="Documents of a set at most.")] = None,
    questions: Annotated[int | None, typer.Option("--questions", min=1, help="Questions of a set at most.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Which documents and questions are chosen.")] = 0,
    context_tokens: Annotated[int, typer.Option("--context-tokens", min=64, help="Context length.")] = 1024,
    passages: Annotated[int, typer.Option("--passages", min=1, max=64, help="Passages in a segment.")] = 3,
    passage_tokens: Annotated[int, typer.Option("--passage-tokens", min=1, help="Tokens of a passage.")] = 128,
    query_tokens: Annotated[int, typer.Option("--query-tokens", min=1, help="Tokens of a query.")] = 32,
    refresh: Annotated[
        int | None,
        typer.Option("--refresh", min=1, help="Text tokens fed again after a segment.", show_default="the placement's"),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens of an answer.")] = 32,
    system: Annotated[
        str | None, typer.Option("--system", help="The system message.", show_default="asks for few words")
    ] = None,
    work: Annotated[
        Path | None, typer.Option("--work", help="A folder for what is finished; a rerun with it goes on.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the tables to this file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a plot to this file.")] = None,
) -> None:
    """Question answering: how good the answers are, whether what they need was in view, and what they cost."""
    from longstride.tuning.questions import load
    from longstride.tuning.systems import DEFAULT, Setup
    from longstride.tuning.systems import systems as named

    setup = Setup(
        context_tokens=context_tokens,
        passages=passages,
        passage_tokens=passage_tokens,
        query_tokens=query_tokens,
        refresh=refresh,
        max_tokens=max_tokens,
        **c.given(system=system, adapter=adapter),
    )
    compared = named(DEFAULT if systems is None else systems)
    loaded = [load(spec) for spec in sets]
    if len({one.name for one in loaded}) < len(loaded):
        raise BadInput("two sets have the same name; give each its own")
    loaded = [one.chosen(documents, questions, seed) for one in loaded]
    if plot is not None:
        from longstride.tuning.report import need_matplotlib

        need_matplotlib()
    options = {"model": model, "device": device, "dtype": dtype}
    c.run(_qa(loaded, compared, setup, seed, options, work, {"json": json, "markdown": markdown, "plot": plot}))


async def _qa(
    sets: "list[QuestionSet]",
    systems: "list[System]",
    setup: "Setup",
    seed: int,
    options: dict[str, Any],
    work: Path | None,
    files: dict[str, Path | None],
) -> None:
    from longstride.tuning import standings
    from longstride.tuning.qa import Evaluation
    from longstride.tuning.report import provenance, write_json, write_text

    with tempfile.TemporaryDirectory(prefix="longstride-eval-") as folder:
        # rows of a text are not worth storing: it is read once and forgotten
        sizes = {"passage_tokens": setup.passage_tokens, "blocks_limit_bytes": 0}
        async with c.Opened(db=Path(folder) / "eval.db", **sizes, **options) as assistant:
            origin = provenance(assistant.model)
            evaluation = Evaluation(assistant, setup, systems, work)
            with _bar() as bar:
                total = len(systems) * sum(len(one.questions) for one in sets)
                task = bar.add_task("opening", total=total)
                parts = await evaluation.run(sets, lambda what, done: bar.update(task, description=what, advance=done))
    rows, differences = standings.rows(parts), standings.differences(parts, systems)
    show(rows, differences)
    told: dict[str, Any] = {}
    for one in sets:
        long = max((row.too_long for row in rows if row.set == one.name), default=0)
        left_out = {**one.left_out, **({"too long for the context": long} if long else {})}
        about = len({question.document for question in one.questions})
        told[one.name] = {"questions": len(one.questions), "documents": about, "left_out": left_out}
        for why, count in left_out.items():
            c.err.print(f"{one.name}: questions left out: {count} {why}", markup=False, style="dim")
    if (path := files["json"]) is not None:
        data = {
            "provenance": origin,
            "setup": vars(setup),
            "seed": seed,
            "sets": told,
            "rows": [standings.to_dict(row) for row in rows],
            "differences": [standings.to_dict(one) for one in differences],
            "parts": [{**vars(part), "records": [vars(record) for record in part.records]} for part in parts],
        }
        write_json(path, data)
    if (path := files["markdown"]) is not None:
        settings = {**origin, **{name: value for name, value in vars(setup).items() if name != "system"}, "seed": seed}
        write_text(path, standings.as_markdown(rows, differences, settings))
    if (path := files["plot"]) is not None:
        standings.plot(rows, path)


def show(rows: "list[Row]", differences: "list[Difference]") -> None:
    """What matters most of both tables, set by set, on standard output."""
    from longstride.tuning import standings

    for name in dict.fromkeys(row.set for row in rows):
        asked = max(row.questions for row in rows if row.set == name)
        _print(
            f"{name}: {asked} questions",
            standings.SHORT_HEADERS,
            [standings.short_cells(row) for row in rows if row.set == name],
        )
        compared = [standings.short_difference_cells(one) for one in differences if one.set == name]
        if compared:
            _print(f"{name}: differences", standings.SHORT_DIFFERENCE_HEADERS, compared)


def _print(title: str, headers: Sequence[str], lines: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for number, header in enumerate(headers):
        table.add_column(header, justify="right" if number else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    Console(width=max(c.out.width, WIDTH)).print(table)  # a pipe is taken to be 80 wide, which cuts columns off


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("answers"),
        TimeRemainingColumn(),
        console=c.err,
        transient=True,
    )
