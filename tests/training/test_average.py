"""Weight averages: both ends are the models bit for bit, the middle is computed in float64 here, and what cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from eaft_verl.errors import RunError
from eaft_verl.training.average import average_weights, mean
from eaft_verl.training.export import export_weights

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(an export in two shards' worth of bfloat16, the base that it comes from)."""
    folder = tmp_path_factory.mktemp("average")
    base, other = tiny.tiny_model(folder / "base", seed=0), tiny.tiny_model(folder / "other", seed=1)
    state = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).state_dict()
    state["model.norm.weight"][:3] = torch.tensor([-0.0, 0.0, 1e-30])  # a sum would lose the first one's sign
    export_weights(state.items(), folder / "tuned", str(base), "bfloat16", write=True)
    return folder / "tuned", base


def changed(folder: Path, target: Path, **tensors: Any) -> Path:
    """A copy of a model with some tensors replaced, or left out where None."""
    import shutil

    shutil.copytree(folder, target)
    state = load_file(folder / FILE) | tensors
    save_file({name: value for name, value in state.items() if value is not None}, target / FILE, {"format": "pt"})
    return target


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_every_weight(models: tuple[Path, Path], weight: float, tmp_path: Path) -> None:
    tuned, base = models
    average_weights(tuned, base, weight, tmp_path / "out")
    made, ours, theirs = (load_file(folder / FILE) for folder in (tmp_path / "out", tuned, base))
    assert made.keys() == ours.keys() and "lm_head.weight" not in made
    for name, value in made.items():
        exact = weight * ours[name].double() + (1 - weight) * theirs[name].double()
        assert value.dtype == ours[name].dtype == torch.bfloat16
        torch.testing.assert_close(value.double(), exact, rtol=2**-8, atol=1e-7)  # rounded once
        if weight in (0, 1):
            expected = ours[name] if weight else theirs[name].to(torch.bfloat16)
            assert torch.equal(value.view(torch.uint8), expected.contiguous().view(torch.uint8)), name
    if weight == 1:
        assert (tmp_path / "out" / FILE).read_bytes() == (tuned / FILE).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not list(tmp_path.glob(".*partial"))


def test_float32_is_computed_and_integers_are_not_averaged() -> None:
    low, high = torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([1.0078125, 4.0], dtype=torch.bfloat16)
    assert mean(high, low, 0.5).tolist() == [1.0, 3.0]  # half way between neighbours: to even
    assert mean(torch.tensor([7]), torch.tensor([7]), 0.5).tolist() == [7]
    wide = mean(torch.tensor([1.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64), 0.1)
    assert wide.dtype == torch.float64 and float(wide) == 2 + 0.1 * (1 - 2)


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({NAME: torch.full((128, 64), float("nan"), dtype=torch.bfloat16)}, f"{NAME} is not finite"),
        ({NAME: torch.zeros(64, 64)}, rf"{NAME} is \[128, 64\] in .*tuned and \[64, 64\]"),
        ({NAME: None}, f"has 1 tensors that .* lacks: {NAME}"),
        ({"model.more": torch.zeros(2)}, "has 1 tensors that .*tuned lacks: model.more"),
    ],
)
def test_what_has_no_average_is_named(models: tuple[Path, Path], tensors: Any, found: str, tmp_path: Path) -> None:
    other = changed(models[1], tmp_path / "other", **tensors)
    with pytest.raises(RunError, match=found):
        average_weights(models[0], other, 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_architectures_and_vocabularies(models: tuple[Path, Path], tmp_path: Path) -> None:
    wide = tiny.tiny_model(tmp_path / "wide", hidden=32)
    with pytest.raises(RunError, match=r"hidden_size 64 and .*wide 32: only models of one architecture"):
        average_weights(models[0], wide, 0.5, tmp_path / "out")
    other = changed(models[1], tmp_path / "words")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    left, right = list(vocabulary)[-2:]
    vocabulary[left], vocabulary[right] = vocabulary[right], vocabulary[left]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RunError, match="have different vocabularies"):
        average_weights(models[0], other, 0.5, tmp_path / "out")


def test_integer_buffers_must_agree(models: tuple[Path, Path], tmp_path: Path) -> None:
    mine = changed(models[0], tmp_path / "mine", counts=torch.tensor([1, 2]))
    same, other = (
        changed(models[1], tmp_path / name, counts=torch.tensor(values))
        for name, values in (("same", [1, 2]), ("other", [1, 3]))
    )
    average_weights(mine, same, 0.25, tmp_path / "out")
    assert load_file(tmp_path / "out" / FILE)["counts"].tolist() == [1, 2]
    with pytest.raises(RunError, match="counts holds I64, which is not averaged, and differs"):
        average_weights(mine, other, 0.25, tmp_path / "out2")
