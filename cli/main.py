"""The `longstride` command. An error is one sentence on standard error; exit code 1 is failed, 2 wrong use."""

import os
import sys
from typing import Annotated

import typer

from longstride import __version__
from longstride.errors import Busy, LongstrideError, StorageUnavailable

app = typer.Typer(
    name="longstride",
    help="Read long streams, answer with sources, resume after a restart.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"longstride {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of all commands."""
    del version
    del debug  # `main` looks at it before the line is parsed


def _register() -> None:
    """Commands live one file each; importing them adds them to the app."""
    from longstride.cli import (
        ask,
        chat,
        demo,
        docs,
        doctor,
        evaluate,
        perplexity,
        read,
        sessions,
        summarize,
        tune,
        worker,
    )

    for module in (demo, chat, read, ask, summarize):
        app.command(name=module.__name__.rpartition(".")[2])(module.run)
    app.add_typer(docs.app, name="docs")
    app.add_typer(sessions.app, name="sessions")
    app.add_typer(worker.app, name="worker")
    evaluate.app.command(name="perplexity")(perplexity.run)
    app.add_typer(evaluate.app, name="eval")
    app.add_typer(tune.app, name="tune")
    app.command(name="doctor")(doctor.run)


def main() -> None:
    """The console script."""
    # transformers' own progress bars would mix with ours
    os.environ.setdefault("TQDM_DISABLE", "1")
    debug = "--debug" in sys.argv[1:]
    # --debug is welcome anywhere on the line
    arguments = [*(["--debug"] if debug else []), *(a for a in sys.argv[1:] if a != "--debug")]
    try:
        _register()
        app(arguments)
    except LongstrideError as error:
        if debug:
            raise
        _fail(str(error), 1 if isinstance(error, Busy | StorageUnavailable) else 2)
    except KeyboardInterrupt:
        sys.exit(130)  # as typer does once a command runs
    except Exception as error:
        if debug:
            raise
        _fail(f"{type(error).__name__}: {error} (run again with --debug for the traceback)", 1)


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"longstride: {message}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
