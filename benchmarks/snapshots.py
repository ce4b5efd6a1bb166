"""Coming back: restoring a session from its blocks against reading its text again; and what saving them costs."""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

from benchmarks.common import Row, plot, report, shipped_text
from longstride.engine.model import Model, load_model
from longstride.scheduler.assistant import Assistant


async def read(model: Model, ids: list[int], database: Path, limit: int) -> float:
    """Seconds to read `ids` into a new database's session, whose blocks may take `limit` bytes of the database."""
    async with Assistant.open(database, model=model, blocks_limit_bytes=limit) as assistant:
        session = await assistant.session("read")
        began = time.perf_counter()
        await session.feed_ids(ids)
        return time.perf_counter() - began


async def measure(model: Model, ids: list[int], rounds: int, database: Path) -> tuple[Row, Row, Row]:
    """(reading the text without saving its KV, reading and saving, restoring the session), in turns."""
    setting = {"length": f"{len(ids)} tokens"}
    reading, restoring = Row("re-read", dict(setting), "s"), Row("restore", dict(setting), "s")
    saving = Row("read and save", dict(setting), "s")
    async with Assistant.open(database, model=model) as assistant:
        await (await assistant.session("kept")).feed_ids(ids)
    for number in range(rounds):
        reading.runs.append(await read(model, ids, database.with_name(f"without {number}.db"), 0))
        saving.runs.append(await read(model, ids, database.with_name(f"with {number}.db"), 1 << 40))
        async with Assistant.open(database, model=model) as assistant:
            began = time.perf_counter()
            session = await assistant.session("kept")
            restoring.runs.append(time.perf_counter() - began)
            if session.resumed is None or session.resumed.tokens - session.resumed.restored >= 64:
                raise RuntimeError(f"the session was not restored: {session.resumed}")
            restoring.setting["restored"] = session.resumed.restored
    return reading, saving, restoring


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="1000,4000", help="tokens read")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    model = load_model(options.model)
    ids = model.tokenizer.encode(shipped_text())
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for length in map(int, options.lengths.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            reading, saving, restoring = asyncio.run(
                measure(model, ids[:length], options.rounds, Path(folder) / "b.db")
            )
        rows += [reading, saving, restoring]
        ratios[f"re-read @ {length} tokens"] = reading.median / restoring.median
        ratios[f"saving while reading @ {length} tokens"] = reading.median / saving.median
    report(rows, ratios, {"dtype": str(model.runner.dtype)}, options.json)
    if options.plot is not None:
        plot(rows, "Coming back to a session (lower is better)", options.plot)


if __name__ == "__main__":
    main()
