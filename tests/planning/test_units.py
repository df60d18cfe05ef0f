"""When a model is one FSDP unit, who may say otherwise, and what is refused."""

from pathlib import Path

import pytest
import tiny
from config_fixtures import composed_once  # noqa: F401

from eaft_verl.errors import ConfigError
from eaft_verl.planning import units
from eaft_verl.planning.arm_plan import plan_arm
from eaft_verl.planning.machine import Machine
from eaft_verl.planning.remedies import remedies
from eaft_verl.planning.units import one_unit
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.resolve import load_recipe, resolve

RECIPE = """
model: {model}
output: {folder}/out
data: {{train: {folder}/train.jsonl, max_length: 128}}
evaluate: {{target: [sums]}}
verl: {{data: {{train_batch_size: 8, max_token_len_per_gpu: 256}}}}
arms:
  sft: {{objective: {{name: sft}}}}
  grpo: {{trainer: grpo, verl: {{data: {{max_response_length: 16}}}}}}
"""
DISABLE = "verl.engine.wrap_policy.disable"


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_path: Path) -> Path:
    tiny.write_sums(tmp_path / "train.jsonl", 8, seed=1)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path, model=tiny_model_path))
    return path


def config(path: Path, *words: str, arm: str = "sft", device: str = "cuda") -> units.Config:
    return resolve(load_recipe(path), arm, [f"device={device}", "compare.match=none", *words])


def chosen(path: Path, *words: str, **where: str) -> bool:
    found = config(path, *words, **where)
    return one_unit(found, found.model)


def test_a_small_model_on_one_gpu_is_one_unit(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(recipe) and not chosen(recipe, device="cpu")
    parameters = units.architecture_of(config(recipe).model).parameters
    monkeypatch.setattr(units, "SMALL", parameters - 1)
    assert not chosen(recipe) and chosen(recipe, f"{DISABLE}=true")


ELSE = {
    "verl.trainer.n_gpus_per_node=2": "each of several devices",
    "verl.trainer.nnodes=2": "each of several devices",
    "verl.model.lora_rank=4": "leaves the root out",
    "verl.engine.offload_policy=true": "from the host",
    "verl.engine.param_offload=true": "from the host",
    "verl.engine.optimizer_offload=true": "from the host",
    "verl.model.enable_activation_offload=true": "no layers to offload",
}


@pytest.mark.parametrize("word", ELSE)
def test_what_needs_the_layers_keeps_them_and_one_unit_is_refused_there(recipe: Path, word: str) -> None:
    assert not chosen(recipe, word)
    with pytest.raises(ConfigError, match=f"disable=true .*{ELSE[word]}"):
        check(config(recipe, word, f"{DISABLE}=true"))
    check(config(recipe, word, f"{DISABLE}=false"))


def test_grpo_keeps_the_layers(recipe: Path) -> None:
    assert not chosen(recipe, arm="grpo")
    with pytest.raises(ConfigError, match="trainer: sft"):
        check(config(recipe, f"{DISABLE}=true", arm="grpo"))


def test_a_word_of_the_users_is_never_overruled(recipe: Path) -> None:
    assert not chosen(recipe, f"{DISABLE}=false") and chosen(recipe, f"{DISABLE}=true", device="cpu")
    check(config(recipe, f"{DISABLE}=true"))
    with pytest.raises(ConfigError, match="must be true"):
        check(config(recipe, f"{DISABLE}=1"))
    for key in ("min_num_params=8", "transformer_layer_cls_to_wrap=[LlamaDecoderLayer]"):
        with pytest.raises(ConfigError, match="has no effect"):
            config(recipe, f"verl.engine.wrap_policy.{key}")


def test_a_model_whose_size_is_not_known_is_wrapped_by_layers(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    assert not one_unit(config(recipe), str(tmp_path / "other"))


def test_the_plan_says_so_and_proposes_layers_where_they_fit(recipe: Path) -> None:
    """As one unit 24 bytes a parameter at the end of backward, with layers 16 and some of the embedding's."""
    several = [
        "model=HuggingFaceTB/SmolLM2-135M-Instruct",
        "verl.data.max_token_len_per_gpu=128",
        "verl.data.train_batch_size=64",
    ]
    whole, layers = (plan_arm(config(recipe, *several, *words), _machine(80.0)) for words in ([], [f"{DISABLE}=false"]))
    assert any("one FSDP unit" in note for note in whole.arm.notes)
    assert not any("one FSDP unit" in note for note in layers.arm.notes)
    assert whole.peak > layers.peak
    between = (whole.peak + layers.peak) / 2 / 0.95 / 2**30
    found = remedies(config(recipe, *several), _machine(between))
    assert [f"{DISABLE}=false"] in [remedy["overrides"] for remedy in found]


def _machine(gib: float) -> Machine:
    return Machine(1, 1, gib, "A100", None)
