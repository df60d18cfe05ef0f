"""`eaft choose` makes OUTPUT/chosen of what the report says, replaces only its own, or leaves it alone."""

from pathlib import Path
from typing import Any

import pytest

from eaft_verl.errors import ConfigError, RunError
from eaft_verl.experiment.choose import choose_command
from eaft_verl.files import read_json, write_json


def output(folder: Path, step: int | None = 6) -> Path:
    for name in ("sft-seed0", "sft-seed1"):
        for made in (3, 6):
            (folder / name / "checkpoints" / f"step_{made:06d}").mkdir(parents=True, exist_ok=True)
            (folder / name / "checkpoints" / f"step_{made:06d}" / "config.json").write_text(f'"{name} {made}"')
    decide(folder, step)
    return folder


def decide(folder: Path, step: int | None) -> None:
    chosen: dict[str, Any] | None = None
    if step is not None:
        chosen = {"arm": "sft", "seed": 1, "run": "sft-seed1", "checkpoint": f"checkpoints/step_{step:06d}"}
        chosen |= {"gain": 0.5, "cost": 0.01, "score": 1.1}
    found = {"choice": {"chosen": chosen, "rule": {"bound": "kl"}}, "answer": ["Ship SFT.", "Because."]}
    found |= {"environment": {"runs": {"sft seed 0": "../sft-seed0", "sft seed 1": "../sft-seed1"}}}
    write_json(folder / "report" / "report.json", found)


@pytest.mark.parametrize("copy", [False, True])
def test_it_is_made_and_replaced(tmp_path: Path, copy: bool) -> None:
    folder = output(tmp_path / "out")
    said = choose_command(str(folder), [], copy=copy)
    assert said.splitlines()[:2] == ["Ship SFT.", "Because."] and str(folder / "chosen") in said
    assert (folder / "chosen").is_symlink() is not copy
    assert (folder / "chosen" / "config.json").read_text() == '"sft-seed1 6"'
    decide(folder, 3)
    for again in (copy, not copy, copy):
        choose_command(str(folder), [], copy=again)
        assert (folder / "chosen" / "config.json").read_text() == '"sft-seed1 3"'
    assert read_json(folder / "chosen.json")["checkpoint"] == "checkpoints/step_000003"
    assert {path.name for path in folder.iterdir() if not path.name.endswith(".lock")} == {
        *("sft-seed0", "sft-seed1", "report", "chosen", "chosen.json")
    }


def test_a_link_outlives_a_move_of_the_folder(tmp_path: Path) -> None:
    folder = output(tmp_path / "out")
    choose_command(str(folder), [], copy=False)
    folder.rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "chosen" / "config.json").is_file()


def test_what_cannot_be_done_is_said_and_changes_nothing(tmp_path: Path) -> None:
    folder = output(tmp_path / "out")
    choose_command(str(folder), [], copy=False)
    decide(folder, None)
    with pytest.raises(RunError, match="chosen/ is left as it is"):
        choose_command(str(folder), [], copy=False)
    assert (folder / "chosen" / "config.json").read_text() == '"sft-seed1 6"'
    decide(folder, 12)
    with pytest.raises(RunError, match="is no model any more"):
        choose_command(str(folder), [], copy=False)
    other = output(tmp_path / "other")
    (other / "chosen").mkdir()
    (other / "chosen" / "mine").touch()
    with pytest.raises(RunError, match="was not made by `eaft choose`"):
        choose_command(str(other), [], copy=True)
    assert (other / "chosen" / "mine").exists()
    with pytest.raises(ConfigError, match="output=runs/mine: .* is the output folder itself"):
        choose_command(str(folder), ["output=runs/mine"], copy=False)
    with pytest.raises(RunError, match="does not exist: run `eaft compare`"):
        choose_command(str(tmp_path), [], copy=False)
