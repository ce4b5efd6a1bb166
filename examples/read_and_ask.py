"""Read a text, ask about it, show the sources. Usage: python examples/read_and_ask.py FILE QUESTION [DB]"""

import asyncio
import sys
from pathlib import Path

from longstride import Assistant


async def main(file: str, question: str, db: str = "example.db") -> None:
    """One session a file; run it again and it goes on from its snapshot."""
    async with Assistant.open(db, max_tokens=32) as assistant:
        session = await assistant.session(Path(file).name)
        if not session.tokens:
            report = await session.feed(Path(file).read_text(encoding="utf-8"))
            print(f"read {report.tokens} tokens in {report.seconds:.1f} s")
        async for piece in session.ask(question):
            print(piece.text, end="", flush=True)
        print()
        for source in piece.answer.sources:
            print(f"- {source.document}, characters {source.start} to {source.stop}")
        print(f"{piece.answer.usage.cached} tokens reused, {piece.answer.usage.encoded} encoded")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
