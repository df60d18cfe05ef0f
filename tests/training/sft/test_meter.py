"""The meter's numbers against the formula, its alarm, and that a training with it is the training without it."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from batch_examples import EXAMPLES

from eaft_verl.recipe.meter import Meter
from eaft_verl.tokens.reference_kl import top_reference
from eaft_verl.training.schedule import Moment
from eaft_verl.training.sft.meter import DriftMeter, EmitDrift
from eaft_verl.training.sft.order import PADDING

VOCAB = 50
GO_ON, PLANNED = Moment(False, False), Moment(True, False)


class Stored:
    """What the base says of the examples' trained tokens, over the whole vocabulary, as a TokenSource."""

    def __init__(self, logits: list[torch.Tensor]) -> None:
        self.tops = [top_reference(rows, VOCAB) for rows in logits]

    def tokens(self, index: int) -> dict[str, torch.Tensor]:
        top = self.tops[index]
        return {"anchor_ids": top.ids_TK, "anchor_logprob": top.logprob_TK, "anchor_tail": top.tail_T}


def logits(seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(len(example.input_ids), VOCAB, dtype=torch.float64) * 2 for example in EXAMPLES]


def trained(index: int) -> np.ndarray:
    return np.flatnonzero(np.array(EXAMPLES[index].loss_mask)[1:])


class Group:
    """Workers that hold a model: its logits, passed through the hook that stands in for the loss."""

    def __init__(self, model: list[torch.Tensor]) -> None:
        self.model = model

    def drift_batch(self, batch: Any) -> Any:
        rows = [self.model[min(3, row)] for row in range(len(EXAMPLES))]
        lengths = batch["input_ids"].offsets().diff().tolist()
        filler = [torch.zeros(length, VOCAB, dtype=torch.float64) for length in lengths[len(rows) :]]
        values = EmitDrift()._statistics(torch.cat([*rows, *filler]), batch)
        found = {name: torch.nested.as_nested_tensor(list(value[0].split(lengths))) for name, value in values.items()}
        return SimpleNamespace(get=lambda: found)


def made(tmp_path: Path, meter: Meter, moved: float, nll: list[float] | None = None) -> Any:
    base = logits(0)
    rows: list[dict[str, Any]] = []
    losses = iter(nll or [])
    trainer = SimpleNamespace(
        group=Group([one + moved * torch.randn_like(one) for one in base]),
        run=SimpleNamespace(path=tmp_path, metrics=lambda split: []),
        beat=lambda: None,
        log=rows.append,
        state={},
        validate=lambda step: next(losses),
        export=lambda step: (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True, exist_ok=True),
    )
    indices = [*range(len(EXAMPLES)), PADDING, PADDING]
    return DriftMeter(meter, EXAMPLES, Stored(base), trainer, indices), rows, trainer  # type: ignore[arg-type]


def test_a_reading_is_the_mean_of_the_formula_over_trained_tokens(tmp_path: Path) -> None:
    meter, rows, trainer = made(tmp_path, Meter(every=2), moved=0.7)
    assert meter.after(1, GO_ON) == GO_ON and rows == []
    meter.after(2, GO_ON)
    every, same = [], []
    for index in range(len(EXAMPLES)):
        p, q = (one[index].log_softmax(-1) for one in (logits(0), trainer.group.model))
        kl = (p.exp() * (p - q)).sum(-1).numpy()
        every += kl[trained(index)].tolist()
        same += (p.argmax(-1) == q.argmax(-1)).numpy()[trained(index)].tolist()
    (row,) = rows
    assert row["kl"] == pytest.approx(np.mean(every), rel=1e-9) and row["tokens"] == len(every)
    assert row["agreement"] == pytest.approx(np.mean(same))
    assert row["kl_p95"] == pytest.approx(np.quantile(every, 0.95, method="inverted_cdf"), rel=1e-9)
    assert row["read_s"] == row["total_s"] > 0 and row["split"] == "meter"


def test_the_base_itself_has_not_moved(tmp_path: Path) -> None:
    meter, rows, _ = made(tmp_path, Meter(every=1, limit=1e-6, then="stop"), moved=0.0)
    assert meter.after(1, GO_ON) == GO_ON
    assert abs(rows[0]["kl"]) < 1e-12 and rows[0]["agreement"] == 1.0


@pytest.mark.parametrize(("then", "moment"), [("warn", GO_ON), ("stop", Moment(True, True)), ("keep_best", GO_ON)])
def test_the_alarm_is_told_once_and_does_what_it_says(tmp_path: Path, capsys: Any, then: str, moment: Moment) -> None:
    meter, rows, _ = made(tmp_path, Meter(every=1, limit=0.05, then=then), moved=0.7)
    assert meter.after(1, GO_ON) == moment and meter.after(2, GO_ON) == moment
    told = capsys.readouterr().err
    assert told.count("eaft: warning: after update 1 the KL to the base is") == 1 and "update 2" not in told
    found = meter.outcome()
    assert (found["alarm"], found["stopped"], found["readings"]) == (1, then == "stop", 2)
    meter.readings = {}
    meter.trainer.run.metrics = lambda split: rows
    meter.recall()  # as a later attempt would: nothing is read or told again
    assert meter.recalled(1, GO_ON) == moment and meter.after(2, GO_ON) == moment and len(rows) == 2
    assert capsys.readouterr().err == ""


def test_below_the_limit_the_best_export_is_kept(tmp_path: Path) -> None:
    meter, _, trainer = made(tmp_path, Meter(every=1, limit=50.0, then="keep_best"), 0.1, nll=[1.0, 1.2, 0.8, 0.7, 0.6])
    kept = []
    for step, moment in ((1, GO_ON), (2, GO_ON), (3, PLANNED), (4, GO_ON), (5, GO_ON)):
        meter.after(step, moment)
        kept.append(sorted(int(path.name[-1]) for path in (tmp_path / "checkpoints").iterdir()))
    assert kept == [[1], [1], [3], [3, 4], [3, 5]]  # 2 was worse; 3 is evaluated anyway, so it stays
    assert trainer.state["kept"] == {"step": 5, "nll": 0.6, "planned": False}
    assert meter.outcome()["kept"]["step"] == 5 and not math.isnan(meter.seconds)
