"""Load a causal LM and its tokenizer: the embedded default, a local folder, a GGUF file, or a hub id."""

import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from longstride.engine.embedded import (
    Progress,
    cache_folder,
    embedded_folder,
    file_sha256,
    load_gguf,
    package_versions,
    silent,
)
from longstride.engine.ngrams import NGrams
from longstride.engine.runner import ModelRunner, refuse_untruncatable
from longstride.engine.tokenizer import HFTokenizer, Tokenizer
from longstride.errors import BadInput, ModelError

log = logging.getLogger("longstride")
EMBEDDED = "smollm2"
EMBEDDED_NGRAMS = Path(__file__).with_name("data") / f"{EMBEDDED}-ngrams.safetensors"
# what transformers' models call the cache that they are given
CACHE = "cache" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else "past_key_values"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Model:
    """A loaded model. `fingerprint` names everything that decides the value of a KV row, `vocabulary` everything
    that decides what a token id means. `content` names the weights as they are stored; `ngrams`: what the model tends
    to write, where that was counted."""

    name: str
    runner: ModelRunner
    tokenizer: Tokenizer
    fingerprint: str
    vocabulary: str
    content: str = ""
    ngrams: NGrams | None = None


def choose_device(device: str) -> torch.device:
    """`auto` takes CUDA where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise BadInput(f"no such device: {device!r}; use auto, cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BadInput("this machine has no CUDA device; use --device cpu")
    return chosen


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is computed in hardware. Elsewhere torch emulates it, hundreds of times slower than fp32; compiled
    layers do without (`native.py`), but not every model has them, so it has to be asked for there."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 where the hardware has it, fp16 on older GPUs, else fp32."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise BadInput(f"no such dtype: {dtype!r}; use auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if fast_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def load_model(
    name: str = EMBEDDED, *, device: str = "auto", dtype: str = "auto", progress: Progress = silent
) -> Model:
    """Load `name` onto `device`. Raises `ModelError` naming what is missing or why the model cannot be used."""
    # In a thread that ends: every thread that computes gets OpenMP workers of its own, and once there are more of them
    # than cores they all go to sleep between two operations, which makes decoding twice as slow (measured).
    with ThreadPoolExecutor(1, thread_name_prefix="longstride-load") as thread:
        return thread.submit(_load, name, device, dtype, progress).result()


def _load(name: str, device: str, dtype: str, progress: Progress) -> Model:
    plain = load_plain(name, device=device, dtype=dtype, progress=progress)
    runner = ModelRunner(plain.model)
    runner.calibrate()
    fingerprint, ngrams = _fingerprint(plain, runner), find_ngrams(plain)
    return Model(name, runner, plain.tokenizer, fingerprint, plain.vocabulary, plain.content, ngrams)


def ngrams_file(content: str) -> Path:
    """Where the n-grams of a model are looked for, by what names its weights (`Model.content`)."""
    return cache_folder() / "ngrams" / f"{hashlib.sha256(content.encode()).hexdigest()}.safetensors"


def find_ngrams(plain: "PlainModel") -> NGrams | None:
    """Those that were made for this model, or those that come with the embedded one. A file that cannot be used is told
    of and done without: n-grams change how fast an answer is written, not what it says."""
    shipped = [EMBEDDED_NGRAMS] if plain.name == EMBEDDED else []
    for path in filter(Path.is_file, (ngrams_file(plain.content), *shipped)):
        try:
            return NGrams.load(path, plain.vocabulary, plain.model.config.vocab_size)
        except ModelError as error:
            log.warning("%s; it is not used", error)
    return None


@dataclass(frozen=True)
class PlainModel:
    """transformers' own model, as it is trained; `content` names its weights, `vocabulary` what a token id means."""

    name: str
    model: Any
    tokenizer: HFTokenizer
    content: str
    vocabulary: str

    @property
    def spare(self) -> list[int]:
        """Token ids with an embedding that neither text nor a conversation uses, ascending: room for marks."""
        rows, known = self.model.get_input_embeddings().weight.shape[0], self.tokenizer.size
        return [*self.tokenizer.spare, *range(known, rows)]


def load_plain(
    name: str = EMBEDDED, *, device: str = "auto", dtype: str = "auto", progress: Progress = silent
) -> PlainModel:
    """Load `name` as transformers has it. Raises `ModelError` as `load_model` does."""
    from transformers.utils import logging as transformers_logging

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    path = embedded_folder(progress) if name == EMBEDDED else Path(name).expanduser()
    if path.is_dir() or path.is_file():
        model, tokenizer = _load_local(path, kind)
        content = _content_hash(path)
    elif path.suffix == ".gguf" or name.startswith((".", "~", os.sep)) or name.count("/") != 1:
        raise ModelError(f"no model at {name}: give a folder, a GGUF file, a hub id (owner/name) or {EMBEDDED!r}")
    else:
        model, tokenizer = _load_folder(name, kind)
        commit = getattr(model.config, "_commit_hash", None)
        content = f"hub:{name}@{commit}"
    ends = getattr(model.generation_config, "eos_token_id", None)
    wrapped = HFTokenizer(tokenizer, [ends] if isinstance(ends, int) else ends or [])
    vocabulary = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    return PlainModel(name, model.to(where), wrapped, content, vocabulary)


def _load_local(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    if path.is_dir():
        return _load_folder(str(path), dtype)
    if path.suffix != ".gguf":
        raise ModelError(f"{path} is not a model: a single file must be a .gguf file")
    try:
        return load_gguf(path, dtype)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ModelError(f"{path} could not be read as a GGUF model: {_first_line(error)}") from error


def _load_folder(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A folder or hub id by transformers: safetensors only (a pickle can run code), no remote code."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        refuse_untruncatable(config)
        model = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        return model, AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {source!r} could not be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _content_hash(path: Path) -> str:
    """Hash over the names and contents of a model's files; remembered by size and time, as weights are large."""
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in {".safetensors", ".json"})
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns, f.stat().st_ino) for f in files]
    key = hashlib.sha256(json.dumps([str(path.resolve()), stats]).encode()).hexdigest()
    note = cache_folder() / "fingerprints" / key
    if note.is_file():
        return note.read_text()
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file_sha256(file)}\0".encode())
    note.parent.mkdir(parents=True, exist_ok=True)
    scratch = note.with_suffix(f".{os.getpid()}")
    scratch.write_text(digest.hexdigest())
    scratch.replace(note)
    return digest.hexdigest()


def _fingerprint(plain: PlainModel, runner: ModelRunner) -> str:
    """Content of the weights and tokenizer, positions' settings, cache layout and major library versions."""
    config = runner.model.config
    majors = {name: version.split(".")[0] for name, version in package_versions("torch", "transformers").items()}
    parts = {
        "content": plain.content,
        "type": config.model_type,
        "rope": getattr(config, "rope_parameters", None),
        "vocabulary": plain.vocabulary,
        "layout": runner.layout.describe(),
        "device": runner.device.type,
        "versions": majors,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
