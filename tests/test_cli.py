"""The command line: verbs, where overrides may stand, exit codes, and what it must not import."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from omegaconf import OmegaConf

from eaft_verl import cli
from eaft_verl.cli import VERBS, main
from eaft_verl.experiment.arguments import parser
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


def verbs() -> dict[str, argparse.ArgumentParser]:
    subparsers = next(one for one in parser()._actions if isinstance(one, argparse._SubParsersAction))
    return subparsers.choices


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([verb, "--help"])
    assert done.value.code == 0 and verb in capsys.readouterr().out


def test_every_option_is_read() -> None:
    """What --help offers is looked at by some verb's code."""
    assert verbs().keys() == VERBS.keys()
    package = Path(cli.__file__).parent
    code = "\n".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    for verb, words in verbs().items():
        for action in words._actions:
            known = action.dest in ("help", "compare")  # --compare is what no --arm means
            assert known or f"options.{action.dest}" in code, f"{verb} {action.dest}"
            assert action.help, f"{verb} {action.dest}"


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tran"], "there is no verb 'tran'; did you mean train?; see `eaft --help`"),
        (["fly"], "there is no verb 'fly'; the verbs are init, recipes, "),
        (["train", "{recipe}"], "the following arguments are required: --arm; see `eaft train --help`"),
        (["train", "{recipe}", "--arm", "sft", "--arm", "eaft"], "--arm is given twice; give it once; see `eaft train"),
        (["train", "{recipe}", "--arm", "sft", "seed=1", "seed=2"], "seed is given twice, 1 and 2; give it once"),
        (["train", "data.rows=3", "--arm", "sft", "data.rows=4"], "data.rows is given twice, 3 and 4"),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_one_line(
    recipe: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main([word.format(recipe=recipe) for word in words])
    printed = capsys.readouterr().err
    assert done.value.code == 2 and printed.startswith(f"eaft: error: {said}") and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "quikstart"], "recipe quikstart does not exist; did you mean quickstart?"),
        (["train", "{recipe}", "--arm", "sfft"], "has no arm 'sfft'; its arms are sft, eaft; did you mean sft?"),
        (["compare", "synthesize_math"], "is no recipe but a spec that makes training data: `eaft synthesize "),
        (["compare", "{recipe}", "--seeds", "0,1", "seed=2"], "--seeds and seed= both say which seeds"),
    ],
)
def test_what_was_meant_is_said(recipe: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word.format(recipe=recipe) for word in words]) == 2
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1


def test_the_shipped_files_are_listed_by_what_they_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    kinds = [lines[lines.index(head) + 1].split()[0] for head in heads]
    assert kinds == ["agent_qwen3_4b", "paper", "synthesize_agent"] and "eaft synthesize" in heads[2]
    assert max(map(len, lines)) <= 120
    assert main(["recipes", "synthesize_math"]) == 0 and "\nprompts: [numina_math" in capsys.readouterr().out


def test_what_the_system_refuses_is_one_line_with_the_file(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["prepare", "generate:sums_train", str(tmp_path / "file/o.parquet"), "--model", _model_of(recipe)]) == 2
    printed = capsys.readouterr().err
    assert "file: " in printed and printed.count("\n") == 1


def _model_of(recipe: Path) -> str:
    return next(line.removeprefix("model: ") for line in recipe.read_text().splitlines() if line.startswith("model:"))


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


def test_prepare_advises_its_own_options(
    tmp_path: Path, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe's key in a message cannot be typed there; a prepared file takes no settings any more."""
    rows, out = str(tiny.write_sums(tmp_path / "data.rows.jsonl", 3, seed=5)), str(tmp_path / "rows.parquet")
    model = ("--model", str(tiny_model_path))
    assert main(["prepare", rows, out, *model, "--max-length", "4"]) == 2
    said = capsys.readouterr().err
    assert "set --over-long drop or truncate, or --max-length " in said and f"{rows}: " in said
    assert main(["prepare", rows, out, *model]) == 0
    assert main(["prepare", out, *model, "--show", "1", "--rows", "2"]) == 2
    assert "--rows has no effect" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["checkpoints", "{run}", "--out", "x"], "--out is of --export STEP"),
        (["analyze", "quickstart", "--new-tokens", "9"], "--new-tokens is of --own N"),
    ],
)
def test_an_option_without_effect_is_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Run.create(tmp_path / "run", info={"kind": "arm", "total_steps": 4}, config="a: 1\n", env={})
    assert main([word.format(run=tmp_path / "run") for word in words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["compare", "{recipe}", "--dry-run"]])
def test_a_reader_that_goes_away_is_no_fault(recipe: Path, words: list[str]) -> None:
    command = [sys.executable, "-m", "eaft_verl.cli", *(word.format(recipe=recipe) for word in words)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout and child.stderr
    child.stdout.close()
    assert child.stderr.read() == "" and child.wait() in (0, 141)  # argparse lets what it cannot write go


def test_a_cause_that_cannot_be_left_for_the_report_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EAFT_CAUSE_FILE", str(tmp_path / "gone" / "cause"))
    assert main(["train", str(tmp_path / "none.yaml"), "--arm", "sft"]) == 2
    assert capsys.readouterr().err.startswith("eaft: error: ")
