"""`longstride summarize`."""

import hashlib
from pathlib import Path
from typing import Annotated

import typer

from longstride.cli import common as c
from longstride.errors import BadInput
from longstride.scheduler.convert import text_of


def run(
    file: Annotated[Path, typer.Argument(help="The file to summarize.")],
    session: Annotated[str | None, typer.Option("--session", "-s", help="Keep the reading as this session.")] = None,
    db: c.Db = None,
    model: c.ModelName = None,
    device: c.Device = None,
    dtype: c.Dtype = None,
    context_tokens: c.ContextTokens = None,
    part_tokens: Annotated[int, typer.Option("--part-tokens", min=64, help="Tokens that a note covers.")] = 2048,
    json: c.Json = False,
) -> None:
    """Running notes, then a summary with sources; in Markdown, or JSON."""
    try:
        text = text_of(file)
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from error

    from longstride.scheduler.summary import summarize

    mark = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]

    async def work() -> None:
        async with c.Opened(db=db, model=model, device=device, dtype=dtype) as assistant:
            # one name a file, so that another file of the same name is not taken for this one
            name = session or f"summary of {file.name[:150]} ({mark})"
            if session is None and await assistant.has_session(name):
                await assistant.remove_session(name)  # an earlier summary of the same file, not the user's own session
            changes = c.given(context_tokens=context_tokens)
            opened = await assistant.session(name, **changes)
            with c.reading_bar() as bar:
                total = len(assistant.model.tokenizer.encode(text))
                task = bar.add_task(file.name, total=total, rate="")
                result = await summarize(
                    opened, text, part_tokens=part_tokens, progress=lambda n: bar.update(task, advance=n)
                )
            if json:
                c.print_json({"file": str(file), "session": name, **result.to_dict()})
                return
            c.out.print(f"# {file.name}\n\n{result.text}\n\n## Notes\n", markup=False)
            for note in result.notes:
                c.out.print(f"- (to token {note.tokens:,}) {' '.join(note.answer.text.split())}", markup=False)
            c.out.print("\n## Sources\n")
            for source in result.sources:
                c.out.print(
                    f"- {source.document}, characters {source.start:,}-{source.stop:,}: "
                    f"{' '.join(source.text.split())[:100]}...",
                    markup=False,
                )

    c.run(work())
