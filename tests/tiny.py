"""Tiny random models and a byte tokenizer."""

from collections.abc import Sequence
from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longstride.engine.model import Model
from longstride.engine.runner import ModelRunner
from longstride.engine.tokenizer import Frame

POSITIONS = 1024
_COMMON = {"vocab_size": 264, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
_GROUPED = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
CONFIGS = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": POSITIONS},
    "mistral": {**_GROUPED, "sliding_window": None},
    "opt": {
        "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 96, "word_embed_proj_dim": 64,
        "max_position_embeddings": POSITIONS,
    },
}  # fmt: skip


def fresh_model(kind: str, **extra):
    """A tiny random causal LM in fp32, the same weights each time."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**CONFIGS.get(kind, {}), **_COMMON, **extra})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # the default initialisation is so small that every context would give the same logits
            if parameter.dim() > 1:
                parameter.mul_(4)
            if kind == "llama":
                parameter.data = parameter.data.half().float()  # its layers are the compiled ones then, others' are not
    return model


@cache
def tiny_model(kind: str):
    """(plain model, runner over another copy of it)."""
    plain = fresh_model(kind)
    plain.set_attn_implementation("eager")
    return plain, ModelRunner(fresh_model(kind))


@torch.inference_mode()
def reference_logits(model, ids: Sequence[int], positions: Sequence[int], visible: torch.Tensor) -> torch.Tensor:
    """One fresh forward over everything: logits [rows, vocabulary]. `visible`: bool [rows, rows], or what is added."""
    bias = visible
    if visible.dtype == torch.bool:
        bias = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    out = model(
        input_ids=torch.tensor([list(ids)]),
        position_ids=torch.tensor([list(positions)]),
        attention_mask=bias[None, None],
        use_cache=False,
    )
    return out.logits[0]


class ByteTokenizer:
    """One id a byte; 256 begins, 257 ends, 258 to 261 frame a conversation."""

    eos = frozenset({257})
    special = frozenset(range(256, 264))
    spare = (261, 262, 263)
    size = 264

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def frame(self, system: str) -> Frame:
        return Frame((256, *self.encode(system[:8]), 258), (259,), (260,))


@cache
def tiny_assistant_model(kind: str = "llama") -> Model:
    """A tiny model as `Assistant.open(model=...)` takes it."""
    return Model(f"tiny-{kind}", tiny_model(kind)[1], ByteTokenizer(), f"fingerprint of {kind}", "bytes")


def halved(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers in fp32 that fp16 holds without loss."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half().float()
