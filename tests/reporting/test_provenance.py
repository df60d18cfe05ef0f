"""What the report says of where its runs were made."""

from pathlib import Path

from reporting.fake_runs import edit, make_runs

from eaft_verl.reporting.collect import load
from eaft_verl.reporting.provenance import environment


def test_other_packages_are_listed_where_they_differ_and_later_changes_are_said(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    for run in runs:
        edit(run / "env.json", lambda env: {**env, "installed": {"numpy": "2.4.6", "scipy": "1.17.1"}})
    edit(runs[1] / "env.json", lambda env: {**env, "installed": {"numpy": "2.2.6", "scipy": "1.17.1"}})
    found = {"hardware": ["cpus=2 (now 64)"], "versions": ["python=3.11.7 (now 3.12.1)"]}
    moved = [{"stage": "train", "attempt": 2, "found": found}]
    edit(runs[2] / "run.json", lambda info: {**info, "environments": moved})
    said = environment(*load(runs), tmp_path / "report")
    assert sorted(said["differing"]["installed.numpy"].values()) == ["2.2.6", "2.4.6", "2.4.6"]
    assert not any(key.startswith("installed.") for key in said["equal"])
    assert "cpus=2 (now 64); python=3.11.7 (now 3.12.1)" in said["differing"]["then (train, attempt 2)"].values()
