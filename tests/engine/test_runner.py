"""The runner on model families, several slices a forward, and models it must refuse."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longstride.engine.attention import Slice
from longstride.engine.cache import CacheLayout, KVCache, LayerShape
from longstride.engine.fuse import Block
from longstride.engine.runner import ModelRunner, refuse_untruncatable
from longstride.errors import ContextFull, ModelError
from tests.tiny import CONFIGS, fresh_model

GROUPED = {
    **CONFIGS["llama"],
}
FAMILIES = {
    "llama": CONFIGS["llama"],
    "qwen2": CONFIGS["qwen2"],
    "gpt2": CONFIGS["gpt2"],
    "mistral": {**GROUPED, "sliding_window": None},
    "qwen3": {**GROUPED, "head_dim": 16},
    "phi3": GROUPED,
    "gpt_neox": {**GROUPED},
    "opt": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 96,
            "word_embed_proj_dim": 64, "max_position_embeddings": 1024},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_one_forward_carries_sessions_drafts_and_chunks(family):
    """A chunk of one session, a whole prefill of another and two sibling drafts equal the plain model."""
    plain = fresh_model(family, **FAMILIES[family])
    runner = ModelRunner(fresh_model(family, **FAMILIES[family]))
    torch.manual_seed(3)
    one, two = torch.randint(3, 255, (40,)).tolist(), torch.randint(3, 255, (23,)).tolist()
    with torch.inference_mode():
        expected_one, expected_two = (plain(input_ids=torch.tensor([ids])).logits[0] for ids in (one, two))
        drafts = [plain(input_ids=torch.tensor([[*one, d]])).logits[0, -1] for d in (7, 9)]
    a, b = KVCache(runner.layout, 128), KVCache(runner.layout, 128)
    runner.forward([Slice(a, one[:30], range(30), 0)])
    assert a.length == 30
    rest, whole = runner.forward(
        [Slice(a, one[30:], range(30, 40), 30, logits=10), Slice(b, two, range(23), 0, logits=23)]
    )
    torch.testing.assert_close(rest, expected_one[30:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole, expected_two, atol=1e-4, rtol=1e-4)
    (siblings,) = runner.forward([Slice(a, [7, 9], [40, 40], 40, mask=torch.eye(2).bool(), logits=2)])
    torch.testing.assert_close(siblings, torch.stack(drafts), atol=1e-4, rtol=1e-4)
    a.truncate(20)
    (again,) = runner.forward([Slice(a, one[20:], range(20, 40), 20, logits=20)])
    torch.testing.assert_close(again, expected_one[20:], atol=1e-4, rtol=1e-4)


def test_visible_ranges_hide_rows():
    """An anchor-like slice that sees the first 4 and the last 3 rows only."""
    plain = fresh_model("llama")
    runner = ModelRunner(fresh_model("llama"))
    ids = list(range(10, 30))
    cache = KVCache(runner.layout, 64)
    runner.forward([Slice(cache, ids[:19], range(19), 0)])
    (ours,) = runner.forward([Slice(cache, ids[19:], [19], 19, visible=((0, 4), (16, 19)), logits=1)])
    mask = torch.ones(20, 20).tril().bool()
    mask[19, 4:16] = False
    bias = torch.zeros(20, 20).masked_fill(~mask, torch.finfo(torch.float32).min)
    plain.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = plain(input_ids=torch.tensor([ids]), attention_mask=bias[None, None]).logits[0, -1:]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("half", [False, True])
def test_fusing_changes_nothing_but_speed(family, half):
    plain, fused = fresh_model(family, **FAMILIES[family]), fresh_model(family, **FAMILIES[family])
    for model in (plain, fused) if half else ():
        for parameter in model.parameters():
            parameter.data = parameter.data.half().float()
    runner = ModelRunner(fused)
    assert len([layer for layer in runner.model.modules() if isinstance(layer, Block)]) == 2
    for n in (1, 5, 40):
        ids = torch.randint(3, 255, (n,)).tolist()
        (logits,) = runner.forward([Slice(KVCache(runner.layout, 64), ids, range(n), 0, logits=n)])
        with torch.inference_mode():
            expected = plain(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)


def test_a_layer_that_computes_something_else_is_left_as_it_is():
    """Granite has Llama's parts but scales what it adds to the residual stream."""
    settings = {**CONFIGS["llama"], "residual_multiplier": 0.3}
    plain, runner = fresh_model("granite", **settings), ModelRunner(fresh_model("granite", **settings))
    assert not any(isinstance(layer, Block) for layer in runner.model.modules())
    (logits,) = runner.forward([Slice(KVCache(runner.layout, 64), [5, 6, 7], range(3), 0, logits=3)])
    with torch.inference_mode():
        torch.testing.assert_close(logits, plain(torch.tensor([[5, 6, 7]])).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (AutoConfig.for_model("mistral", sliding_window=32), "sliding window of 32"),
        (AutoConfig.for_model("gemma2"), "sliding_attention"),
        (AutoConfig.for_model("qwen3_next"), "linear_attention"),
    ],
)
def test_models_that_cannot_be_truncated_are_refused_by_layer_type(config, named):
    with pytest.raises(ModelError, match=named):
        refuse_untruncatable(config)


