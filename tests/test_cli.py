"""The command line: verbs, where overrides may stand, exit codes, and what it must not import."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from omegaconf import OmegaConf

from eaft_verl.cli import main
from eaft_verl.runs import Run

RECIPE = """
model: {model}
output: {output}
device: cpu
data: {{train: {train}, max_length: 128}}
evaluate: {{target: [sums]}}
verl: {{data: {{train_batch_size: 4, max_token_len_per_gpu: 256}}}}
arms:
  sft: {{objective: {{name: sft}}}}
  eaft: {{objective: {{name: eaft}}}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    train = tiny.write_sums(folder / "train.jsonl", 8, seed=1)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_model_path, output=folder / "out", train=train))
    return path


@pytest.mark.parametrize("verb", ["prepare", "train", "evaluate", "compare", "report"])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([verb, "--help"])
    assert done.value.code == 0 and verb in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["{recipe}", "--arm", "eaft", "--dry-run", "verl.optim.lr=3e-5"],
        ["{recipe}", "verl.optim.lr=3e-5", "--dry-run", "--arm", "eaft"],
    ],
)
def test_overrides_may_stand_before_or_after_options(
    recipe: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *(word.format(recipe=recipe) for word in words)]) == 0
    config = OmegaConf.create(capsys.readouterr().out)
    assert config.verl.optim.lr == 3e-5 and config.objective.name == "eaft"


def test_a_word_that_is_no_override_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["train", str(recipe), "--arm", "eaft", "--dry-run", "fast"])
    assert done.value.code == 2 and "unrecognized arguments: fast" in capsys.readouterr().err


def test_an_error_of_the_user_is_one_line_and_exit_code_2(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--arm", "eaft", "objective.pwr=2"]) == 2
    assert capsys.readouterr().err.startswith("eaft: error: objective.pwr is unknown for 'eaft'")


def test_compare_plans_every_stage_without_torch(recipe: Path) -> None:
    code = (
        "import sys; from eaft_verl.cli import main; "
        f"assert main(['compare', {str(recipe)!r}, '--seeds', '0,1', '--dry-run']) == 0; "
        "assert not {'torch', 'verl', 'ray', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + 2 * 2 * 2 + 1 and all(line.startswith("todo") for line in lines)
    assert "--arm eaft seed=1" in done.stdout


def test_a_bad_arm_of_a_comparison_is_named_before_anything_starts(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(recipe.read_text() + "  worse: {objective: {name: eeaft}}\n")
    assert main(["compare", str(bad)]) == 2
    assert "arm worse: objective.name='eeaft' is unknown" in capsys.readouterr().err


def test_an_unfinished_run_is_not_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run.create(tmp_path / "run", info={"kind": "arm", "total_steps": 4}, config="a: 1\n", env={})
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "only a finished run is evaluated" in capsys.readouterr().err


def test_prepare_shows_what_is_trained(
    tmp_path: Path, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.write_sums(tmp_path / "rows.jsonl", 3, seed=5)
    out = tmp_path / "rows.parquet"
    assert main(["prepare", str(rows), str(out), "--model", str(tiny_model_path), "--show", "1"]) == 0
    shown = capsys.readouterr().out
    assert "3 examples from 3 rows" in shown and "<|im_end|>]]" in shown
    assert "3 of 3 rows are used\n" in shown
    assert main(["prepare", str(rows), "--model", str(tiny_model_path)]) == 2
    assert "OUT is missing" in capsys.readouterr().err
    before = sorted(tmp_path.iterdir())
    assert main(["prepare", str(rows), "--model", str(tiny_model_path), "--show", "1", "--rows", "2"]) == 0
    shown = capsys.readouterr().out
    assert "2 of 2 rows are used; 1 more are not read (rows=2)" in shown and "<|im_end|>]]" in shown
    assert "nothing is kept of this" in shown and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("words", [["--help"], ["compare", "{recipe}", "--dry-run"]])
def test_a_reader_that_goes_away_is_no_fault(recipe: Path, words: list[str]) -> None:
    command = [sys.executable, "-m", "eaft_verl.cli", *(word.format(recipe=recipe) for word in words)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout and child.stderr
    child.stdout.close()
    assert child.stderr.read() == "" and child.wait() in (0, 141)  # argparse lets what it cannot write go
