"""`longstride demo`."""

from importlib.resources import files
from typing import Any

from longstride.cli import common as c

SESSION = "demo"
CHAPTER = "alice_chapters_1_2.txt"
# a short context, so that the chapter's beginning has left it when the questions come and must be retrieved
SETTINGS: dict[str, Any] = {"window": "sinks", "context_tokens": 2048, "passages": 3, "max_tokens": 64}
QUESTIONS = (
    "What words were printed on the label of the bottle?",
    "What words were marked in currants on the cake?",
)


def run(db: c.Db = None, model: c.ModelName = None, device: c.Device = None, dtype: c.Dtype = None) -> None:
    """Read a book chapter, answer two questions with sources, show what was reused. Run it twice."""
    text = files("longstride.cli").joinpath("data", CHAPTER).read_text(encoding="utf-8")

    async def work() -> None:
        async with c.Opened(db=db, model=model, device=device, dtype=dtype) as assistant:
            session = await assistant.session(SESSION, **({} if await assistant.has_session(SESSION) else SETTINGS))
            ids = assistant.model.tokenizer.encode(text)
            if session.resumed is not None:
                c.out.print(
                    f"Resumed the session of an earlier run: {session.tokens:,} tokens were read then. "
                    f"{session.resumed.restored:,} of the {session.resumed.tokens:,} tokens in its context came from "
                    f"the snapshot and were not recomputed ({session.resumed.seconds:.2f} s)."
                )
                for problem in session.resumed.problems:
                    c.err.print(f"warning: {problem}", markup=False)
            rest = ids[session.tokens :]  # all of it, or what an interrupted run has left
            if rest:
                with c.reading_bar() as bar:
                    task = bar.add_task("Alice in Wonderland, chapters 1 and 2", total=len(rest), rate="")
                    report = await session.feed_ids(rest, progress=lambda n: bar.update(task, advance=n))
                c.out.print(
                    f"Read {report.tokens:,} tokens of Alice in Wonderland in {report.seconds:.1f} s "
                    f"({report.tokens / report.seconds:,.0f} tokens/s) through a context of "
                    f"{session.sequence.context.limit:,}; {report.blocks} blocks of KV saved."
                )
            for question in QUESTIONS:
                c.out.print(f"\n> {question}", style="bold")
                answer = await c.stream_answer(session, question)
                c.print_sources(answer.sources)
                c.print_usage(answer)
            if session.resumed is None:
                c.out.print("\nRun `longstride demo` again: it goes on from the snapshot.")

    c.run(work())
