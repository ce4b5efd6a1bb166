"""`longstride ask`."""

from typing import Annotated

import typer

from longstride.cli import common as c


def run(
    question: Annotated[str, typer.Argument(help="The question.")],
    session: c.SessionName,
    db: c.Db = None,
    model: c.ModelName = None,
    device: c.Device = None,
    dtype: c.Dtype = None,
    stride: c.Stride = None,
    policy: c.Policy = None,
    max_tokens: c.MaxTokens = None,
    temperature: c.Temperature = None,
    seed: c.Seed = None,
    drafting: c.Drafting = None,
    sources: Annotated[bool, typer.Option("--sources", help="List the passages that the answer drew on.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Show what was reused, and the speed.")] = False,
    json: c.Json = False,
) -> None:
    """Ask one question of a session."""
    changes = c.given(
        stride=stride,
        policy=policy,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        drafting=drafting,
    )

    async def work() -> None:
        async with c.Opened(db=db, model=model, device=device, dtype=dtype) as assistant:
            opened = await assistant.session(session, create=False)
            if json:
                c.print_json((await opened.answer(question, **changes)).to_dict())
                return
            c.report_resume(opened)
            answer = await c.stream_answer(opened, question, **changes)
            if sources:
                c.print_sources(answer.sources)
            if stats:
                c.print_usage(answer)

    c.run(work())
