"""The order of a comparison's stages, what it refuses before it starts, and what becomes of arms that fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from config_fixtures import composed_once  # noqa: F401
from omegaconf import OmegaConf
from reporting.fake_runs import make_arm, make_base

from eaft_verl.cli import main
from eaft_verl.errors import ConfigError
from eaft_verl.evaluation.settings import evaluation_key
from eaft_verl.experiment.compare import in_order
from eaft_verl.experiment.processes import CAUSE_FILE, LOG_FILE
from eaft_verl.experiment.stages import Stage, run
from eaft_verl.models import model_key
from eaft_verl.recipe.resolve import load_recipe, resolve
from eaft_verl.recipe.views import evaluate_settings
from eaft_verl.runs import Run

RECIPE = """
model: {model}
output: {output}
device: cpu
data: {{train: generate:sums_train, max_length: 64}}
evaluate: {{target: [sums]}}
compare: {{match: tokens, to: eaft}}
verl: {{data: {{train_batch_size: 4, max_token_len_per_gpu: 64}}}}
arms:
  slow: {{control: {{of: eaft, by: nll}}}}
  sft: {{objective: {{name: sft}}}}
  eaft: {{objective: {{name: eaft}}}}
"""


@pytest.fixture(autouse=True)
def any_model_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes' model is a folder with an empty config.json."""
    monkeypatch.setattr("eaft_verl.experiment.compare.notes_at_hand", lambda config: [])
    monkeypatch.setattr("eaft_verl.experiment.compare.fits_beside", lambda config: False)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "r.yaml").write_text(RECIPE.format(model=tmp_path / "model", output=tmp_path / "out"))
    return tmp_path / "r.yaml"


def configs(recipe: Path, arms: list[str], seeds: list[int]) -> list[Any]:
    loaded = load_recipe(recipe)
    return [resolve(loaded, arm, [f"seed={seed}"]) for arm in arms for seed in seeds]


def test_budget_first_then_arms_then_controls(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(recipe), "--seeds", "0,1", "--dry-run"]) == 0
    stages = [line.split()[1].rstrip(":") for line in capsys.readouterr().out.splitlines() if ": train" in line]
    assert stages == ["eaft-seed0", "eaft-seed1", "sft-seed0", "sft-seed1", "slow-seed0", "slow-seed1"]


def test_an_arm_that_the_others_need_must_be_there_or_finished(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="arm sft seed 0 needs eaft-seed0, which is neither among the arms and seeds"):
        in_order(configs(recipe, ["sft"], [0]))
    run = Run.create(recipe.parent / "out" / "eaft-seed0", info={"kind": "arm"}, config="a: 1\n", env={})
    with pytest.raises(ConfigError, match="needs eaft-seed0"):
        in_order(configs(recipe, ["slow"], [0]))
    run.update(status="finished")
    assert [config.arm for config in in_order(configs(recipe, ["slow", "sft"], [0]))] == ["sft", "slow"]


def test_seeds_that_do_not_fit_are_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="arm slow seed 1 needs eaft-seed1"):
        in_order([*configs(recipe, ["slow"], [1]), *configs(recipe, ["eaft"], [0])])
    assert main(["compare", str(recipe), "--seeds", "0,1,0", "--dry-run"]) == 2
    assert "--seeds 0,1,0 names a seed twice" in capsys.readouterr().err


def as_asked(recipe: Path, name: str, *overrides: str) -> Run:
    """A made-up run of the output folder becomes what the recipe asks for."""
    arm = name.partition("-")[0]
    config = resolve(load_recipe(recipe), "sft" if arm == "base" else arm, overrides)
    run = Run(recipe.parent / "out" / name)
    (run.path / "config.yaml").write_text(OmegaConf.to_yaml(config))
    keys = {"model": model_key(config.model), "evaluation": evaluation_key(evaluate_settings(config))}
    run.update(keys={**run.info["keys"], **keys}, evaluated=True)
    return run


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every stage is a process that fails at once, as a broken arm's would; what was started is noted."""
    started: list[str] = []

    def broken(command: list[str], *rest: Any, **named: Any) -> int:
        started.append(" ".join(command[4:]))
        return subprocess.run([sys.executable, "-c", "raise SystemExit(3)"], check=False).returncode

    monkeypatch.delenv(CAUSE_FILE, raising=False)

    monkeypatch.setattr("eaft_verl.experiment.stages.run_stage", broken)
    return started


def test_the_others_go_on_and_the_report_names_what_failed(
    recipe: Path, stages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = recipe.parent / "out"
    make_base(output / "base")
    as_asked(recipe, "base")
    for arm in ("sft", "eaft"):
        make_arm(output / f"{arm}-seed0", arm)
    as_asked(recipe, "sft-seed0")
    as_asked(recipe, "eaft-seed0").update(error="evaluation: RunError: no such task", evaluated=False)
    assert main(["compare", str(recipe)]) == 1
    assert len(stages) == 2  # eaft's evaluation, slow's training; the rest was done
    assert stages[0].startswith("evaluate") and "--arm slow" in stages[1]
    report = json.loads((output / "report" / "report.json").read_text())
    assert report["arms"] == ["sft"]
    causes = {row["run"]: row["error"] for row in report["failed"]}
    assert causes == {
        "eaft-seed0": "evaluation: RunError: no such task",
        "slow-seed0": "slow-seed0: train ended before it had a run directory, exit code 3; see its messages",
    }
    assert "failed: eaft-seed0: evaluation: RunError: no such task; run the same command" in capsys.readouterr().err
    page = (output / "report" / "report.html").read_text()
    assert "evaluation: RunError: no such task" in page and "exit code 3" in page


def test_an_error_before_there_is_a_run_reaches_the_report(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = recipe.parent / "out"
    make_base(output / "base")
    as_asked(recipe, "base")
    for arm in ("sft", "eaft"):
        make_arm(output / f"{arm}-seed0", arm)
        as_asked(recipe, f"{arm}-seed0")
    # the real command, which finds that the model cannot be trained before it makes a run directory
    assert main(["compare", str(recipe)]) == 1
    (row,) = json.loads((output / "report" / "report.json").read_text())["failed"]
    assert row["run"] == "slow-seed0" and not (output / "slow-seed0").exists()
    assert row["error"].split(":")[0] in ("ConfigError", "RunError") and len(row["error"]) > 30
    assert CAUSE_FILE not in os.environ


def test_what_needs_a_failed_run_is_not_started(recipe: Path, stages: list[str]) -> None:
    output = recipe.parent / "out"
    make_base(output / "base")
    as_asked(recipe, "base")
    assert main(["compare", str(recipe)]) == 1
    assert len(stages) == 1 and "--arm eaft" in stages[0]
    assert not (output / "report").exists()  # there is nothing to report


def test_what_a_stage_prints_goes_to_its_log_where_somebody_looks_at_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = Stage("base: evaluate", tmp_path / "base", ("evaluated", True), ["recipes"])
    assert run(stage, 0) is None
    capsys.readouterr()
    assert not (tmp_path / "logs").exists()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert run(stage, 0) is None
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2 and shown[0] == "[base: evaluate]" and shown[1].startswith("[base: evaluate] done, ")
    assert "quickstart" in (tmp_path / "logs/base-evaluate.log").read_text()
    assert LOG_FILE not in os.environ
