"""The report beside an analysis: what it says of the data, how tokens moved, and the general mean along training."""

import json

import pytest
from reporting.fake_runs import make_runs

from eaft_verl.reporting.report import report


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beside")
    runs = make_runs(folder)
    beside = folder / "analysis"
    beside.mkdir()
    (beside / "analysis.html").write_text("page")
    said = {"about": "amount", "text": "2.7 % are <b>conflicts</b>", "numbers": {}}
    (beside / "analysis.json").write_text(json.dumps({"verdict": {"sentences": [said]}}))
    groups = {"high_entropy": 2.4, "low_entropy": 0.3, "conflict": 5.0, "no_conflict": 1.25}
    rows = [
        {"arm": arm, "step": step, "fixed": {name: {"nll": nll * left} for name, nll in groups.items()}}
        for arm, step, left in (("base", 0, 1.0), ("eaft-seed0", 16, 0.5))
    ]
    rows[1]["fixed"]["conflict"]["nll"] = None
    (beside / "dynamics.json").write_text(json.dumps({"rows": rows}))
    return report(runs, folder / "report"), folder / "report"


def test_the_report_links_to_the_analysis_and_quotes_it(made):
    text = (made[1] / "report.html").read_text(encoding="utf-8")
    assert '<a href="../analysis/analysis.html">' in text
    assert "2.7 % are &lt;b&gt;conflicts" in text


def test_how_conflicts_and_other_tokens_moved(made):
    text = (made[1] / "report.md").read_text(encoding="utf-8")
    assert "| **base** | 0 | 5.000 | 1.250 |" in text
    assert "| **eaft-seed0** | 16 | \u2013 | 0.625 \u00b7\u00a0\u22120.625 |" in text


def test_the_general_mean_along_training_ends_where_the_table_does(made):
    found, out = made
    assert set(found["general"]) == set(found["arms"])
    for arm, points in found["general"].items():
        end, cell = points[-1], found["results"][arm]["general_mean"]
        assert (points[0]["step"], points[0]["x"]) == (
            0,
            pytest.approx(found["results"]["base"]["general_mean"]["score"]),
        )
        assert end["x"] == pytest.approx(cell["score"])
        assert end["kl"] == pytest.approx(found["results"][arm]["drift.kl"]["score"])
    assert (out / "figures" / "general_step.png").is_file() and (out / "figures" / "general_kl.png").is_file()


def test_a_report_alone_says_nothing_of_an_analysis(tmp_path):
    found = report(make_runs(tmp_path), tmp_path / "report")
    assert found["analysis"] == {"sentences": None, "moved": None}
    assert "The data before training" not in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
