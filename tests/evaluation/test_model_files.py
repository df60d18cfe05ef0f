"""Whether a model's files hold all weights, judged by their headers: every way in which they may not, and none more."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_models
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from eaft_verl.errors import ConfigError
from eaft_verl.evaluation.model_files import CHECKSUMS, check_model_files, write_checksums

ONE, PICKLE, INDEX = "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"
SMALL: dict[str, Any] = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
KINDS: dict[str, dict[str, Any]] = {  # experts that are stored apart and loaded as one, tied heads, other layers
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "gemma3_text": {"head_dim": 16},
    "llama": {"tie_word_embeddings": True},
    "mamba": {},
}


@pytest.fixture
def model(tmp_path: Path, tiny_model_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_model_path, tmp_path / "model"))


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """The weights of a folder, changed."""
    state = load_file(folder / ONE)
    change(state)
    save_file(state, folder / ONE, metadata={"format": "pt"})


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("family", family_models.FAMILIES)
def test_a_whole_model_of_a_recipe_passes(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_model_files(family_models.family_model(tmp_path / "model", family))
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model_of_another_kind_passes(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **KINDS[kind])).save_pretrained(tmp_path)
    check_model_files(tmp_path)
    assert "warning" not in capsys.readouterr().err


def test_shards_and_pickled_tensors_pass(model: Path, tmp_path: Path) -> None:
    state = load_file(model / ONE)
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    check_model_files(tmp_path / "shards")
    (model / ONE).unlink()
    torch.save(state, model / PICKLE)
    check_model_files(model)
    check_model_files("org/not-here")  # nothing is known of it yet


def test_a_weight_that_is_missing_or_of_another_shape_is_named(model: Path) -> None:
    changed(model, lambda state: state.update({"model.norm.weight": state["model.norm.weight"][:32].clone()}))
    with pytest.raises(
        ConfigError, match=r"has other shapes than .*: model\.norm\.weight is \[32\], not \[64\]\. They"
    ):
        check_model_files(model)
    changed(model, lambda state: state.pop("model.norm.weight"))
    with pytest.raises(ConfigError, match=r"lacks weights that its config\.json describes: model\.norm\.weight\. They"):
        check_model_files(model)


def test_a_head_is_missed_only_where_it_is_not_tied(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(ConfigError, match=r"lacks weights .*: lm_head\.weight\."):
        check_model_files(model)


def test_layers_that_are_not_used_are_said(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1, "layer_types": None}))
    check_model_files(model)
    assert "which are not used: model.layers.1.input_layernorm.weight" in capsys.readouterr().err


def shard_index(model: Path, text: str) -> None:
    (model / ONE).unlink()
    (model / INDEX).write_text(text)


def bomb(model: Path, save: Callable[[Any, Path], object]) -> None:
    (model / ONE).unlink()
    save(Bomb(model / "RAN"), model / PICKLE)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda m: (m / ONE).write_bytes((m / ONE).read_bytes()[:-9]), rf"{ONE} is damaged .*not fully"),
    "empty": (lambda m: (m / ONE).write_bytes(b""), f"{ONE} is damaged"),
    "a pointer of git lfs": (
        lambda m: (m / ONE).write_text("version https://git-lfs.github.com/spec/v1"),
        "is damaged",
    ),
    "no weights": (lambda m: (m / ONE).unlink(), "has no weights"),
    "an index of nothing": (lambda m: shard_index(m, "{}"), f"{INDEX} is damaged"),
    "an empty index": (lambda m: shard_index(m, ""), f"{INDEX} is damaged"),
    "a lost shard": (lambda m: shard_index(m, '{"weight_map": {"a": "x-1"}}'), "lacks 1 of 1 files .*, first x-1"),
    "a pickle": (lambda m: bomb(m, lambda b, p: p.write_bytes(pickle.dumps(b))), "pickle of anything but tensors"),
    "a zipped pickle": (lambda m: bomb(m, torch.save), "pickle of anything but tensors"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_named_and_nothing_is_run(model: Path, name: str) -> None:
    damage, said = DAMAGE[name]
    damage(model)
    with pytest.raises(ConfigError, match=f"{said}.*again$"):
        check_model_files(model)
    assert not (model / "RAN").exists()


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda at: flipped(at / ONE), f"{ONE} is not as it was exported"),
        (lambda at: flipped(at / "config.json"), "config.json is not as it was exported"),
        (lambda at: (at / "tokenizer.json").unlink(), "tokenizer.json is missing: the model is not used"),
        (lambda at: (at / CHECKSUMS).write_text("{"), f"{CHECKSUMS} is damaged"),
        (lambda at: (at / CHECKSUMS).write_text("[1]"), f"{CHECKSUMS} is damaged"),
    ],
)
def test_an_export_that_is_not_as_it_was_written_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object], said: str
) -> None:
    monkeypatch.setenv("EAFT_CACHE", str(tmp_path / "cache"))
    write_checksums(model)
    check_model_files(model)
    check_model_files(shutil.copytree(model, tmp_path / "copy"))
    (model / "README.md").write_text("a card")  # what is added is nobody's weight
    check_model_files(model)
    damage(model)
    with pytest.raises(ConfigError, match=said):
        check_model_files(model)


def test_bytes_that_were_read_are_known_by_size_and_times(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EAFT_CACHE", str(tmp_path / "cache"))
    write_checksums(model)
    check_model_files(model)
    monkeypatch.setattr("eaft_verl.files.bytes_hash", lambda file: pytest.fail(f"{file} is read again"))
    check_model_files(model)
