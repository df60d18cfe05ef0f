"""What the models say, in the report; and its numbers as a small table for a terminal."""

from pathlib import Path

import pytest
from fake_runs import STEPS, make_runs

from eaft_verl.files import write_jsonl
from eaft_verl.reporting.answers import LENGTH
from eaft_verl.reporting.report import report
from eaft_verl.reporting.summary import summary
from eaft_verl.runs import answers_file

ROWS = [
    {"id": "7", "prompt": "What is 3 + 4?", "target": "#### 7", "response": "7 | <b>seven</b>", "cut": False},
    {"id": "9", "prompt": "What is 4 + 5?", "target": "#### 9", "response": "so " * LENGTH, "cut": True},
]


def test_answers_to_held_out_prompts_stand_beside_each_other(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    found = report(runs, tmp_path / "report")
    assert found["answers"] == [] and "Held-out prompts" not in (tmp_path / "report/report.md").read_text()
    for run, step in zip(runs, (0, STEPS[-1], STEPS[-1]), strict=True):
        kept = ROWS if run.name != "eaft" else [{**ROWS[0], "response": "It is seven."}, ROWS[1]]
        write_jsonl(answers_file(run, step), kept)
    found = report(runs, tmp_path / "report")
    assert [row["id"] for row in found["answers"]] == ["7", "9"]
    assert {arm: answer["text"] for arm, answer in found["answers"][0]["answers"].items()} == {
        "base": "7 | <b>seven</b>",
        "sft": "7 | <b>seven</b>",
        "eaft": "It is seven.",
    }
    assert len(found["answers"][1]["answers"]["sft"]["text"]) == LENGTH + 2
    page = (tmp_path / "report/report.html").read_text()
    assert "It is seven." in page and "&lt;b&gt;seven" in page and "<b>seven" not in page and "</strong> (cut)" in page


def test_prompts_that_one_of_them_did_not_answer_are_left_out(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    for run, step in zip(runs, (0, STEPS[-1], STEPS[-1]), strict=True):
        write_jsonl(answers_file(run, step), ROWS[:1] if run.name == "sft" else ROWS)
    assert [row["id"] for row in report(runs, tmp_path / "report")["answers"]] == ["7"]


def test_the_table_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(make_runs(tmp_path), tmp_path / "report")
    lines = summary(found)
    assert [line.split()[0] for line in lines[1:]] == ["sft", "eaft"]
    assert lines[0].split("  ")[-1] == "training, s" and "target, points" in lines[0] and "KL to base" in lines[0]
    # of fake_runs.SHAPES: chain_sum 16 -> 28 and gsm8k 2 -> 7 of 40 are +30.0 and +12.5 points; KL 0.21 and 0.15
    assert "+21.2" in lines[1] and "0.21" in lines[1] and "0.15" in lines[2]
    assert len({len(line) for line in lines[1:]}) == 1
