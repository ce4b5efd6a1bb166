"""`longstride docs`: the documents that retrieval draws on."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from sqlite_utils import Database as Tables

from longstride.cli import common as c
from longstride.errors import BadInput
from longstride.scheduler.convert import path_name, text_of
from longstride.storage.documents import DEFAULT, Documents, check_collection

if TYPE_CHECKING:
    from longstride.scheduler.assistant import Assistant

Owner = Annotated[str, typer.Option("--collection", help="The collection.")]
Only = Annotated[str | None, typer.Option("--collection", help="Only this collection.", show_default="all")]

app = typer.Typer(help="Add, list, search and remove the documents that retrieval draws on.", no_args_is_help=True)


def files_under(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """(the files named, and those in the folders named (hidden ones left out), in order; what does not exist)."""
    found: list[Path] = []
    missing: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.rglob("*"))
            found += [
                p for p in inside if p.is_file() and not any(q.startswith(".") for q in p.relative_to(path).parts)
            ]
        elif path.exists():
            found.append(path)
        else:
            missing.append(path)
    if missing and not found:
        raise BadInput(f"{missing[0]} does not exist")
    return found, missing


async def _add(assistant: "Assistant", path: Path, collection: str) -> tuple[str, str]:
    """(what became of a file: added, changed, known or failed; details)."""
    documents, place = assistant.documents, path_name(path)
    try:
        text = await asyncio.to_thread(text_of, path)
        older = await assistant.database.aread(lambda tables: documents.versions(tables, place, collection))
        passages = await assistant.add_document(path_name(Path(path.name)), text, place, collection)
    except BadInput as error:
        reason = str(error)
        await assistant.database.awrite(lambda tables: documents.fail(tables, place, reason))
        return "failed", reason
    if passages is None:
        same = older == [documents.identity(text)] or not older
        return "known" if same else "changed", f"the same text is in collection {collection!r} already"
    return "changed" if older else "added", f"{passages:,} passages"


@app.command()
def add(
    paths: Annotated[list[Path], typer.Argument(help="Files and folders: txt, Markdown, HTML, PDF.")],
    collection: Owner = DEFAULT,
    db: c.Db = None,
    model: c.ModelName = None,
    json: c.Json = False,
) -> None:
    """Add documents; of a file that has changed the new version takes the old one's place.

    A file that cannot be read is named with its reason (exit code 1); the others go in.
    """
    check_collection(collection)
    files, missing = files_under(paths)
    results: list[dict[str, str]] = []

    def tell(path: Path, status: str, detail: str) -> None:
        results.append({"path": path_name(path), "status": status, "detail": detail})
        if not json:
            (c.err if status == "failed" else c.out).print(f"{status}: {path_name(path)}: {detail}", markup=False)

    async def work() -> None:
        async with c.Opened(db=db, model=model) as assistant:
            for path in missing:
                tell(path, "failed", "does not exist")
            for path in (path.resolve() for path in files):
                tell(path, *await _add(assistant, path, collection))

    c.run(work())
    if json:
        c.print_json(results)
    if any(result["status"] == "failed" for result in results):
        raise typer.Exit(1)


@app.command("list")
def list_(collection: Only = None, db: c.Db = None, json: c.Json = False) -> None:
    """List documents with their collections, and files that could not be added."""
    with c.database(db) as database:
        documents = Documents(database)
        found, failures = documents.all(collection), documents.failures()
    if json:
        failed = [{"path": path, "reason": reason, "at": at} for path, reason, at in failures]
        c.print_json({"documents": [vars(d) for d in found], "failures": failed})
        return
    for d in found:
        size = f"{d.characters:,} characters, {d.passages:,} passages"
        c.out.print(f"{d.id[:12]}  {d.collection}  {d.path or d.name}  {size}", markup=False)
    for path, reason, _ in failures:
        c.out.print(f"failed        {path}: {reason}", markup=False, style="yellow")
    if not found and not failures:
        c.out.print("no documents yet; add some with: longstride docs add FILE...")


@app.command()
def search(
    words: Annotated[list[str], typer.Argument(help="Words to look for.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Passages to show.")] = 5,
    collection: Only = None,
    db: c.Db = None,
    json: c.Json = False,
) -> None:
    """Show the passages that retrieval would bring for WORDS."""
    from longstride.scheduler.retriever import Retriever

    collections = None if collection is None else [collection]
    with c.database(db) as database:
        found = c.run(Retriever(Documents(database)).search(" ".join(words), count, collections=collections))
    if json:
        c.print_json([vars(p) for p in found])
    elif found:
        c.print_sources(found)
    else:
        c.out.print("nothing found")


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="A document's path or name, or the beginning of its id.")],
    collection: Owner = DEFAULT,
    db: c.Db = None,
) -> None:
    """Remove a document from a collection; when it is in no other, its text and passages go.

    A file that could not be added is forgotten.
    """
    path = path_name(Path(name).resolve())
    with c.database(db) as database:
        documents = Documents(database)
        known = [failed for failed, _, _ in documents.failures()]
        here = [d for d in documents.all(collection) if d.path == path or name in (d.path, d.name)]
        failed = [failure for failure in known if failure == path]
        if not here and not failed:
            failed = [failure for failure in known if Path(failure).name == name]
        found = None
        if here or len(failed) != 1:
            found = documents.find(path if any(d.path == path for d in here) else name, collection)

        def change(tables: Tables) -> None:
            if found is not None:
                documents.remove(tables, found.id, collection)
            for failure in failed:
                documents.forget(tables, failure)

        database.write(change)
    if found is not None:
        c.out.print(f"removed {found.name} ({found.passages:,} passages) from collection {collection}", markup=False)
    for failure in failed:
        c.out.print(f"forgot {failure}, which could not be added", markup=False)
