"""`longstride sessions`: what is saved, how big, and whether it is sound."""

from typing import Annotated

import typer

from longstride.cli import common as c
from longstride.storage.blocks import Blocks
from longstride.storage.sessions import Sessions
from longstride.storage.verify import verify as everything_wrong

app = typer.Typer(help="List, show, verify and remove saved sessions.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="The session's name.")]


@app.command("list")
def list_(db: c.Db = None, json: c.Json = False) -> None:
    """List sessions, last used first."""
    with c.database(db) as database:
        found = Sessions(database).all()
        blocks, size = Blocks(database, 0).usage()
    if json:
        keys = ("name", "tokens", "model", "updated_at", "sound")
        rows = [{key: getattr(s, key) for key in keys} for s in found]
        c.print_json({"sessions": rows, "blocks": blocks, "blocks_bytes": size})
        return
    for s in found:
        if s.sound:
            c.out.print(f"{s.name}  {s.tokens:,} tokens  {s.model}  {s.updated_at}", markup=False)
        else:
            c.out.print(f"{s.name}  damaged: restore a backup, or remove it", markup=False, style="yellow")
    if not found:
        c.out.print("no sessions yet; start one with: longstride read FILE --session NAME")
    c.out.print(f"{blocks:,} blocks of KV, {size / 1e6:,.1f} MB", style="dim")


@app.command()
def show(name: Name, db: c.Db = None, json: c.Json = False) -> None:
    """Show a session: its settings, and its answers with their sources."""
    with c.database(db) as database:
        sessions = Sessions(database)
        s, *_ = sessions.load(sessions.get(name).id)
        answers = sessions.answers(s.id)
    if json:
        c.print_json({**{k: v for k, v in vars(s).items() if k not in ("prompt", "sound")}, "answers": answers})
        return
    c.out.print(
        f"{s.name}: {s.tokens:,} tokens read with {s.model}, the context begins at token {s.window_start:,}",
        markup=False,
    )
    c.out.print(", ".join(f"{k}={v}" for k, v in s.settings.items() if v is not None), style="dim", markup=False)
    for a in answers:
        c.out.print(f"\n[{a['kind']}, {a['created_at']}] {a['question']}\n{a['text'].strip()}", markup=False)
        for source in a["sources"]:
            c.out.print(
                f"  {source['document']}, characters {source['start']:,}-{source['stop']:,}", style="dim", markup=False
            )


@app.command()
def verify(db: c.Db = None, json: c.Json = False) -> None:
    """Check the file and every session, document and block of KV in it; exit code 1 if anything is unsound."""
    with c.database(db) as database:
        problems = everything_wrong(database)
    if json:
        c.print_json({"sound": not problems, "problems": problems})
    else:
        for problem in problems:
            c.err.print(problem, markup=False)
        if not problems:
            c.out.print("everything is sound")
    if problems:
        raise typer.Exit(1)


@app.command()
def remove(name: Name, db: c.Db = None) -> None:
    """Remove a session with all its text and answers."""
    with c.database(db) as database:
        sessions = Sessions(database)
        s = sessions.get(name)
        database.write(lambda tables: sessions.remove(tables, s.id))
    c.out.print(f"removed {s.name} ({s.tokens:,} tokens)", markup=False)
