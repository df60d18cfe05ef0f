"""The main job through the real command line on a tiny model: compare, killed in the middle of training, run again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from eaft_verl.runs import Run

RECIPE = """
model: {model}
output: {output}
data: {{train: {train}, heldout: {heldout}, max_length: 256}}
evaluate:
  target: [{{task: sums, limit: 6}}]
  general: [{{task: products, limit: 6}}]
  drift: {{data: generate:neutral_prompts, rows: 4, new_tokens: 8}}
  points: 2
verl:
  engine: {{mixed_precision: {{param_dtype: fp32, reduce_dtype: fp32}}}}
  optim: {{lr: 1.0e-3}}
  data: {{train_batch_size: 4, max_token_len_per_gpu: 256}}
  trainer: {{total_epochs: 10, save_freq: 4, test_freq: 8}}
arms:
  eaft: {{objective: {{name: eaft}}}}
  again: {{objective: {{name: eaft}}}}
"""
STEPS = 40


def command(recipe: Path) -> list[str]:
    return [sys.executable, "-m", "eaft_verl.cli", "compare", str(recipe)]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Path:
    """Output folder of a comparison that was killed (with all its processes) while the second arm trained."""
    folder = tmp_path_factory.mktemp("experiment")
    output = folder / "out"
    tiny.write_sums(folder / "train.jsonl", 16, seed=1)
    tiny.write_sums(folder / "heldout.jsonl", 6, seed=2)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(
            model=tiny_model_path, output=output, train=folder / "train.jsonl", heldout=folder / "heldout.jsonl"
        )
    )
    started = time.monotonic()
    first = subprocess.Popen(command(recipe), start_new_session=True)
    metrics = output / "again-seed0" / "metrics.jsonl"
    while first.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 9):
        assert time.monotonic() - started < 1500, "the comparison did not reach the second arm"
        time.sleep(0.01)
    assert first.poll() is None, "the comparison ended before it could be killed"
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert Run(output / "again-seed0").info["status"] == "running"
    before = {path: path.stat().st_mtime_ns for path in (output / "eaft-seed0").rglob("*.json*")}
    done = subprocess.run(command(recipe), capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[base: evaluate] done already" in done.stdout
    assert "[eaft-seed0: train] done already" in done.stdout
    after = {path: path.stat().st_mtime_ns for path in (output / "eaft-seed0").rglob("*.json*")}
    assert before == after, "a finished stage was touched"
    print(f"pipeline: {time.monotonic() - started:.0f} s")
    return output


def test_resumed_training_is_the_uninterrupted_one(experiment: Path) -> None:
    whole, resumed = (Run(experiment / name) for name in ("eaft-seed0", "again-seed0"))
    assert resumed.info["attempt"] == 2
    rows, again = whole.metrics(), resumed.metrics()
    assert [row["step"] for row in rows] == [row["step"] for row in again] == list(range(1, STEPS + 1))
    for name in ("loss", "nll", "grad_norm", "lr", "weight_mean", "tokens"):
        assert [row[name] for row in again] == pytest.approx([row[name] for row in rows], rel=1e-6), name


def test_training_learns_and_evaluation_is_complete(experiment: Path) -> None:
    run = Run(experiment / "eaft-seed0")
    assert run.metrics()[-1]["nll"] < 0.7 * run.metrics()[0]["nll"]
    evals = run.evals()
    assert {step: set(records) for step, records in evals.items()} == {
        **{step: {"heldout", "drift", "drift_task"} for step in (1, 2, 4, 8)},
        16: {"heldout", "drift", "drift_task", "sums"},
        STEPS: {"heldout", "drift", "drift_task", "sums", "products"},
    }
    assert evals[STEPS]["drift"]["metrics"]["kl"]["score"] > 0
    base = Run(experiment / "base").evals()[0]
    assert base["drift"]["metrics"]["kl"]["score"] == 0
    assert evals[STEPS]["heldout"]["metrics"]["nll"]["score"] < base["heldout"]["metrics"]["nll"]["score"]


def test_the_held_out_nll_is_the_validation_loss_of_training(experiment: Path) -> None:
    run = Run(experiment / "eaft-seed0")
    validated = {row["step"]: row["nll"] for row in run.metrics("val")}
    for step in (8, 16, STEPS):
        assert run.evals()[step]["heldout"]["metrics"]["nll"]["score"] == pytest.approx(validated[step], abs=1e-4)


def test_export_loads_in_transformers_and_is_what_was_evaluated(experiment: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Run(experiment / "eaft-seed0").checkpoints()[STEPS]
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert tokenizer.chat_template == tiny.CHATML
    assert not list((experiment / "eaft-seed0").rglob("resume/*")), "resumable state is left behind"


def test_report_compares_the_arms(experiment: Path) -> None:
    report = experiment / "report"
    assert {path.name for path in report.iterdir()} >= {"report.html", "report.md", "report.json", "figures"}
    text = json.dumps(json.loads((report / "report.json").read_text()))
    assert "eaft" in text and "again" in text
    assert "undeclared" not in (report / "report.md").read_text().lower()
