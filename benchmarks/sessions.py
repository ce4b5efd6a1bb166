"""Many sessions on one device: tokens a second of all together against one alone, and an answer beside a reader."""

import argparse
import asyncio
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from benchmarks.common import Row, plot, report, shipped_text
from longstride.engine.model import Model, load_model
from longstride.scheduler.assistant import Assistant
from longstride.scheduler.session import Session

QUESTION = "Tell what happens in this text, in many words."


async def decoded(session: Session, tokens: int) -> tuple[int, list[float]]:
    """Tokens of one answer, and the moment each came."""
    times: list[float] = []
    async for piece in session.ask(QUESTION, policy="never", max_tokens=tokens):
        times.append(time.perf_counter())
        last = piece
    if last.answer is None:
        raise RuntimeError("the answer has no end")
    return last.answer.usage.generated, times


async def measure(model: Model, ids: list[int], options: argparse.Namespace, folder: Path) -> list[Row]:
    """Rows for one and for many sessions."""
    counts = list(map(int, options.sessions.split(",")))
    setting = {"context": f"{options.length} tokens"}
    rows = {n: Row("together", {"length": f"{n} sessions", **setting}, "tokens/s") for n in counts}
    rows[counts[0]].system = "one-session"
    beside = Row("beside a reader", {"length": "1 sessions", **setting}, "ms between tokens, longest")
    async with Assistant.open(folder / "s.db", model=model, blocks_limit_bytes=0) as assistant:
        sessions = [await assistant.session(f"s{i}", drafting="off") for i in range(max(counts))]  # a token a step
        for i, session in enumerate(sessions):
            await session.feed_ids(ids[i * 10 : i * 10 + options.length])
        for _ in range(options.rounds):
            for n in counts:
                began = time.perf_counter()
                done = await asyncio.gather(*(decoded(session, options.tokens) for session in sessions[:n]))
                rows[n].runs.append(sum(count for count, _ in done) / (time.perf_counter() - began))
        reader = await assistant.session("reader")
        for _ in range(options.rounds):
            reading = asyncio.create_task(reader.feed_ids(ids[:1024]))
            await asyncio.sleep(0.1)
            _, times = await decoded(sessions[0], options.tokens)
            beside.runs.append(1000 * max(b - a for a, b in pairwise(times)))
            await reading
    return [*rows.values(), beside]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", default="1,2,4,8")
    parser.add_argument("--length", type=int, default=256, help="tokens that each session has read")
    parser.add_argument("--tokens", type=int, default=32, help="tokens that each answers with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    model = load_model(options.model)
    ids = model.tokenizer.encode(shipped_text())
    with tempfile.TemporaryDirectory() as folder:
        rows = asyncio.run(measure(model, ids, options, Path(folder)))
    together = [row for row in rows if row.unit == "tokens/s"]
    ratios = {f"one-session @ {row.setting['length']}": row.median / together[0].median for row in together[1:]}
    report(rows, ratios, {"dtype": str(model.runner.dtype)}, options.json)
    if options.plot is not None:
        plot(together, "Tokens a second of all sessions together (higher is better)", options.plot)


if __name__ == "__main__":
    main()
