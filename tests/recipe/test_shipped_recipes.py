"""The recipes at the paper's size: what they say, that they resolve, dry-run and plan where they cannot run."""

import re
from pathlib import Path
from typing import Any

import pytest
from config_fixtures import composed_once  # noqa: F401

from eaft_verl.cli import main
from eaft_verl.errors import ConfigError
from eaft_verl.planning.arm_plan import plan_arm
from eaft_verl.planning.machine import Machine
from eaft_verl.recipe.checks import check, pending
from eaft_verl.recipe.file import read_recipe
from eaft_verl.recipe.resolve import load_recipe, resolve

FOLDER = Path(__file__).parents[2] / "recipes"
PAPER = sorted(path for path in FOLDER.glob("*.yaml") if re.search("\nextends: (paper|math)", path.read_text("utf-8")))
ARMS = ["sft", "sft_kl", "flow", "dft", "talr", "masked", "eaft", "eaft_2", "eaft_3", "eaft_sigmoid", "grpo"]
A100 = Machine(1, 8, 80, "A100", 1000)
NAMES = ("agent_qwen3_4b", "lr_sweep_qwen3_4b", "math_glm4_9b", "math_qwen2_5_32b", "math_qwen3_4b")


@pytest.fixture(autouse=True)
def from_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(FOLDER.parent)
    monkeypatch.setenv("EAFT_DATA", str(tmp_path / "supplied"))


def resolved(name: str, arm: str = "sft", *overrides: str) -> Any:
    return resolve(load_recipe(FOLDER / f"{name}.yaml"), arm, overrides)


def test_they_are_there() -> None:
    assert [path.stem for path in PAPER] == [*NAMES, "medical_qwen3_4b_thinking"]


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_every_arm_is_sound_says_what_is_missing_and_stops_a_run(path: Path) -> None:
    recipe = load_recipe(path)
    for arm in recipe.arms:
        config = resolve(recipe, arm)
        check(config, dry_run=True)
        missing = pending(config)
        assert any("cluewsc" in message for message in missing)
        with pytest.raises(ConfigError) as refused:
            check(config)
        assert str(refused.value) == missing[0]


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_dry_run_warns_and_returns_zero(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "todo  base: evaluate" in shown.out
    assert shown.err.count("eaft: warning: a run would stop here: ") >= 2
    assert ("bfcl_v3" in shown.err) == (path.stem == "agent_qwen3_4b")
    assert main(["train", str(path), "--arm", "sft", "--dry-run"]) == 0
    assert main(["compare", str(path)]) == 2  # and nothing was made
    assert not (FOLDER.parent / "runs" / path.stem).exists()


@pytest.mark.parametrize("name", [*NAMES, "medical_qwen3_4b_thinking"])
def test_table_4_and_the_node_of_the_paper(name: str) -> None:
    config = resolved(name)
    optim, trainer = config.verl.optim, config.verl.trainer
    assert (optim.lr, optim.lr_scheduler_type, optim.lr_warmup_steps_ratio) == (1e-5, "cosine", 0.03)
    assert (optim.optimizer, config.verl.data.train_batch_size, trainer.total_epochs) == ("AdamW", 64, 10)
    assert (config.data.max_length, trainer.nnodes, trainer.n_gpus_per_node) == (16384, 1, 8)


def test_arms_of_each_recipe() -> None:
    for name in ("math_qwen3_4b", "math_glm4_9b", "math_qwen2_5_32b"):
        assert list(load_recipe(FOLDER / f"{name}.yaml").arms) == ARMS
    for name in ("medical_qwen3_4b_thinking", "agent_qwen3_4b"):
        assert list(load_recipe(FOLDER / f"{name}.yaml").arms) == ARMS[:-1]
    sweep = load_recipe(FOLDER / "lr_sweep_qwen3_4b.yaml")
    rates = {arm: resolve(sweep, arm).verl.optim.lr for arm in sweep.arms}
    assert rates == {
        **{"sft": 1e-5, "eaft": 1e-5, "sft_5e-6": 5e-6, "sft_1e-6": 1e-6},
        **{"eaft_5e-6": 5e-6, "eaft_1e-6": 1e-6},
    }


def test_models_benchmarks_and_the_anchor() -> None:
    models = {name: resolved(name).model for name in NAMES}
    assert models == {
        **dict.fromkeys(("agent_qwen3_4b", "lr_sweep_qwen3_4b", "math_qwen3_4b"), "Qwen/Qwen3-4B-Instruct-2507"),
        "math_glm4_9b": "zai-org/GLM-4-9B-0414",
        "math_qwen2_5_32b": "Qwen/Qwen2.5-32B-Instruct",
    }
    math = resolved("math_qwen3_4b", "sft_kl")
    assert math.objective.anchor == {"kind": "forward_kl", "coef": 0.5}
    assert list(math.evaluate.target) == ["aime24_boxed", "aime25_boxed", "gsm8k_boxed"]
    assert resolved("medical_qwen3_4b_thinking").model == "Qwen/Qwen3-4B-Thinking-2507"


def test_shared_settings_are_written_once() -> None:
    """No file repeats a value that what it extends says already."""

    def repeated(own: Any, base: Any, key: str = "") -> list[str]:
        if isinstance(own, dict) and isinstance(base, dict):
            return [hit for name in own if name in base for hit in repeated(own[name], base[name], f"{key}.{name}")]
        return [key] if own == base else []

    from omegaconf import OmegaConf

    for path in PAPER:
        own = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        assert repeated(own, read_recipe(path.parent / own.pop("extends"))) == [], path


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_every_arm_fits_on_eight_a100_with_a_terabyte(path: Path) -> None:
    recipe = load_recipe(path)
    for arm in recipe.arms:
        plan = plan_arm(resolve(recipe, arm), A100)
        assert plan.verdict == "fits", (arm, plan.reasons)


def test_32b_fits_only_because_of_what_its_recipe_says() -> None:
    plan = plan_arm(resolved("math_qwen2_5_32b", "sft", "verl.engine.offload_policy=false"), A100)
    assert plan.verdict == "no"
    two = Machine(2, 8, 80, "A100", 1000)
    wider = ("verl.engine.offload_policy=false", "verl.trainer.nnodes=2")
    assert plan_arm(resolved("math_qwen2_5_32b", "eaft", *wider), two).verdict == "fits"
    split = ("verl.engine.ulysses_sequence_parallel_size=2", "verl.data.max_token_len_per_gpu=8192")
    assert plan_arm(resolved("math_qwen2_5_32b", "sft_kl", *wider, *split), two).verdict == "fits"
    check(resolved("math_qwen2_5_32b", "sft_kl", *wider, *split), dry_run=True)


def test_supplied_files_are_looked_for_in_eaft_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert resolved("math_qwen3_4b").data.train == str(tmp_path / "supplied" / "math_19k.jsonl")
    monkeypatch.delenv("EAFT_DATA")
    assert resolved("math_qwen3_4b").data.train == "data/math_19k.jsonl"
    missing = pending(resolved("math_qwen3_4b"), elsewhere=True)
    assert missing[0] == "data.train='data/math_19k.jsonl' must be an absolute path on the cluster"


def test_the_shared_file_alone_is_no_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(FOLDER / "paper.yaml"), "--arm", "sft", "--dry-run"]) == 2
    assert "model is missing" in capsys.readouterr().err
