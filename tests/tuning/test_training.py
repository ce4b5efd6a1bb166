"""Training: trees give the losses of separate examples and of the engine; a run that was killed ends the same."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import GraniteConfig, GraniteForCausalLM

from longstride.engine.adapter import load_adapter
from longstride.engine.model import PlainModel
from longstride.engine.tokenizer import Frame
from longstride.errors import BadInput, ModelError
from longstride.tuning.layouts import Layout, Scorer
from longstride.tuning.recipe import Recipe, Steps
from longstride.tuning.strides import Corpus, Places, Shape, Stride, Window
from longstride.tuning.training import Losses, Run, attach, plot, rate
from longstride.tuning.trees import Sample, tree
from longstride.tuning.turns import Turns
from tests.lora import tiny_loaded
from tests.processes import started
from tests.tiny import ByteTokenizer, fresh_model, tiny_assistant_model
from tests.tuning.test_layouts import MARKS, PROMPT, SHAPE, window
from tests.tuning.test_strides import text

OWN = ((262,), (263,))
ANSWER = (7, 8)
SMALL = Shape(window=40, strides=2, stride=6, query=12, passage=16, passages=2)


def plain(kind: str = "llama", **extra) -> PlainModel:
    return PlainModel(f"tiny-{kind}", fresh_model(kind, **extra), ByteTokenizer(), f"content of {kind}", "bytes")


def sample(layout: Layout, of: Window, marks=MARKS) -> Sample:
    found = [list(stride.found[: layout.passages]) for stride in of.strides]
    return Sample(layout, found, marks if layout.marks else ((), ()), PROMPT)


def losses(found: Losses, layout: Layout, of: Window, marks=MARKS) -> list[float]:
    grown = tree(of, sample(layout, of, marks), SHAPE)
    with torch.no_grad():
        logits, _ = found(grown)
    targets = torch.tensor([t for branch in grown.branches for t in branch.targets])
    return functional.cross_entropy(logits, targets, reduction="none").tolist()


KINDS = ["llama", "qwen2", "mistral", "gpt2", "opt"]
SPELLED = [
    "none",
    "prepend",
    "end,refresh=16",
    "end,refresh=0,passages=2",
    "turn",
    "beside",
    "beside,passages=2,refresh=3",
]


@pytest.mark.parametrize(
    ("kind", "spelled"),
    [*(("llama", one) for one in SPELLED), *((kind, "end,refresh=16") for kind in KINDS[1:]), ("gpt2", "beside")],
)
def test_a_tree_gives_the_losses_that_the_engine_gives_stride_by_stride(kind, spelled):
    layout = Layout.parse(spelled)
    recipe = Recipe(layout=replace(layout, source="found"), shape=SHAPE, acts="everywhere", dropout=0.0)
    engine = Scorer(tiny_loaded(kind), PROMPT, MARKS).score(window(), layout, SHAPE).losses
    fresh = attach(plain(kind), recipe, {})  # a fresh LoRA changes nothing
    assert losses(Losses(*fresh, recipe), layout, window()) == pytest.approx(engine, abs=2e-4)


def test_a_stride_without_passages_has_no_branch():
    of = window()
    bare = replace(of, strides=(of.strides[0], Stride(of.strides[1].targets, (), (), ()), of.strides[2]))
    grown = tree(bare, sample(Layout.parse("end,refresh=16"), bare), SHAPE)
    assert [branch.targets for branch in grown.branches] == [of.strides[0].targets, of.strides[2].targets]
    assert grown.ids == [*PROMPT, *of.text, *(t for s in of.strides for t in s.targets)][:-1]


def test_the_text_of_a_tree_predicts_the_targets_without_retrieval():
    of, layout = window(), Layout.parse("end,refresh=16")
    recipe = Recipe(layout=layout, shape=SHAPE, dropout=0.0)
    with torch.no_grad():
        _, base = Losses(*attach(plain(), recipe, {}), recipe)(tree(of, sample(layout, of), SHAPE))
    targets = torch.tensor([t for stride in of.strides for t in stride.targets])
    found = functional.cross_entropy(base, targets, reduction="none").tolist()
    expected = Scorer(tiny_loaded("llama"), PROMPT).score(of, Layout("none"), SHAPE).losses
    assert found == pytest.approx(expected, abs=2e-4)


# --- runs ---


def run(
    out: Path,
    kind: str = "llama",
    spelled: str = "end,passages=2",
    marks=OWN,
    prompt=PROMPT,
    model=None,
    shape=SMALL,
    **changes,
) -> Run:
    frame = Frame(tuple(prompt), ANSWER, ())
    recipe = Recipe(layout=Layout.parse(spelled), shape=shape, **{"steps": 4, "rank": 4, "rate": 1e-2, **changes})
    texts = [text(i) for i in range(3)]
    places = Places(texts, Corpus(texts, ByteTokenizer(), SMALL.passage), shape)
    manifest = {"base": "tiny", "model": "a tiny one", "data": [t.sha256 for t in texts], "vocabulary": "bytes"}
    turns = Turns(tiny_assistant_model(kind), frame) if recipe.layout.window else None
    return Run(plain(kind, **(model or {})), recipe, Steps(recipe, places, marks, frame, turns), marks, out, manifest)


@pytest.mark.parametrize(
    ("kind", "acts", "extra"),
    [
        *((kind, "segment", {}) for kind in KINDS),
        ("llama", "everywhere", {}),
        ("llama", "segment", {"tie_word_embeddings": True}),
    ],
)
def test_what_was_trained_is_what_the_engine_loads(kind, acts, extra, tmp_path):
    trained = run(tmp_path, kind, model=extra, acts=acts)
    trained.go()
    assert not (tmp_path / "checkpoint").exists()
    model = tiny_loaded(kind, **extra)
    adapter = load_adapter(tmp_path, model)
    assert adapter.marks == OWN
    assert adapter.placement == "end"
    assert adapter.acts == acts
    trained.model.eval()
    with torch.no_grad():
        for parameter in trained.parameters.values():
            parameter.copy_(parameter.half().float())  # as it is saved
    layout = Layout.parse("end,refresh=16")
    ours = Scorer(model, PROMPT).score(window(), layout, SHAPE, adapter).losses
    assert ours == pytest.approx(losses(trained.losses, layout, window(), OWN), abs=5e-4)
    assert ours != pytest.approx(Scorer(model, PROMPT, OWN).score(window(), layout, SHAPE).losses, abs=2e-2)


def test_training_brings_the_loss_down(tmp_path):
    one = run(tmp_path, steps=60, dropout=0.0, distil=0.0, chance=0.0)
    one.go()
    first, last = (sum(line["loss"] for line in part) / 10 for part in (one.log[:10], one.log[-10:]))
    assert last < first - 0.5


def test_distilling_brings_what_it_says_closer_to_the_teacher(tmp_path):
    one = run(tmp_path, steps=80, dropout=0.0, distil=1.0)
    one.go()
    first, last = (sum(line["apart"] for line in part) / 20 for part in (one.log[:20], one.log[-20:]))
    assert last < 0.8 * first


@pytest.mark.parametrize("spelled", ["none", "prepend"])
def test_the_controls_train_too(spelled, tmp_path):
    one = run(tmp_path, spelled=spelled, acts="everywhere")
    one.go()
    adapter = load_adapter(tmp_path, tiny_loaded("llama"))
    assert adapter.acts == "everywhere"
    assert not any(adapter.marks)


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_run_is_repeatable_and_another_seed_is_another_run(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, seed=seed).go()
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


class Stopped(Exception):
    """Stands for the end of the process between two steps."""


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(tmp_path, at, monkeypatch):
    monkeypatch.setattr("longstride.tuning.training.EVERY", 2)
    whole, broken = run(tmp_path / "whole", steps=6), run(tmp_path / "broken", steps=6)

    def stop(_line):
        if broken.step == at:
            raise Stopped

    with pytest.raises(Stopped):
        broken.go(stop)
    again = run(tmp_path / "broken", steps=6)
    assert again.step == at - at % 2 if at > 1 else again.step == 0
    again.go()
    whole.go()
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")


def test_a_killed_process_leaves_a_checkpoint_that_goes_on(tmp_path):
    """kill -9 at any moment, many times over; the end is that of an unbroken run."""
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from pathlib import Path\n"
        "import longstride.tuning.training as t; t.EVERY = 1\n"
        "from tests.tuning.test_training import run\n"
        "run(Path(sys.argv[1]), steps=80).go(lambda line: print('step', flush=True))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "killed")]
    for _ in range(3):
        with started(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            if not process.stdout.readline():
                break
            time.sleep(0.03)  # somewhere in the next step or its checkpoint; it is killed then
    run(tmp_path / "killed", steps=80).go()
    run(tmp_path / "whole", steps=80).go()
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.parametrize("name", ["longstride.json", "losses.json", "adapter_config.json", "adapter_model.safetensors"])
def test_an_end_that_was_killed_is_ended_by_the_next_run(tmp_path, name, monkeypatch):
    """Between any two of the files: a folder with weights is whole, one without goes on."""
    replaced = Path.replace

    def killed(self, target):
        if self.name == name and self.parent.name == ".finished":
            raise Stopped
        return replaced(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Stopped):
            run(tmp_path / "killed").go()
    assert not (tmp_path / "killed" / "adapter_model.safetensors").exists()
    again = run(tmp_path / "killed")
    assert again.step == again.recipe.steps
    again.go()
    run(tmp_path / "whole").go()
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )


def test_a_folder_in_use_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("longstride.tuning.training.EVERY", 1)
    begun = run(tmp_path)
    with pytest.raises(Stopped):
        begun.go(lambda _line: (_ for _ in ()).throw(Stopped) if begun.step == 2 else None)
    others = (
        ({"rate": 1e-3}, "recipe"), ({"marks": ((5,), (6,))}, "marks"), ({"prompt": []}, "prompt"),
    )  # fmt: skip
    for changes, what in others:
        with pytest.raises(BadInput, match=f"checkpoint of another run \\(another {what}\\)"):
            run(tmp_path, **changes)
    state = tmp_path / "checkpoint" / "state.json"
    state.write_text(state.read_text()[:-20])
    with pytest.raises(BadInput, match="is damaged"):
        run(tmp_path)
    done = tmp_path / "done"
    run(done).go()
    with pytest.raises(BadInput, match="holds an adapter already"):
        run(done)


def test_the_manifest_says_what_it_came_from(tmp_path):
    one = run(tmp_path)
    one.go()
    own = json.loads((tmp_path / "longstride.json").read_text())
    assert own["recipe"]["layout"] == asdict(Layout.parse("end,passages=2"))
    assert own["recipe"]["shape"]["window"] == SMALL.window
    assert own["data"] == [text(i).sha256 for i in range(3)]
    assert own["targets"] == sum(line["targets"] for line in one.log) == 4 * 2 * SMALL.stride
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == own["model"] == "a tiny one"  # and no folder of this machine


def test_the_two_rows_alone_are_saved_of_the_embedding(tmp_path):
    run(tmp_path).go()
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 2 * 4 * 64 * 264  # the embedding in fp32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "numbers from 1 on"),
        ({"rate": 0.0}, "the rate is above 0"),
        ({"dropout": 1.0}, "dropout lies between"),
        ({"distil": 1.5}, "distil and turns from 0 to 1"),
        ({"warmup": 1.0}, "warmup lies between"),
        ({"turns": -0.1}, "distil and turns from 0 to 1"),
        ({"modules": ("q_proj", "q_projection")}, "'q_projection' is no linear layer of this model; it has down_proj"),
        ({"modules": ("lm_head",)}, "'lm_head' is no linear layer"),
        ({"modules": ("embed_tokens",)}, "'embed_tokens' is no linear layer"),
        ({"spelled": "none"}, "no segment to act on"),
        ({"spelled": "end,source=oracle"}, "training takes place, passages"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(tmp_path, changes, message):
    with pytest.raises(BadInput, match=message):
        run(tmp_path, **changes)


def test_a_model_whose_logits_are_scaled_behind_the_head_is_refused():
    config = GraniteConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, logits_scaling=4.0,
    )  # fmt: skip
    scaled = PlainModel("scaled", GraniteForCausalLM(config).eval(), ByteTokenizer(), "content", "bytes")
    with pytest.raises(BadInput, match="scales its logits behind the head"):
        attach(scaled, Recipe(), {262: [1], 263: [2]})


@pytest.mark.parametrize("what", ["state.json", "state.safetensors"])
def test_a_damaged_checkpoint_is_refused_in_words(tmp_path, what, monkeypatch):
    monkeypatch.setattr("longstride.tuning.training.EVERY", 1)
    one = run(tmp_path)

    def stop(_line):
        if one.step == 2:
            raise Stopped

    with pytest.raises(Stopped):
        one.go(stop)
    file = tmp_path / "checkpoint" / what
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(BadInput, match="is damaged"):
        run(tmp_path)


def test_passages_as_long_as_the_window_are_refused():
    with pytest.raises(BadInput, match="as long as the window"):
        Recipe(shape=Shape(window=100, passage=100))


def test_turns_without_a_conversation_are_refused():
    places = Places([text(0)], Corpus([], ByteTokenizer(), SMALL.passage), SMALL)
    with pytest.raises(BadInput, match="turns need a conversation"):
        Steps(Recipe(shape=SMALL, turns=0.5), places, OWN)


def test_texts_in_which_nothing_is_found_are_refused(tmp_path):
    recipe = Recipe(layout=Layout.parse("end,refresh=16"), shape=SMALL, chance=0.0)
    lone = replace(text(0), body="a b c d. " * 150)  # single letters are no words
    places = Places([lone], Corpus([], ByteTokenizer(), SMALL.passage), SMALL)
    with pytest.raises(BadInput, match="found no passage"):
        Steps(recipe, places, OWN)(0)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(ModelError, match="is not finite; train again with a lower --rate"):
        run(tmp_path, rate=1e30, steps=8, warmup=0.0).go()


def test_the_rate_warms_up_and_falls_to_nothing():
    recipe = Recipe(steps=100, rate=1.0, warmup=0.1)
    rates = [rate(recipe, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.01


def test_the_plot_is_written(tmp_path):
    plot([{"loss": 3.0 - i / 10, "none": 2.5} for i in range(9)], tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes()[:4] == b"\x89PNG"