def test_a_recurrent_model_is_refused():
    config = AutoConfig.for_model(
        "mamba", hidden_size=32, num_hidden_layers=2, vocab_size=264, state_size=4, max_position_embeddings=64
    )
    with pytest.raises(ModelError, match=r"cannot be|attention|cache"):
        ModelRunner(AutoModelForCausalLM.from_config(config))


def test_a_forward_past_the_limit_changes_nothing():
    runner = ModelRunner(fresh_model("llama"))
    cache = KVCache(runner.layout, 8, initial=4)
    runner.forward([Slice(cache, [1, 2, 3], range(3), 0)])
    held = cache.read_rows(0, 3)
    with pytest.raises(ContextFull, match="at most 8"):
        runner.forward([Slice(cache, list(range(6)), range(3, 9), 3)])
    assert cache.length == 3
    assert torch.equal(cache.read_rows(0, 3), held)
    cache.check_integrity()


def test_the_cache_grows_and_keeps_its_rows():
    runner = ModelRunner(fresh_model("llama"))
    cache = KVCache(runner.layout, 600, initial=4)
    runner.forward([Slice(cache, [1, 2, 3], range(3), 0)])
    held, before = cache.read_rows(0, 3), cache.allocated_bytes
    cache.reserve(500)
    assert torch.equal(cache.read_rows(0, 3), held)
    assert before == 4 * runner.layout.row_bytes
    assert cache.allocated_bytes == 500 * runner.layout.row_bytes
    cache.check_integrity()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_rows_are_written_one_behind_the_other(dtype):
    """Several at once are what each alone would be."""
    layout = CacheLayout((LayerShape(2, 8, 4), LayerShape(1, 6, 6)), dtype, torch.device("cpu"))
    source, one, two = (KVCache(layout, 64) for _ in range(3))
    for buffer in (*source.keys, *source.values):
        buffer.normal_()
    copies = [source.read_rows(at, at + 5) for at in (3, 20, 11)]
    assert one.write_rows(7, torch.stack(copies)) == 15
    for i, copy in enumerate(copies):
        assert two.write_rows(7 + 5 * i, copy) == 5
    assert torch.equal(one.read_rows(7, 22), two.read_rows(7, 22))
    assert torch.equal(one.read_rows(12, 17), copies[1])


def test_what_a_step_costs_is_known_before_the_first():
    runner = ModelRunner(fresh_model("llama"))
    guessed = runner.costs.terms.copy()
    runner.calibrate()
    assert runner.costs.terms.tolist() != guessed.tolist()
    curve = runner.costs.curve(1, 100)
    assert 0 < curve(0) <= curve(8) < curve(64)
