"""What moved between two stores of the same tokens: groups of the first one, and live ones."""

import json
import math

import numpy as np
import pytest
from analysis.made_stores import write_store

from eaft_verl.analysis.dynamics import Later, dynamics
from eaft_verl.cli import main
from eaft_verl.errors import DataError

P = {"before": [0.01, 0.05, 0.9, 0.3], "after": [0.6, 0.1, 0.95, 0.2]}
H = {"before": [0.1, 0.2, 0.2, 2.5], "after": [1.0, 0.3, 0.1, 2.2]}
EXPORT = "runs/eaft-seed0/checkpoints/step_000016"


def stores(folder, **after):
    made = [
        write_store(folder / when, token=[4, 5, 6, 7], logprob=np.log(P[when]), entropy=H[when], **extra)
        for when, extra in (("before", {}), ("after", after))
    ]
    return made


def test_groups_fixed_before_training_and_live_ones_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr("eaft_verl.analysis.blocks.ROWS", 3)
    before, after = stores(tmp_path)
    base, row = dynamics(before, [Later("eaft", 16, after)])
    nll = {when: [-math.log(p) for p in P[when]] for when in P}
    assert (base["arm"], base["step"], row["arm"], row["step"]) == ("base", 0, "eaft", 16)
    assert base["fixed"] == base["live"]
    assert base["fixed"]["conflict"]["nll"] == pytest.approx(sum(nll["before"][:2]) / 2, rel=1e-6)
    assert row["fixed"]["conflict"] == pytest.approx({"tokens": 2, "nll": sum(nll["after"][:2]) / 2, "prob": 0.35})
    assert row["fixed"]["no_conflict"]["nll"] == pytest.approx(sum(nll["after"][2:]) / 2, rel=1e-6)
    assert row["fixed"]["low_entropy"]["nll"] == pytest.approx(sum(nll["after"][:3]) / 3, rel=1e-6)
    assert row["fixed"]["high_entropy"]["nll"] == pytest.approx(nll["after"][3], rel=1e-6)
    assert row["live"]["conflict"] == pytest.approx({"tokens": 1, "nll": nll["after"][1], "prob": 0.1})
    assert row["live"]["low_entropy"]["tokens"] == 2


def test_a_group_without_tokens_has_no_loss(tmp_path):
    store = write_store(tmp_path, token=[1], logprob=[-0.1], entropy=[0.1])
    assert dynamics(store, [])[0]["fixed"]["conflict"] == {"tokens": 0, "nll": None, "prob": None}


def test_other_data_and_other_tokens_are_refused(tmp_path):
    before, after = stores(tmp_path, keys={"model": "x", "data": "other", "template": "t"})
    with pytest.raises(DataError, match="their data keys differ"):
        dynamics(before, [Later("sft", 1, after)])
    other = write_store(tmp_path / "o", token=[4, 5, 6, 8], logprob=np.log(P["after"]), entropy=H["after"])
    with pytest.raises(DataError, match="do not hold the same tokens"):
        dynamics(before, [Later("sft", 1, other)])


def rename(store, model):
    """The store as an analysis of that model would have named it."""
    import pyarrow.parquet as pq

    file = store.path / "tokens.parquet"
    table = pq.read_table(file)
    meta = {**json.loads(table.schema.metadata[b"eaft_verl"]), "model": str(model)}
    pq.write_table(table.replace_schema_metadata({b"eaft_verl": json.dumps(meta)}), file)


def test_the_command(tmp_path, capsys):
    before, after = stores(tmp_path)
    (tmp_path / EXPORT).mkdir(parents=True)
    assert main(["analyze", str(before.path), str(after.path)]) == 2
    assert "is no export of a run" in capsys.readouterr().err
    rename(after, tmp_path / EXPORT)
    assert main(["analyze", str(before.path), str(after.path), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "dynamics.json").read_text())["rows"]
    assert [(row["arm"], row["step"]) for row in rows] == [("base", 0), ("eaft-seed0", 16)]
    assert f"{rows[1]['fixed']['conflict']['nll']:.3f}" in said
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"dynamics_fixed.png", "dynamics_live.png"}


def test_gates_by_command(tmp_path, capsys):
    before, _ = stores(tmp_path)
    assert main(["analyze", str(before.path), "--gates", "eaft:power=1,2", "dft"]) == 0
    said = capsys.readouterr().out
    assert "4 tokens: 50 % conflicts, 25 % branching" in said
    assert [line.split()[0] for line in said.splitlines()[2:5]] == ["eaft:power=1", "eaft:power=2", "dft"]
    assert (before.path / "gates" / "gates.json").is_file()
    assert main(["analyze", str(before.path), "data.rows=3"]) == 2
    assert "data.rows=3 is none; leave it out" in capsys.readouterr().err
    assert main(["analyze", str(before.path), "--gates", "nope"]) == 2
    assert "'nope' is unknown" in capsys.readouterr().err
