"""Adapters of tiny models, as peft makes and saves them."""

import json
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from longstride.engine.model import CACHE, Model
from longstride.engine.runner import ModelRunner
from tests.tiny import ByteTokenizer, fresh_model

GROUPED = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]  # parts of joined products, and whole ones
TARGETS = {
    "llama": GROUPED,
    "qwen2": ["q_proj", "k_proj", "v_proj", "up_proj"],
    "mistral": GROUPED,
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "opt": ["q_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
MARKS = ([262], [263])


def tiny_loaded(kind, **extra) -> Model:
    """A tiny model as `load_adapter` takes it."""
    return Model(f"tiny-{kind}", ModelRunner(fresh_model(kind, **extra)), ByteTokenizer(), f"fp of {kind}", "bytes")


def own_file(acts="segment", marks=MARKS, **changes):
    """What `longstride.json` says."""
    return {"format": 1, "marks": [list(mark) for mark in marks], "acts": acts, "vocabulary": "bytes", **changes}


@torch.no_grad()
def save_adapter(folder: Path, kind="llama", *, seed=1, own=None, model=None, **lora):
    """Save an adapter of random numbers in `folder`; returns peft's own model with it."""
    plain = fresh_model(kind, **(model or {}))
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2", **lora}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for what it now calls otherwise
        adapted = get_peft_model(plain, LoraConfig(**settings)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "trainable_tokens" in name:
            parameter.normal_(0, 0.3)
    adapted.save_pretrained(folder)
    if own is not None:
        (folder / "longstride.json").write_text(json.dumps(own))
    adapted.set_attn_implementation("eager")
    return adapted


@torch.inference_mode()
def adapted_logits(model, ids, positions, visible, boundary=0, base=None):
    """Logits [rows - boundary, vocabulary] of peft's model, its adapter switched off for the rows before `boundary`; or
    those of `model` behind rows of `base`. Of all rows, without the adapter, where the boundary is their end."""
    bias = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
    cache = DynamicCache()

    def run(model, start, stop):
        return model(
            input_ids=torch.tensor([list(ids[start:stop])]),
            position_ids=torch.tensor([list(positions[start:stop])]),
            attention_mask=bias[:, :, start:stop, :stop],
            use_cache=True,
            **{CACHE: cache},
        ).logits[0]

    before = None
    if boundary:
        with model.disable_adapter() if base is None else nullcontext():
            before = run(base or model, 0, boundary)
    return run(model, boundary, len(ids)) if boundary < len(ids) else before
