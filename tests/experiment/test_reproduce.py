"""A run made once more: which verdict each number gets, and what is refused by name before anything is trained."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from config_fixtures import composed_once  # noqa: F401
from experiment.test_stored import finished, recipe  # noqa: F401
from reporting.fake_runs import edit, edit_samples, make_arm, make_base

from eaft_verl.cli import main
from eaft_verl.experiment.environment import describe
from eaft_verl.experiment.same_numbers import compared, summary, table
from eaft_verl.files import write_json
from eaft_verl.runs import Run

NLL = "step 12 heldout nll"
RIGHT = "step 12 chain_sum exact_match"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Run, Run]:
    """An arm beside its base, whose noise is known, and a copy of the arm elsewhere."""
    make_base(tmp_path / "first" / "base")
    first = make_arm(tmp_path / "first" / "sft", "sft")
    noise = {"kl": 1e-4, "agreement": 0.99, "nll": 1e-3, "questions": 32}
    accuracy = {"chain_sum": {"changed": 2, "n": 40, "difference": 0.0}}
    write_json(tmp_path / "first" / "base" / "eval" / "noise.json", {**noise, "accuracy": accuracy})
    shutil.copytree(first, tmp_path / "second" / "sft")
    return Run(first), Run(tmp_path / "second" / "sft")


def verdicts(first: Run, second: Run) -> dict[str, str]:
    return {row["metric"]: row["verdict"] for row in compared(first, second) if row["verdict"] != "bit-equal"}


def test_a_copy_is_bit_equal_and_the_clock_is_not_compared(pair: tuple[Run, Run]) -> None:
    first, second = pair
    rows = [*second.metrics(), *second.metrics("val")]
    (second.path / "metrics.jsonl").write_text(
        "".join(json.dumps({**row, "seconds": 9e9, "step_s": 1.0, "time": 0}) + "\n" for row in rows)
    )
    found = compared(first, second)
    assert {row["verdict"] for row in found} == {"bit-equal"} and table(found) == []
    assert summary(found) == f"{len(found)} numbers: {len(found)} bit-equal" and len(found) > 20
    assert not {row["metric"] for row in found} & {"train seconds", "train time", "train step_s", "train memory_gib"}
    assert {"train nll", NLL, RIGHT, "step 3 drift kl"} <= {row["metric"] for row in found}


def scaled(metric: str, factor: float) -> Callable[[Any], Any]:
    def change(record: dict[str, Any]) -> dict[str, Any]:
        record["metrics"][metric]["score"] *= factor
        return record

    return change


@pytest.mark.parametrize(
    ("benchmark", "metric", "factor", "verdict"),
    [
        ("heldout", "nll", 1 + 9e-6, "rounding"),
        ("heldout", "nll", 1 + 9e-4, "noise floor"),  # of 1.05 nats: 0.000945, the floor is 0.001
        ("heldout", "nll", 1 + 1e-3, "different"),
        ("drift", "kl", 1 + 4e-4, "noise floor"),  # of 0.21: 0.000084, the floor is 0.0001
        ("drift", "kl", 1 + 6e-4, "different"),
        ("ifeval", "exact_match", 1 + 9e-4, "different"),  # its noise was not measured
    ],
)
def test_verdicts_of_scores(pair: tuple[Run, Run], benchmark: str, metric: str, factor: float, verdict: str) -> None:
    edit(pair[1].path / "eval" / "step_000012" / f"{benchmark}.json", scaled(metric, factor))
    assert verdicts(*pair) == {f"step 12 {benchmark} {metric}": verdict}


@pytest.mark.parametrize(("answers", "verdict"), [(2, "noise floor"), (3, "different")])
def test_answers_that_change_places_count_though_the_mean_stays(
    pair: tuple[Run, Run], answers: int, verdict: str
) -> None:
    def flip(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for row in rows[:answers]:
            row["scores"]["exact_match"] = 1.0 - row["scores"]["exact_match"]
        return rows

    edit_samples(pair[1].path / "samples" / "step_000012" / "chain_sum.jsonl", flip)
    row = next(row for row in compared(*pair) if row["metric"] == RIGHT)
    assert (row["verdict"], row["difference"], row["floor"]) == (verdict, answers / 40, 2 / 40)
    assert row["changed"] == f"{answers} of 41"


def test_what_is_missing_is_different(pair: tuple[Run, Run]) -> None:
    (pair[1].path / "eval" / "step_000012" / "mmlu.json").unlink()
    (pair[1].path / "samples" / "step_000012" / "mmlu.jsonl").unlink()
    rows = [row for row in pair[1].metrics() if row["step"] < 12]
    (pair[1].path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = verdicts(*pair)
    assert found["step 12 mmlu exact_match"] == "different" and found["train nll"] == "different"
    shutil.rmtree(pair[0].path.parent / "base")
    edit(pair[1].path / "eval" / "step_000012" / "heldout.json", scaled("nll", 1 + 9e-4))
    assert verdicts(*pair)[NLL] == "different", "without the base's noise there is no floor"


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["reproduce", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("eaft: error: ")
    return said[-1]


def test_what_is_another_one_is_named_before_anything_runs(
    recipe: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = finished(recipe, "sft")
    write_json(run.path / "env.json", {**describe(), "python": "3.9.1", "cpus": 999})
    folder = str(run.path)
    monkeypatch.setattr("eaft_verl.experiment.reproduce.run_stage", lambda command: pytest.fail("started"))
    said = refused(capsys, folder, "seed=1", "verl.optim.lr=1e-3")
    for words in ("seed=0 (now 1)", "verl.optim.lr=1e-05 (now 0.001)", "python=3.9.1 (now", "--force"):
        assert words in said
    assert "cpus" not in said, "another machine is no reason"
    (recipe.parent / "model" / "model.safetensors").write_bytes(bytes(101))
    assert "model: the files of model=" in refused(capsys, folder)
    assert "has no setting verl.optim.rate" in refused(capsys, folder, "verl.optim.rate=1")
    assert "must be key=value" in refused(capsys, folder, "seed=1", "=1")
    assert "'seed=[1': " in refused(capsys, folder, "seed=[1")
    assert "the run has seed=0; give a value of the same kind" in refused(capsys, folder, "seed=one")
    assert "holds the run itself" in refused(capsys, folder, "--output", str(run.path.parent))
    run.update(status="interrupted")
    assert "only a finished run can be reproduced" in refused(capsys, folder)
    assert "is not a run directory" in refused(capsys, str(recipe.parent))


def test_force_goes_on_and_hands_the_exit_code_of_a_stage_on(
    recipe: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    run, started = finished(recipe, "sft"), []
    write_json(run.path / "env.json", {**describe(), "code": "0" * 16})
    monkeypatch.setattr("eaft_verl.experiment.reproduce.run_stage", lambda command: started.append(command) or 7)
    words = ["reproduce", str(run.path), "seed=1", "--output", str(tmp_path / "again"), "--force"]
    assert main(words) == 7 and len(started) == 1
    said = capsys.readouterr().err
    assert "warning: made otherwise: seed=0 (now 1)" in said and "made otherwise: code=0000000000000000" in said
    assert started[0][-6:] == ["reproduce", str(run.path), "--output", str(tmp_path / "again"), "seed=1", "--force"]


RECIPE = """
model: {folder}/model
output: {folder}/out
data: {{train: {folder}/train.jsonl, heldout: {folder}/heldout.jsonl, max_length: 256}}
evaluate: {{drift: {{data: generate:neutral_prompts, rows: 4, new_tokens: 8}}}}
verl:
  engine: {{mixed_precision: {{param_dtype: fp32, reduce_dtype: fp32}}}}
  optim: {{lr: 1.0e-3}}
  data: {{train_batch_size: 4, max_token_len_per_gpu: 256}}
  trainer: {{total_epochs: 2}}
