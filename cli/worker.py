"""`longstride worker`: message-queue processing, and what could not be done."""

import logging
import signal
import sys
from pathlib import Path
from typing import Annotated
from unicodedata import category

import typer

from longstride.cli import common as c
from longstride.errors import BadInput
from longstride.storage.jobs import Jobs

app = typer.Typer(help="Work off messages from an MQTT broker.", invoke_without_command=True)
dead = typer.Typer(help="Messages that could not be done.", no_args_is_help=True)
app.add_typer(dead, name="dead")

Number = Annotated[int | None, typer.Argument(help="The message's number, as `list` shows it.")]
All = Annotated[bool, typer.Option("--all", help="All of them.")]


def log_json(level: str) -> None:
    """Log lines as JSON on standard error, each with the message it belongs to."""
    from pythonjsonlogger.json import JsonFormatter

    from longstride.service.worker import request_id

    def named(record: logging.LogRecord) -> bool:
        if not hasattr(record, "request"):
            record.request = request_id.get()
        return True

    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(named)
    fields = ["asctime", "levelname", "name", "message", "request"]
    names = {"asctime": "at", "levelname": "level", "name": "logger"}
    handler.setFormatter(JsonFormatter(fields, rename_fields=names))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


@app.callback()
def run(
    context: typer.Context,
    broker: Annotated[
        str | None,
        typer.Option("--broker", help="mqtt://HOST:PORT, or mqtts:// for TLS.", show_default="mqtt://localhost:1883"),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The broker keeps messages under it.", show_default="worker")
    ] = None,
    topics: Annotated[
        str | None, typer.Option("--topics", help="What all topics begin with.", show_default="longstride")
    ] = None,
    user: Annotated[str | None, typer.Option("--user", help="The broker's user.")] = None,
    password_file: Annotated[
        Path | None, typer.Option("--password-file", help="A file whose first line is the password.")
    ] = None,
    tls_ca: Annotated[Path | None, typer.Option("--tls-ca", help="Certificates to trust.")] = None,
    sessions_at_once: Annotated[
        int | None, typer.Option("--sessions-at-once", help="Sessions worked on side by side.", show_default="8")
    ] = None,
    notes_every: Annotated[int | None, typer.Option("--notes-every", help="A note every N tokens read.")] = None,
    health_file: Annotated[
        Path | None, typer.Option("--health-file", help="A file that is written every few seconds.")
    ] = None,
    metrics_port: Annotated[int | None, typer.Option("--metrics-port", help="Port of the Prometheus metrics.")] = None,
    log_level: Annotated[
        str, typer.Option("--log-level", help="debug, info, warning or error.", show_default="info")
    ] = "info",
    db: c.Db = None,
    model: c.ModelName = None,
    device: c.Device = None,
    dtype: c.Dtype = None,
    placement: c.Placement = None,
    adapter: c.Adapter = None,
    window: c.Window = None,
    context_tokens: c.ContextTokens = None,
) -> None:
    """Read and answer what arrives by MQTT, until SIGTERM or Ctrl-C. docs/operations.md has the topics."""
    if context.invoked_subcommand is not None:
        return
    from longstride.service.settings import load_worker_settings
    from longstride.service.worker import Worker

    if log_level not in ("debug", "info", "warning", "error"):
        raise BadInput(f"--log-level must be debug, info, warning or error, not {log_level!r}")
    settings = load_worker_settings(
        **c.given(
            broker=broker, name=name, topics=topics, user=user, password_file=password_file, tls_ca=tls_ca,
            sessions_at_once=sessions_at_once, notes_every=notes_every, health_file=health_file,
            metrics_port=metrics_port,
        )
    )  # fmt: skip
    settings.secret()  # a password file that cannot be read is refused before the model is loaded
    log_json(log_level)
    session = c.given(placement=placement, adapter=adapter, window=window, context_tokens=context_tokens)

    async def work() -> None:
        import asyncio

        async with c.Opened(db=db, model=model, device=device, dtype=dtype, **session) as assistant:
            worker = Worker(assistant, settings)
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, worker.stop)
            await worker.run()

    c.run(work())


@dead.command("list")
def list_(db: c.Db = None, json: c.Json = False) -> None:
    """List them, oldest first, with the reason."""
    with c.database(db) as database:
        jobs = Jobs(database)
        found, count = jobs.dead(), jobs.dead_count()
    if json:
        names = ("seq", "key", "session", "kind", "topic", "reason", "attempts", "received_at")
        c.print_json([{name: getattr(job, name) for name in names} for job in found])
        return
    for job in found:
        topic = _harmless(job.topic)
        c.out.print(f"{job.seq}  {job.received_at}  {topic}  {len(job.payload):,} bytes: {job.reason}", markup=False)
    if count > len(found):
        c.out.print(f"and {count - len(found):,} more", style="dim")
    if not found:
        c.out.print("none")


@dead.command()
def show(
    number: Annotated[int, typer.Argument(help="The message's number, as `list` shows it.")], db: c.Db = None
) -> None:
    """Show one as it was received, with the reason."""
    with c.database(db) as database:
        found = Jobs(database).dead(number) if number > 0 else []
    if not found:
        raise BadInput(_none_such(number))
    job = found[0]
    c.out.print(f"{_harmless(job.topic)}, received {job.received_at}, {len(job.payload):,} bytes", markup=False)
    c.out.print(f"{job.reason}, {job.attempts} attempts\n", markup=False)
    text = job.payload.decode(errors="replace").replace("\r\n", "\n")
    c.out.print(_harmless(text, keep="\n\t"), markup=False)


def _harmless(text: str, keep: str = "") -> str:
    """A sender chose it; it must not steer the terminal, nor break a line but by what is kept."""
    steering = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join("?" if category(sign) in steering and sign not in keep else sign for sign in text)


def _none_such(number: int) -> str:
    return f"no dead message has the number {number}; `longstride worker dead list` shows them"


def _chosen(number: int | None, all_: bool) -> int | None:
    if (number is None) != all_:
        raise BadInput("name one message by its number (see `longstride worker dead list`), or give --all")
    return number


@dead.command()
def retry(number: Number = None, all_: All = False, db: c.Db = None) -> None:
    """Put one, or all, back in line; a running worker takes them up."""
    chosen = _chosen(number, all_)
    with c.database(db) as database:
        count = database.write(lambda tables: Jobs(database).retry(tables, chosen))
    _say(count, chosen, "will be tried again")


@dead.command()
def drop(number: Number = None, all_: All = False, db: c.Db = None) -> None:
    """Delete one, or all, with their text."""
    chosen = _chosen(number, all_)
    with c.database(db) as database:
        count = database.write(lambda tables: Jobs(database).drop(tables, chosen))
    _say(count, chosen, "dropped")


def _say(count: int, chosen: int | None, what: str) -> None:
    if not count and chosen is not None:
        raise BadInput(_none_such(chosen))
    c.out.print(f"{count} {what}")
