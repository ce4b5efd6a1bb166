"""`Adapter`: a LoRA read from a folder that peft wrote, made ready for a model's products. peft itself is not needed.

An adapter acts on the rows of a forward that name it (`Slice.adapter`), so adapted and plain rows share forwards. One
that acts on the `segment` touches nothing before the boundary: the stream's rows stay the base model's, whoever reads
them (docs/methods.md). One that acts on the `text` is its counterpart: it decides what the stream's rows hold, and the
base asks, retrieves and answers. The language-model head stays the base's in any case.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from longstride.engine.context import Placement
from longstride.engine.window import NAMES
from longstride.errors import ModelError

if TYPE_CHECKING:
    from longstride.engine.model import Model

CONFIG, WEIGHTS, PICKLE, OWN = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "longstride.json",
)
FORMAT = 1
PREFIX = "base_model.model."
DOWN, UP, TOKENS = ".lora_A.weight", ".lora_B.weight", ".token_adapter.trainable_tokens_delta"
# settings of peft that stand for another computation than a low-rank product on an unchanged layer
OTHER = (
    "use_dora", "lora_bias", "modules_to_save", "layer_replication", "target_parameters", "use_qalora", "use_bdlora",
    "arrow_config", "monteclora_config",
)  # fmt: skip
STARTS = (None, True, False, "gaussian", "eva")  # of the factors; all others change the base's weights as well

Factors = tuple[torch.Tensor, torch.Tensor]  # x [T, in] -> x @ first @ second [T, out]
Marks = tuple[tuple[int, ...], tuple[int, ...]]
Acts = Literal["segment", "everywhere", "text"]


@dataclass(frozen=True, eq=False)
class Adapter:
    """What an adapter adds. `fingerprint` names everything that decides it, and no file name. `marks`: ids that stand
    left and right of passages, possibly none. `acts`: on the rows from the boundary on (`segment`), on those of the
    text between the sink and the turn (`text`), or on all of a sequence. `tokens`: where in `embedded` [n, hidden] the
    input embedding of a token of its own stands. `factors`: by the name of a model's product, its scale included.
    `placement`: the one it was trained for, where it says so; its marks, or that it has none, belong to that.
    `refresh`: what it was trained with there. `window`: the policy it was trained for, where it must be that.
    """

    name: str
    fingerprint: str
    marks: Marks
    acts: Acts
    tokens: Mapping[int, int]
    embedded: torch.Tensor
    factors: Mapping[str, Factors]
    placement: str = ""
    window: str = ""
    refresh: int | None = None

    @property
    def changes_text(self) -> bool:
        """Whether the stream's own rows are others than the base's."""
        return self.acts != "segment"

    @property
    def changes_passages(self) -> bool:
        """Whether the rows of passages are."""
        return self.acts != "text"

    @property
    def brings_marks(self) -> bool:
        """Its marks, or that it has none, stand in place of the plain ones."""
        return self.placement in set(Placement) or any(self.marks)

    def embed(self, ids: Sequence[int], rows: torch.Tensor) -> None:
        """Put the embeddings of its own tokens among `ids` into `rows` [len(ids), hidden]."""
        own = [(at, self.tokens[id_]) for at, id_ in enumerate(ids) if id_ in self.tokens]
        if own:
            at, of = zip(*own, strict=True)
            rows[list(at)] = self.embedded[list(of)]


def shipped_adapter(model: str, placement: str) -> Path | None:
    """The folder of the adapter that comes with this package for a model and a placement, if there is one."""
    package = find_spec("longstride.tuning")  # finds the folder; imports nothing of it
    name = f"{model}-{placement}"
    if package is None or Path(name).name != name:
        return None
    folders = (Path(place) / "adapters" / name for place in package.submodule_search_locations or ())
    return next((folder for folder in folders if folder.is_dir()), None)


def load_adapter(folder: str | Path, model: "Model") -> Adapter:
    """Read what peft's `save_pretrained` wrote, and `longstride.json` where there is one.

    Without that file it acts everywhere and has no marks. Raises `ModelError` naming what is missing, damaged or
    computed otherwise than here, and for an adapter of another model.
    """
    # in a thread that ends, as models are loaded: see `load_model`
    with ThreadPoolExecutor(1, thread_name_prefix="longstride-load") as thread:
        try:
            return thread.submit(_load, Path(folder).expanduser(), model).result()
        except _Refused as refused:
            raise ModelError(f"adapter {folder}: {refused}") from refused


class _Refused(Exception):
    """Why a folder cannot be used, without its name."""


@torch.inference_mode()
def _load(folder: Path, model: "Model") -> Adapter:
    if not folder.is_dir():
        raise _Refused("no such folder; give one that peft's save_pretrained wrote")
    config, own = _json(folder / CONFIG), _json(folder / OWN, {})
    tensors = _tensors(folder)
    _check_settings(config, own)
    acts, marks = _acts(own, model) if own else ("everywhere", ((), ()))
    runner = model.runner
    pairs = dict(_pairs(tensors, config, model))
    tokens, embedded = _tokens(tensors, config, model)
    if not pairs and not tokens:
        raise _Refused(f"{WEIGHTS} holds no LoRA factors")
    if tokens and not own and getattr(runner.model.config, "tie_word_embeddings", False):
        raise _Refused(
            "it trains rows of an embedding that this model shares with its language-model head, and Longstride "
            "keeps the head as it is; train it with an embedding of its own, or as one with marks (longstride.json)"
        )
    factors: dict[str, Factors] = {}
    for product in {id(p): p for p in runner.products.values()}.values():
        mine = {path: pairs[path] for path in product.sizes if path in pairs}
        if mine:
            down = torch.cat([pair[0] for pair in mine.values()])
            up = torch.zeros(len(down), sum(product.sizes.values()))
            row = column = 0
            for path, size in product.sizes.items():
                if path in mine:
                    part = mine[path][1]
                    up[row : row + part.shape[1], column : column + size] = part.T
                    row += part.shape[1]
                column += size
            factors[product.name] = (
                down.T.contiguous().to(runner.device, runner.dtype),
                up.to(runner.device, runner.dtype),
            )
    scales = {path: pair[2] for path, pair in pairs.items()}
    fingerprint = _fingerprint(tensors, {"acts": acts, "marks": marks, "scales": scales, "tokens": tokens})
    embedded = embedded.to(runner.device, runner.dtype)
    placement, window = (value if isinstance(value := own.get(key), str) else "" for key in ("placement", "window"))
    return Adapter(
        folder.resolve().name, fingerprint, marks, acts, tokens, embedded, factors, placement, window,
        refresh if isinstance(refresh := own.get("refresh"), int) and refresh >= 0 else None,
    )  # fmt: skip


def _json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None and not path.exists():
        return default
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _Refused(f"{path.name} is missing; give a folder that peft's save_pretrained wrote") from error
    except (OSError, ValueError) as error:
        raise _Refused(f"{path.name} could not be read; save the adapter again") from error
    if not isinstance(data, dict) or not data:
        raise _Refused(f"{path.name} does not hold an adapter's settings; save the adapter again")
    return data


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    if not path.exists() and (folder / PICKLE).exists():
        raise _Refused(f"{PICKLE} is a pickle, which can run code when it is read; save it as {WEIGHTS}")
    try:
        tensors: dict[str, torch.Tensor] = load_safetensors(path.read_bytes())
    except FileNotFoundError as error:
        raise _Refused(f"{WEIGHTS} is missing; give a folder that peft's save_pretrained wrote") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _Refused(f"{WEIGHTS} is damaged; copy or save it again") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise _Refused(f"{name} in {WEIGHTS} holds something else than finite numbers; train it again")
    return tensors


def _check_settings(config: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuse what peft would compute otherwise than a low-rank product on an unchanged layer."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _Refused(f"it is of type {kind}, and only LORA is supported")
    wrong = [name for name in OTHER if config.get(name)]
    wrong += [] if config.get("bias", "none") == "none" else ["bias"]
    wrong += [] if config.get("init_lora_weights") in STARTS else ["init_lora_weights"]
    # peft's own way of acting from somewhere on; longstride.json says it otherwise
    wrong += ["alora_invocation_tokens"] if config.get("alora_invocation_tokens") and not own else []
    if wrong:
        raise _Refused(f"its {wrong[0]} ({config[wrong[0]]}) is not supported; train a plain LoRA")


def _acts(own: dict[str, Any], model: "Model") -> tuple[Acts, Marks]:
    """(acts, marks) as longstride.json has them."""
    if own.get("format") != FORMAT:
        raise _Refused(f"{OWN} has format {own.get('format')}, this version reads format {FORMAT}; update Longstride")
    marks = own.get("marks")
    acts: Acts | None = next((kind for kind in get_args(Acts) if kind == own.get("acts")), None)
    if acts is None:
        raise _Refused(f"{OWN} says that it acts on {own.get('acts')!r}; it must be one of {', '.join(get_args(Acts))}")
    if acts == "text" and own.get("window") not in NAMES:
        raise _Refused(f"{OWN} names no window policy, and an adapter that acts on the text is for one; train it again")
    if own.get("vocabulary") != model.vocabulary:
        raise _Refused(f"it was trained with another tokenizer than that of model {model.name}; open its own model")
    sides = marks if isinstance(marks, list) and len(marks) == 2 and all(isinstance(m, list) for m in marks) else None
    if sides is None or not all(_is_token(id_, model) for side in sides for id_ in side):
        raise _Refused(f"the marks in {OWN} must be two lists of token ids of model {model.name}")
    return acts, (tuple(sides[0]), tuple(sides[1]))


def _is_token(value: object, model: "Model") -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < model.runner.vocab_size


def _pairs(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], model: "Model"
) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor, float]]]:
    """(path of a layer, (A, scaled B, scale)) of each adapted layer."""
    known = model.runner.products
    paths: dict[str, None] = {}  # in the file's order
    for name in tensors:
        end = next((end for end in (DOWN, UP, TOKENS) if name.startswith(PREFIX) and name.endswith(end)), None)
        if end is None:
            raise _Refused(f"{name} in {WEIGHTS} is neither a LoRA factor of a linear layer nor a row of a token")
        if end != TOKENS:
            paths[name.removeprefix(PREFIX).removesuffix(end)] = None
    for path in paths:
        if path not in known:
            raise _Refused(f"it adapts {path}, which is no linear layer inside model {model.name}; open its own model")
        product = known[path]
        down, up = (tensors.get(f"{PREFIX}{path}{end}") for end in (DOWN, UP))
        if down is None or up is None:
            raise _Refused(f"one of the two factors of {path} is missing from {WEIGHTS}; save it again")
        rank = len(down) if down.dim() == 2 else 0
        if rank < 1 or down.shape != (rank, product.inputs) or up.shape != (product.sizes[path], rank):
            raise _Refused(
                f"the factors of {path} are {tuple(down.shape)} and {tuple(up.shape)}, which does not fit a layer of "
                f"{product.inputs} inputs and {product.sizes[path]} outputs; open its own model"
            )
        scale = _alpha(config, path) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        yield path, (down.float(), up.float() * scale, scale)


def _alpha(config: dict[str, Any], path: str) -> float:
    """The layer's own, else the common one."""
    try:
        # as peft does it: the first pattern that fits
        own = [v for p, v in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({p})$", path)]
        alpha = float([*own, config.get("lora_alpha")][0])
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise _Refused(f"lora_alpha or alpha_pattern in {CONFIG} cannot be read; save the adapter again") from error
    if not math.isfinite(alpha):
        raise _Refused(f"lora_alpha in {CONFIG} is {alpha}; train it again")
    return alpha


def _tokens(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], model: "Model"
) -> tuple[dict[int, int], torch.Tensor]:
    """Where the rows of its own tokens stand, and the rows; they are whole embeddings, not differences."""
    embedding = model.runner.model.get_input_embeddings()
    path = next(name for name, module in model.runner.model.named_modules() if module is embedding)
    size = embedding.weight.shape[1]
    found = [name for name in tensors if name.endswith(TOKENS)]
    if not found:
        return {}, torch.empty(0, size)
    if found != [f"{PREFIX}{path}{TOKENS}"]:
        raise _Refused(f"it trains rows of {found[0].removeprefix(PREFIX)}, and only those of {path} are supported")
    ids = config.get("trainable_token_indices")
    if isinstance(ids, dict):
        ids = next((value for name, value in ids.items() if f".{path}".endswith(f".{name}")), None)
    rows = tensors[found[0]].float()
    if not isinstance(ids, list) or not all(_is_token(id_, model) for id_ in ids) or len(set(ids)) != len(ids):
        raise _Refused(f"trainable_token_indices in {CONFIG} does not list token ids of model {model.name}")
    if rows.shape != (len(ids), size):
        raise _Refused(f"its rows of {len(ids)} tokens are {tuple(rows.shape)}, and this model's have {size} numbers")
    scale = getattr(embedding, "embed_scale", None)  # some embeddings scale what they look up
    return {id_: at for at, id_ in enumerate(ids)}, rows if scale is None else rows * float(scale)


def _fingerprint(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps({"format": FORMAT, **rest}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