arms: {{eaft: {{objective: {{name: eaft}}}}}}
"""


@pytest.mark.slow
def test_the_same_machine_gives_the_same_bits_and_another_row_is_named(tmp_path: Path) -> None:
    tiny.tiny_model(tmp_path / "model")
    rows = tiny.write_sums(tmp_path / "train.jsonl", 16, seed=1).read_text()
    tiny.write_sums(tmp_path / "heldout.jsonl", 6, seed=2)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))

    def eaft(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "eaft_verl.cli", *words], capture_output=True, text=True)

    assert eaft("compare", str(tmp_path / "recipe.yaml")).returncode == 0
    run = str(tmp_path / "out" / "eaft-seed0")
    done = eaft("reproduce", run)
    assert done.returncode == 0, done.stderr
    assert "made otherwise: nothing" in done.stdout and done.stdout.rstrip().endswith("bit-equal")
    (tmp_path / "other.jsonl").write_text(rows.replace("What is", "Say, what is", 3).replace("Say, what", "What", 2))
    other = f"data.train={tmp_path}/other.jsonl"
    done = eaft("reproduce", run, "--output", str(tmp_path / "row"), other)
    assert done.returncode == 2 and "that differs is number 2, from 0" in done.stderr
    done = eaft("reproduce", run, "--output", str(tmp_path / "row"), other, "--force")
    assert done.returncode == 3 and "different" in done.stdout and "is number 2, from 0" in done.stdout
