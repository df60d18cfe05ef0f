"""The paper's tables as shipped, what in them cannot be, and our scores beside theirs."""

import json
from pathlib import Path

import pytest
from reporting.fake_runs import edit, make_runs

from eaft_verl.cli import main
from eaft_verl.reporting.paper import beside, inconsistencies, mean, published
from eaft_verl.reporting.report import report

SHARED = Path(__file__).parents[2].parent / "shared" / "paper" / "tables.json"
QWEN = "Qwen3-4B-Instruct-2507"


@pytest.mark.skipif(not SHARED.is_file(), reason="the tables as read from the paper are not here")
def test_the_shipped_numbers_are_the_papers() -> None:
    theirs = json.loads(SHARED.read_text())
    for name, table in published()["tables"].items():
        rows = theirs[f"table{name}"]["rows"]
        assert [(row["model"], row["method"], row["scores"]) for row in table["rows"]] == [
            (row["model"], row["method"], {**row["target"], **row["general"]}) for row in rows
        ]
        for ours, row in zip(table["rows"], rows, strict=True):
            assert list(ours["printed"].values()) == [row["target_avg"], row["general_avg"], row["general_drop"]]
    assert sum(len(table["rows"]) for table in published()["tables"].values()) == 27


def test_two_averages_do_not_follow_and_all_others_do() -> None:
    lines = inconsistencies("1")
    means = [line for line in lines if "mean is printed" in line]
    assert means == [  # (76.5 + 79.5 + 74.5) / 3 and (57.4 + 71.3 + 84.5) / 3
        f"{QWEN}, SFT: the general mean is printed as 76.5, its scores give 76.83",
        "GLM4-9B-0414, TALR: the general mean is printed as 71.5, its scores give 71.07",
    ]
    drops = [line for line in lines if "drop is printed" in line]
    assert [line.partition(":")[0] for line in drops] == [f"{QWEN}, SFT", "GLM4-9B-0414, TALR"], (
        "they follow from those"
    )
    aime = [line for line in lines if "no number of right answers" in line]
    assert aime == [
        f"{QWEN}, base: AIME25 47.4 is no number of right answers out of 90"
    ]  # 42 of 90 is 46.7, 43 is 47.8
    assert any(line.startswith("39 of 42 AIME scores are multiples of 1/30") for line in lines)
    assert any("Section 4.2" in line for line in lines) and any("Appendix E" in line for line in lines)
    assert inconsistencies("2") == inconsistencies("3") == []


def test_a_mean_by_hand() -> None:
    row = next(row for row in published()["tables"]["1"]["rows"] if row["method"] == "EAFT" and row["model"] == QWEN)
    assert mean(row, ["MMLU", "IFEval", "CLUEWSC"]) == pytest.approx(80.1333, abs=1e-3)


def test_our_scores_stand_beside_the_same_model_and_method(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    for run in runs:
        edit(run / "run.json", lambda info: {**info, "model": f"Qwen/{QWEN}@main"})
        edit(run / ".run.json", lambda info: {**info, "model": f"Qwen/{QWEN}@main"})
    found = report(runs, tmp_path / "report", paper="1")["paper"]
    rows = {row["method"]: row for row in found["rows"]}
    assert set(rows) == {"base", "SFT", "SFT_KL", "FLOW", "DFT", "TALR", "EAFT"} and not found["other_model"]
    assert rows["EAFT"]["theirs"]["GSM8K"] == 94.5
    assert rows["EAFT"]["ours"]["GSM8K"]["score"] == pytest.approx(100 * 7 / 40)
    assert rows["SFT"]["ours"]["IFEval"]["score"] == pytest.approx(100 * 7 / 40)
    assert rows["DFT"]["ours"] == {} and found["missing"] == ["AIME24", "AIME25", "CLUEWSC"]
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Beside Table 1 of the paper (math)" in text and "here less paper \u221277.0" in text  # 17.5 - 94.5
    assert "Not evaluated here: AIME24, AIME25, CLUEWSC." in text and "its scores give 76.83" in text


def test_another_model_has_nothing_subtracted(tmp_path: Path) -> None:
    found = report(make_runs(tmp_path), tmp_path / "report", paper="3")
    rows = found["paper"]["rows"]
    assert found["paper"]["other_model"] and [row["method"] for row in rows] == [
        "base",
        "SFT",
        "EAFT",
        "base",
        "sft",
        "eaft",
    ]
    assert all(not row["theirs"] or not row["ours"] for row in rows)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "The table has no model like this one" in text and "here less paper" not in text
    assert "Its averages and drops follow from its scores." in text and "does not follow:" not in text


@pytest.mark.parametrize(("ids", "column", "chosen"), [
    (["gsm8k_boxed"], "GSM8K", "gsm8k_boxed"),
    (["gsm8k_cot", "gsm8k"], "GSM8K", "gsm8k_cot"),
    (["mmlu_chat"], "MMLU", "mmlu_chat"),
    (["aime24_boxed", "aime25_boxed"], "AIME25", "aime25_boxed"),
    (["bfcl_v3"], "BFCL_v3", "bfcl_v3"),
    (["medmcqa_chat"], "MedMCQA", "medmcqa_chat"),
])  # fmt: skip
def test_a_benchmark_by_any_of_its_names(ids: list[str], column: str, chosen: str) -> None:
    columns = [{"id": one, "percent": True, "members": []} for one in ids]
    cell = {"score": 0.5, "low": 0.4, "high": 0.6}
    scores = {"base": {}, "eaft": dict.fromkeys(ids, cell)}
    result = {"arms": ["eaft"], "columns": columns, "model": QWEN, "results": scores}
    name = next(key for key, table in published()["tables"].items() if column in table["target"] + table["general"])
    ours = [row["ours"][column] for row in beside(result, name)["rows"] if column in row["ours"]]
    assert ours == [{"score": 50.0, "low": 40.0, "high": 60.0}]
    assert {**result["results"]["eaft"]}.keys() == set(ids) and chosen in ids


def test_a_table_that_is_none_is_refused_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "/nowhere", "--paper", "7"]) == 2
    assert (
        "--paper 7 is no table of scores of the paper; it has 1: math; 2: medical; 3: agent" in capsys.readouterr().err
    )
