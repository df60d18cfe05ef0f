"""What is said of a model before anything is loaded: the fact, what is allowed, what to do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoConfig

from eaft_verl.errors import ConfigError
from eaft_verl.evaluation.model_files import positions_of
from eaft_verl.models import load_config, load_tokenizer, resolve_model
from eaft_verl.recipe.model_fit import check_model_fits, notes_at_hand, unpackable
from eaft_verl.recipe.resolve import load_recipe, resolve

RECIPE = """
model: {folder}
device: cpu
data: {{train: generate:sums_train, max_length: 128}}
evaluate: {{target: [sums]}}
verl: {{data: {{train_batch_size: 8, max_token_len_per_gpu: 256}}}}
arms:
  sft: {{objective: {{name: sft}}}}
  grpo: {{trainer: grpo, verl: {{data: {{max_response_length: 64}}}}}}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "model"))


def fits(model: Path, overrides: tuple[str, ...] = (), arm: str = "sft", **seen: Any) -> list[str]:
    recipe = model.parent / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=model), encoding="utf-8")
    return check_model_fits(resolve(load_recipe(recipe), arm, overrides), **seen)


def rewrite(model: Path, **changes: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes), encoding="utf-8")


def test_a_model_that_fits_has_no_notes(model: Path) -> None:
    assert fits(model, lengths=[100], largest_id=383) == []
    assert fits(model, arm="grpo") == []


def test_a_padded_embedding_is_fine(model: Path) -> None:
    rewrite(model, vocab_size=512)
    assert fits(model, largest_id=383) == []


def test_tokens_beyond_the_embedding(model: Path) -> None:
    """Used by the data they are refused; unused, as Gemma 3's one token for images, they are named."""
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["<|tok_a|>", "<|tok_b|>"])
    tokenizer.save_pretrained(model)
    with pytest.raises(
        ConfigError, match=r"has 386 tokens and its embedding 384 rows; .*'<\|tok_a\|>' \(384\), and the"
    ):
        fits(model, largest_id=384)
    (note,) = fits(model, largest_id=383)
    assert "386 tokens" in note and "384 rows" in note and "the data use none of these" in note


@pytest.mark.parametrize(
    ("overrides", "seen", "message"),
    [
        ((), {"lengths": [513]}, "knows 512 positions.*longest example has 513 tokens: set data.max_length=512"),
        (("verl.model.lora_rank=4", "verl.model.target_modules=[q_proj,nope]"), {}, "'nope' matches no module.*q_proj"),
        (("verl.model.lora_rank=4", "verl.model.target_modules=[lm_head]"), {}, "'lm_head' is on lm_head.*would lack"),
        (("verl.model.lora_rank=4", "verl.model.target_modules=[embed_tokens]"), {}, "is on model.embed_tokens"),
        (("verl.model.lora_rank=4", "verl.model.target_modules=.*head"), {}, "is on lm_head"),
    ],
)
def test_what_is_refused(model: Path, overrides: tuple[str, ...], seen: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fits(model, overrides, **seen)


@pytest.mark.parametrize("targets", ["all-linear", "[q_proj,v_proj]", "[self_attn.q_proj]", ".*[qv]_proj"])
def test_targets_that_exist(model: Path, targets: str) -> None:
    assert fits(model, ("verl.model.lora_rank=4", f"verl.model.target_modules={targets}")) == []


def test_notes_of_what_is_allowed(model: Path) -> None:
    long = ("data.max_length=1024", "verl.data.max_token_len_per_gpu=2048")
    assert "data.max_length=1024 allows more" in fits(model, long, lengths=[500])[0]
    assert "objective.k=1000 and the model has 384 tokens" in fits(model, ("objective.k=1000",))[0]


def test_grpo_needs_positions_for_prompt_and_response(model: Path) -> None:
    with pytest.raises(ConfigError, match="prompt and response may have 564 tokens together"):
        fits(model, ("verl.data.max_prompt_length=500",), "grpo")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"use_dora": True}, "use_dora=True, which the merged export would lack"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 8}, "lora_rank=4 and the adapter in .* has r=8"),
        ({"target_modules": ["lm_head"]}, "is on lm_head"),
        ({"use_rslora": True}, None),  # a scale, which the merge applies
    ],
)
def test_an_adapter_on_disk(model: Path, tmp_path: Path, stored: dict[str, Any], message: str | None) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    plain = {"peft_type": "LORA", "r": 4, "bias": "none", "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(plain | stored), encoding="utf-8")
    overrides = ("verl.model.lora_rank=4", f"verl.model.lora_adapter_path={adapter}")
    if message is None:
        assert fits(model, overrides) == []
    else:
        with pytest.raises(ConfigError, match=message):
            fits(model, overrides)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "names no `architectures`"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "a …ForCausalLM only"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "is an encoder-decoder"),
        ({"model_type": "nonesuch"}, "has no configuration .* that can be loaded"),
        ({"model_type": "nonesuch", "auto_map": {"AutoConfig": "a.B"}}, "code of its own, which is never run"),
    ],
)
def test_kinds_of_models(model: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(model, **changes)
    with pytest.raises(ConfigError, match=message):
        fits(model)


def test_attention_that_the_model_does_not_have(model: Path) -> None:
    rewrite(model, model_type="gptj", architectures=["GPTJForCausalLM"], n_embd=64, n_layer=2, n_head=4)
    with pytest.raises(ConfigError, match="GPTJForCausalLM has no attention sdpa: .*attn_implementation=eager"):
        fits(model)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("llama", {}, None),
        ("mistral", {"sliding_window": 16}, None),
        ("gpt_oss", {}, None),
        ("lfm2", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, "layers of kind conv"),
        ("qwen3_5_text", {}, "layers of kind linear_attention"),
        ("mamba", {}, "layers of kind mamba"),
        ("jamba", {}, "layers of kind mamba"),
        ("recurrent_gemma", {}, "layers of kind recurrent"),
        ("rwkv", {}, "RwkvForCausalLM carries state"),
        ("bloom", {}, "BloomForCausalLM takes no position_ids"),
    ],
)
def test_models_whose_rows_would_see_each_other(kind: str, changes: dict[str, Any], reason: str | None) -> None:
    assert unpackable(AutoConfig.for_model(kind, **changes)) == reason


def test_rope_scaling_adds_positions() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    assert positions_of(AutoConfig.for_model("qwen2")) == 32768
    assert positions_of(AutoConfig.for_model("qwen2", rope_parameters=yarn)) == 131072


def test_a_folder_without_tokenizer(model: Path) -> None:
    for file in model.glob("*token*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer \(tokenizer.json\) that can be loaded: there is no such"):
        load_tokenizer(model)


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match="not in the local cache and HF_HUB_OFFLINE is set; give a folder, or download"
    ):
        load_config(resolve_model("org/not-here"))
    recipe = model.parent / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder="org/not-here"), encoding="utf-8")
    assert notes_at_hand(resolve(load_recipe(recipe), "sft")) == []
