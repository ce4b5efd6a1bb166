"""LoRA on a frozen base (peft), over `Tree`s: one forward over a window's text, one over all its branches.

An adapter that acts on the segment changes branches only: the text's rows are the base model's and need no gradient.
One that acts on the text changes that alone, and learns from what the base makes of it in the branches.
A step is a function of the recipe, the data and its number, and everything between steps is in a checkpoint, so a run
that was killed goes on as if it had not been (safetensors and JSON; nothing is pickled).
"""

import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional

from longstride.engine.context import MIN_SINK
from longstride.engine.model import CACHE, PlainModel
from longstride.engine.tokenizer import Tokenizer
from longstride.errors import BadInput, ModelError
from longstride.scheduler.marks import WORDS
from longstride.tuning.recipe import Marks, Recipe, Steps
from longstride.tuning.report import pyplot, save, write_json
from longstride.tuning.trees import Batch, Tree, batch, tree

CHECKPOINT, WEIGHTS = "checkpoint", "adapter_model.safetensors"
EVERY = 25  # steps between checkpoints


def attach(plain: PlainModel, recipe: Recipe, words: dict[int, list[int]]) -> tuple[Any, Any]:
    """The base model with a fresh LoRA, and trainable rows for the tokens of `words`, which start as the mean of other
    tokens'; and its head from before: peft trains a tied one along with them, and at run time the head is the base's.

    Raises `BadInput` for target modules that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    _check_head(plain)
    torch.manual_seed(recipe.seed)
    own = sorted(words)
    embedding, head = plain.model.get_input_embeddings(), plain.model.get_output_embeddings()
    name = next(name for name, module in plain.model.named_modules() if module is embedding)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.modules) or "all-linear",
        trainable_token_indices={name.rpartition(".")[2]: own} if own else None,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in plain.model.modules()),  # GPT-2's layers
        task_type="CAUSAL_LM",
    )
    _check_modules(plain.model, recipe.modules)
    with torch.no_grad():
        starts = [embedding.weight[words[id_]].mean(0).clone() for id_ in own]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for what it now calls otherwise
            model = get_peft_model(plain.model, config)
    except ValueError as error:
        raise BadInput(f"modules {', '.join(recipe.modules)}: {str(error).splitlines()[0]}") from error
    rows = [p for n, p in model.named_parameters() if "trainable_tokens_delta" in n]
    with torch.no_grad():
        for at, start in enumerate(starts):
            rows[0][at] = start
    model.eval()
    for module_name, module in model.named_modules():
        if module_name.endswith("lora_dropout"):
            module.train()  # the base's own dropout, where it has one, stays off
    return model, head


@torch.no_grad()
def _check_head(plain: PlainModel) -> None:
    """Raises `BadInput` for a model that changes its logits behind the head: its loss would be another than here."""
    ids = torch.arange(4, device=plain.model.device)[None]
    logits = plain.model(input_ids=ids).logits
    ours = plain.model.get_output_embeddings()(plain.model.base_model(input_ids=ids).last_hidden_state)
    if not torch.allclose(logits.float(), ours.float(), atol=1e-3, rtol=1e-3):
        raise BadInput(f"model {plain.name} scales its logits behind the head, which training does not know how to do")


def _check_modules(model: Any, modules: tuple[str, ...]) -> None:
    """Raises `BadInput` for a name that is no linear layer inside the model (the head stays the base's)."""
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if type(m).__name__ in {"Linear", "Conv1D"} and m is not head]
    for name in modules:
        if not any(f".{path}".endswith(f".{name}") for path in linear):
            known = sorted({path.rpartition(".")[2] for path in linear})
            raise BadInput(f"module {name!r} is no linear layer of this model; it has {', '.join(known)}")


