"""Models of `eaft evaluate MODEL` as rows beside the arms: which stand there, and that nothing else changes by them."""

from pathlib import Path
from typing import Any

import pytest
from reporting.fake_runs import KEYS, edit, make_base, make_runs

from eaft_verl.errors import RunError
from eaft_verl.reporting.collect import load_models
from eaft_verl.reporting.report import report
from eaft_verl.reporting.summary import runs_of, summary


def make_model(path: Path, name: str, keys: dict[str, str]) -> Path:
    """A run of a model that scores as SFT does at its first evaluation."""
    from reporting import fake_runs

    make_base(path)
    own = {"kind": "model", "arm": "model", "model": name, "evaluated": True, "keys": {**KEYS, "model": "m9", **keys}}
    edit(path / "run.json", lambda info: {**info, **own})
    fake_runs._evaluate(fake_runs.Run(path), "sft", 1, 0, 0)
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    for run in make_runs(tmp_path):
        edit(run / "run.json", lambda info: {**info, "evaluated": True})
    return tmp_path


def numbers(found: dict[str, Any]) -> dict[str, Any]:
    """What the report says of base and arms, marks aside: Holm's correction counts the model's differences too."""
    kept = ("columns", "paths", "equal_gain", "pareto", "versus", "cost", "budgets", "curves")
    cells = {
        arm: {name: {key: cell[key] for key in ("score", "low", "high", "stderr")} for name, cell in row.items()}
        for arm, row in found["results"].items()
        if arm not in found["models"]
    }
    return rounded({key: found[key] for key in kept} | {"cells": cells})


def rounded(tree: Any) -> Any:
    """Floats to nine digits: sums over more columns at once differ in the last ones."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [rounded(value) for value in tree]
    return float(f"{tree:.9g}") if isinstance(tree, float) else tree


def test_a_model_that_was_evaluated_alike_is_a_row_and_changes_no_other(output: Path) -> None:
    alone = report(runs_of([output], evaluated=True), output / "alone")
    made = make_model(output / "models/org-sibling-01234567", "org/sibling", {"base": "m0"})
    runs = runs_of([output], evaluated=True)
    assert runs[-1] == made and len(runs) == 4
    both = report(runs, output / "report")
    assert both["models"] == {"org-sibling-01234567": "org/sibling"} and both["arms"] == alone["arms"]
    assert numbers(both) == numbers(alone)
    cell = both["results"]["org-sibling-01234567"]["chain_sum"]
    assert cell["score"] == 22 / 40 and cell["delta"]["delta"] == pytest.approx(6 / 40)  # SHAPES, step 3 less step 0
    said = summary(both)
    assert [line.split()[0] for line in said[1:]] == ["sft", "eaft", "org-sibling-01234567"]
    assert "a model as it is, not trained here" in (output / "report/report.md").read_text()


@pytest.mark.parametrize("keys", [{"base": "other"}, {"base": "m0", "evaluation": "e1"}])
def test_a_model_that_was_evaluated_otherwise_is_left_out_of_a_folder_and_refused_by_name(
    output: Path, keys: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_model(output / "models/sibling", "org/sibling", keys)
    runs = runs_of([output], evaluated=True)
    assert made not in runs and "sibling is left out, it was evaluated otherwise: keys." in capsys.readouterr().err
    with pytest.raises(RunError, match="evaluate the model with the recipe of this base"):
        report([*runs, made], output / "report")


def test_another_chat_template_matters_where_texts_are_rendered_by_it(output: Path) -> None:
    made = make_model(output / "models/sibling", "org/sibling", {"base": "m0", "template": "t1"})
    with pytest.raises(RunError, match="another chat template than base .*drift and heldout are of other texts"):
        report(runs_of([output], evaluated=True), output / "report")
    with pytest.raises(RunError, match="'sibling' is already a row"):
        load_models([made], ["sft", "sibling"])
