"""`longstride doctor`."""

import os
import platform
import shutil
import sqlite3

import typer

from longstride.cli import common as c
from longstride.engine.embedded import cache_folder, find_gguf, package_versions
from longstride.errors import LongstrideError
from longstride.scheduler.settings import load_settings
from longstride.storage.blocks import Blocks
from longstride.storage.database import Database


def run(db: c.Db = None, json: c.Json = False) -> None:
    """What this machine has, which choices follow, and whether everything is sound."""
    import torch

    from longstride.engine import native
    from longstride.engine.model import DTYPES, choose_device, choose_dtype

    settings = load_settings(**c.given(db=db))
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    layer = native.library(dtype) if device.type == "cpu" else None
    facts: dict[str, str] = {
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        **package_versions("torch", "transformers", "peft", "bm25s", "sqlite-utils"),
        "cpu": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "compiled layer": layer.name if layer is not None else "none (torch's operations are used)",
        "device": str(device),
        "dtype": next(name for name, kind in DTYPES.items() if kind == dtype),
        "cache": str(cache_folder()),
        "database": str(settings.db),
    }
    problems: list[str] = []
    try:
        facts["embedded model"] = str(find_gguf())
    except LongstrideError as error:
        problems.append(str(error))
    path = settings.db.expanduser().resolve()
    if path.exists():
        try:
            with Database(path) as database:
                problems += database.check()
                blocks, size = Blocks(database, settings.blocks_limit_bytes).usage()
            facts["blocks"] = f"{blocks:,}, {size / 1e6:,.1f} of {settings.blocks_limit_bytes / 1e6:,.0f} MB"
        except LongstrideError as error:
            problems.append(str(error))
    if path.parent.is_dir():
        facts["free disk"] = f"{shutil.disk_usage(path.parent).free / 1e9:,.1f} GB"
    else:
        problems.append(f"the folder {path.parent} of the database does not exist")
    if json:
        c.print_json({"facts": facts, "problems": problems})
    else:
        for name, value in facts.items():
            c.out.print(f"{name:15} {value}", markup=False)
        for problem in problems:
            c.err.print(f"problem: {problem}", markup=False)
        if not problems:
            c.out.print("everything is sound")
    if problems:
        raise typer.Exit(1)