class Losses:
    """Forward passes over trees, of what `attach` gave."""

    def __init__(self, model: Any, head: Any, recipe: Recipe) -> None:
        self.model = model
        self.head = head
        self.plain = model.get_base_model()
        self.acts = recipe.acts
        self.device: torch.device = next(model.parameters()).device
        self.dtype = self.plain.dtype

    def __call__(self, tree: Tree) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of a tree's targets [targets, vocabulary]; and the base's of the same without retrieval, where the
        text's rows are its own."""
        data = batch(tree, self.device)
        segment, base = self.acts == "segment", None
        with self._base() if segment else nullcontext():
            past, own = self._text(tree, data)
        if tree.ids and segment:
            base = self._logits(own).detach()
        with self.model.disable_adapter() if self.acts == "text" else nullcontext():
            return self._logits(self._rows(tree, data, past, own)), base

    @torch.no_grad()
    def teacher(self, tree: Tree) -> torch.Tensor:
        """The base's logits [targets, vocabulary]."""
        data = batch(tree, self.device)
        with self.model.disable_adapter():
            past, own = self._text(tree, data)
            return self._logits(self._rows(tree, data, past, own))

    @contextmanager
    def _base(self) -> Iterator[None]:
        """The base model, which learns nothing."""
        with torch.no_grad(), self.model.disable_adapter():
            yield

    def _text(self, tree: Tree, data: Batch) -> tuple[Any, torch.Tensor]:
        """The text's keys and values, once for each branch; the last hidden states [plain, hidden] of its `plain`
        rows."""
        from transformers import DynamicCache

        if not tree.ids:
            return None, torch.empty(0)
        cache, bias = DynamicCache(), self._bias(data.text_mask)
        first = tree.sink if self.acts == "text" else 0
        if first:
            with self._base():
                self._hidden(data.text[:, :first], data.text_positions[:, :first], bias[:, :, :first, :first], cache)
        hidden = self._hidden(data.text[:, first:], data.text_positions[:, first:], bias[:, :, first:], cache)
        cache.batch_repeat_interleave(len(tree.branches))
        return cache, hidden[0, data.plain - first]

    def _rows(self, tree: Tree, data: Batch, past: Any, own: torch.Tensor) -> torch.Tensor:
        """Last hidden states that predict the tree's targets; `own`: those of the text's."""
        hidden = self._hidden(data.ids, data.positions, self._bias(data.mask, data.added), past)
        branches = hidden[data.at[0], data.at[1]]
        return torch.cat([branches, own]) if tree.targets else branches

    def _bias(self, mask: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """Additive, because eager attention takes a bool mask for numbers."""
        bias = torch.zeros(mask.shape, dtype=self.dtype, device=self.device) if added is None else added.to(self.dtype)
        return bias.masked_fill_(~mask, torch.finfo(self.dtype).min)[:, None]

    def _hidden(self, ids: torch.Tensor, positions: torch.Tensor, bias: torch.Tensor, past: Any) -> torch.Tensor:
        if positions.shape[0] < ids.shape[0]:
            positions = positions.expand(ids.shape[0], -1)
        out = self.plain.base_model(
            input_ids=ids, position_ids=positions, attention_mask=bias, use_cache=past is not None, **{CACHE: past}
        )
        hidden: torch.Tensor = out.last_hidden_state
        return hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(hidden).float()
        return logits


class Run:
    """A training run in a folder: the adapter when it has ended, its checkpoint before."""

    def __init__(self, plain: PlainModel, recipe: Recipe, steps: Steps, marks: Marks, out: Path, manifest: Any) -> None:
        self.recipe = recipe
        self.steps = steps
        self.out = out
        self.marks = marks if recipe.layout.marks else ((), ())
        self.manifest = manifest
        self.model, head = attach(plain, recipe, self._words(plain.tokenizer))
        self.losses = Losses(self.model, head, recipe)
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=recipe.rate, weight_decay=0.0)
        self.log: list[dict[str, float]] = []
        self._resume()

    def _words(self, tokenizer: Tokenizer) -> dict[int, list[int]]:
        """Tokens that get rows of their own, each with tokens that say what it stands for where nothing is trained."""
        sides = zip(self.marks, WORDS, strict=True)
        words = {id_: tokenizer.encode(word) for mark, word in sides for id_ in mark}
        kept = self.recipe.layout.new_window(tokenizer, MIN_SINK)
        if kept is not None and kept.adds is not None:
            words[kept.adds] = tokenizer.encode(".\n")
        return words

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.log)

    def go(self, progress: Callable[[dict[str, float]], None] = lambda _line: None) -> None:
        """Train to the end, from wherever the folder is; `progress` hears of each step's figures."""
        while self.step < self.recipe.steps:
            line = self._train(self.step)
            self.log.append(line)
            progress(line)
            if self.step % EVERY == 0:
                self._save()
        self._finish()

    def _train(self, step: int) -> dict[str, float]:
        started = time.perf_counter()
        recipe = self.recipe
        torch.manual_seed(recipe.seed * 1_000_003 + step)  # dropout
        window, sample = self.steps(step)
        grown = tree(window, sample, recipe.shape)
        logits, base = self.losses(grown)
        targets = torch.tensor(grown.wanted, device=logits.device)
        ours = functional.log_softmax(logits, -1)
        whole = loss = functional.nll_loss(ours, targets)
        line = {"loss": loss.item()}
        if not math.isfinite(line["loss"]):
            raise ModelError(f"the loss of step {step} is not finite; train again with a lower --rate")
        if base is not None:
            line["none"] = functional.cross_entropy(base, targets).item()
        if (taught := self.steps.taught(sample)) is not None:
            theirs = functional.log_softmax(self.losses.teacher(tree(window, taught, recipe.shape)), -1)
            line["teacher"] = functional.nll_loss(theirs, targets).item()
            apart = functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
            line["apart"] = apart.item()
            whole = (1 - recipe.distil) * loss + recipe.distil * apart
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(whole)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(recipe, step)
        self.optimizer.step()
        return {**line, "targets": len(targets), "rows": grown.rows, "seconds": time.perf_counter() - started}

    # --- what outlives a kill ---

    def _identity(self) -> dict[str, Any]:
        """All that decides the outcome."""
        own = ("base", "vocabulary", "data", "device", "dtype", "torch", "transformers", "peft")
        return {
            "recipe": self.recipe.describe(),
            "marks": [list(mark) for mark in self.marks],
            "prompt": list(self.steps.prompt),
            **{name: self.manifest[name] for name in own if name in self.manifest},
        }

    def _save(self) -> None:
        tensors = {f"value.{name}": p.detach().contiguous() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            tensors |= {f"first.{name}": state["exp_avg"], f"second.{name}": state["exp_avg_sq"]}
        scratch = self.out / f".{CHECKPOINT}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        save_file(tensors, scratch / "state.safetensors")
        write_json(scratch / "state.json", {**self._identity(), "log": self.log})
        target, old = self.out / CHECKPOINT, self.out / f".{CHECKPOINT}.old"
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        scratch.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    def _resume(self) -> None:
        if (self.out / WEIGHTS).exists():
            raise BadInput(f"{self.out} holds an adapter already; name another folder, or remove it")
        folder = next((f for f in (self.out / CHECKPOINT, self.out / f".{CHECKPOINT}.old") if f.is_dir()), None)
        if folder is None:
            return
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "state.safetensors", device=str(self.losses.device))
        except (OSError, ValueError, SafetensorError) as error:
            raise BadInput(f"the checkpoint in {folder} is damaged ({error}); remove it to start anew") from error
        ours = json.loads(json.dumps(self._identity()))
        other = [name for name in ours if state.get(name) != ours[name]]
        if other:
            raise BadInput(
                f"{folder} is the checkpoint of another run (another {' and '.join(other)}); name another folder, or "
                "remove it"
            )
        self.log = state["log"]
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"value.{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": tensors[f"first.{name}"].clone(),
                    "exp_avg_sq": tensors[f"second.{name}"].clone(),
                }

    def _finish(self) -> None:
        """Write the adapter (fp16 holds it well and halves it), its weights last, then drop the checkpoints."""
        self._save()  # a short run has none yet, and what follows may be killed too
        scratch = self.out / ".finished"
        shutil.rmtree(scratch, ignore_errors=True)
        self.model.save_pretrained(scratch, save_embedding_layers=False)
        tensors = {name: tensor.half() for name, tensor in load_file(scratch / WEIGHTS).items()}
        save_file(tensors, scratch / WEIGHTS)
        config = json.loads((scratch / "adapter_config.json").read_text(encoding="utf-8"))
        # peft writes the folder that the base was loaded from, which means nothing elsewhere and may name a person
        write_json(scratch / "adapter_config.json", {**config, "base_model_name_or_path": self.manifest.get("model")})
        own = {
            "format": 1,
            "acts": self.recipe.acts,
            "placement": self.recipe.layout.place,
            "window": self.recipe.layout.window.partition(":")[0],
            "refresh": self.recipe.layout.refresh,
            **self.manifest,
            **self._identity(),
            "targets": int(sum(line["targets"] for line in self.log)),
            "seconds": round(sum(line["seconds"] for line in self.log)),
        }
        write_json(scratch / "longstride.json", own)
        write_json(scratch / "losses.json", self.log)
        for name in ("longstride.json", "losses.json", "adapter_config.json", WEIGHTS):
            (scratch / name).replace(self.out / name)
        for name in (".finished", CHECKPOINT, f".{CHECKPOINT}.old"):
            shutil.rmtree(self.out / name, ignore_errors=True)


def rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to nothing."""
    warm = max(1, round(recipe.warmup * recipe.steps))
    if step < warm:
        return recipe.rate * (step + 1) / warm
    return recipe.rate * (1 + math.cos(math.pi * (step - warm) / max(1, recipe.steps - warm))) / 2


def smoothed(values: list[float], over: int = 20) -> Iterator[float]:
    """Running means."""
    for at in range(len(values)):
        part = values[max(0, at - over + 1) : at + 1]
        yield sum(part) / len(part)


def plot(log: list[dict[str, float]], to: Path) -> None:
    """Loss by step, beside the base model's on the same targets."""
    plt = pyplot()
    figure, ax = plt.subplots(figsize=(7, 3.5), layout="constrained")
    labels = {"loss": "with the adapter", "none": "base model, no retrieval", "teacher": "base model as the teacher"}
    for name, label in labels.items():
        if all(name in line for line in log):
            ax.plot(list(smoothed([line[name] for line in log])), label=label)
    ax.set_xlabel("step")
    ax.set_ylabel("loss, nats a target (mean of 20 steps)")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    save(figure, to)
