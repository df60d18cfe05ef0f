"""Weights of the starting model, GIFT, FINCH and the l2 anchor in `eaft train`, with one worker in this process."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from one_worker import without_ray

from eaft_verl.errors import ConfigError, DataError
from eaft_verl.experiment.train import train
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.resolve import declared_keys, load_recipe, resolve
from eaft_verl.runs import Run

RECIPE = """
model: {folder}/model
device: cpu
output: {folder}/out
data: {{train: {folder}/train.jsonl, heldout: {folder}/train.jsonl, max_length: 128}}
evaluate: {{target: [sums], points: 1}}
verl:
  engine: {{mixed_precision: {{param_dtype: fp32, reduce_dtype: fp32}}}}
  optim: {{lr: 1.0e-3, lr_scheduler_type: constant, lr_warmup_steps_ratio: 0.0}}
  data: {{train_batch_size: 8, max_token_len_per_gpu: 256}}
  trainer: {{total_training_steps: 3, test_freq: 3}}
arms:
  sft: {{objective: {{name: sft}}}}
  eaft: {{objective: {{name: eaft}}}}
  eaft_base: {{objective: {{name: eaft, stats: base}}}}
  dft: {{objective: {{name: dft}}}}
  prift: {{objective: {{name: prift}}}}
  prift_padded: {{objective: {{name: prift}}, verl: {{model: {{use_remove_padding: false}}}}}}
  talr: {{objective: {{name: talr, tau: batch}}}}
  talr_base: {{objective: {{name: talr, stats: base}}}}
  masked: {{objective: {{name: masked}}}}
  mile: {{objective: {{name: mile}}}}
  mile_base: {{objective: {{name: mile, stats: base}}}}
  idft: {{objective: {{name: idft, warmup: 0.0, transition: 0.0}}}}
  idft_base: {{objective: {{name: idft, stats: base, warmup: 0.0, transition: 0.0}}}}
  gift: {{objective: {{name: gift, boost: 6.0}}}}
  gift_stored:
    objective: {{name: gift, boost: 6.0, anchor: {{kind: forward_kl_topk, coef: 1.0, k: 384}}}}
  finch: {{objective: {{name: finch}}}}
  held: {{objective: {{name: sft, anchor: {{kind: l2, coef: 1000.0}}}}}}
  lightly: {{objective: {{name: sft, anchor: {{kind: l2, coef: 1.0e-9}}}}}}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """Every arm, trained once when it is asked for."""
    folder = tmp_path_factory.mktemp("rivals")
    tiny.tiny_model(folder / "model")
    tiny.write_sums(folder / "train.jsonl", 16, 1)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder), encoding="utf-8")
    recipe = load_recipe(folder / "recipe.yaml")

    class Trained(dict[str, Run]):
        def __missing__(self, arm: str) -> Run:
            config = resolve(recipe, arm)
            check(config)
            self[arm] = train(config, declared_keys(recipe, arm))
            return self[arm]

    with without_ray(folder):
        yield Trained(recipe=recipe)


def steps(run: Run) -> list[dict[str, Any]]:
    return [row for row in run.metrics() if row["split"] == "train"]


@pytest.mark.parametrize(
    ("base", "current"),
    [
        ("eaft_base", "eaft"),
        ("talr_base", "talr"),
        pytest.param("prift", "dft", marks=pytest.mark.slow),
        pytest.param("mile_base", "mile", marks=pytest.mark.slow),
        pytest.param("idft_base", "idft", marks=pytest.mark.slow),
    ],
)
def test_at_the_first_step_the_starting_model_is_the_model(base: str, current: str, runs: dict[str, Run]) -> None:
    """Stored pass and live statistics: the same weights, loss and gradient; then they part."""
    theirs, ours = steps(runs[current]), steps(runs[base])
    for name in ("loss", "nll", "weight_mean", "weight_p10", "weight_p90", "ess", "grad_norm"):
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-5, abs=1e-7), name
    assert ours[2]["loss"] != pytest.approx(theirs[2]["loss"], rel=1e-4)


@pytest.mark.slow
def test_weights_of_the_starting_model_stay_what_they_were(runs: dict[str, Run]) -> None:
    """Epoch 2 sees the rows of epoch 1 again, in other batches; step 3 of 3 is its first half."""
    means = [row["weight_mean"] for row in steps(runs["prift"])]
    assert means[2] == pytest.approx(sum(means[:2]) / 2, rel=0.2)
    learned = [row["weight_mean"] for row in steps(runs["dft"])]
    assert learned[2] > means[2], "the current model has come to believe its data"


@pytest.mark.slow
def test_one_pass_serves_every_arm(runs: dict[str, Run]) -> None:
    file = Path(resolve(runs["recipe"], "masked").output) / "data" / "token_stats_k20" / "tokens.parquet"
    runs["eaft_base"]
    made = file.stat().st_mtime_ns
    runs["masked"], runs["prift_padded"]
    assert file.stat().st_mtime_ns == made


@pytest.mark.slow
def test_padded_is_packed(runs: dict[str, Run]) -> None:
    for padded, packed in zip(steps(runs["prift_padded"]), steps(runs["prift"]), strict=True):
        assert padded["loss"] == pytest.approx(packed["loss"], rel=1e-4)


def test_a_pass_of_another_tokenizer_is_refused(runs: dict[str, Run], tmp_path: Path) -> None:
    """Made for the model's own key, so another template or data set in the same folder is an error, never used."""
    runs["eaft_base"]
    rows = tmp_path / "other.jsonl"
    tiny.write_sums(rows, 16, 5)
    config = resolve(runs["recipe"], "prift", [f"data.train={rows}", "seed=7"])
    with pytest.raises((ConfigError, DataError), match=r"data|stale"):
        train(config, [])


@pytest.mark.slow
def test_mile_has_mean_one(runs: dict[str, Run]) -> None:
    for row in steps(runs["mile"]):
        assert row["weight_mean"] == pytest.approx(1.0, rel=1e-5)


@pytest.mark.slow
def test_gift_from_a_stored_reference_is_gift_beside_a_live_one(runs: dict[str, Run]) -> None:
    live, stored = steps(runs["gift"]), steps(runs["gift_stored"])
    for name in ("loss", "nll", "anchor_kl", "grad_norm", "weight_mean"):
        assert [row[name] for row in stored] == pytest.approx([row[name] for row in live], rel=1e-4, abs=1e-6), name
    assert live[0]["anchor_kl"] == pytest.approx(0.0, abs=1e-6) and 0 < live[0]["weight_mean"] < 1


def test_finch_logs_the_rate_it_took(runs: dict[str, Run]) -> None:
    for row in steps(runs["finch"]):
        factor = min(max(math.sqrt(1.0 / row["nll"]), 0.1), 2.0)
        assert row["step_factor"] == pytest.approx(factor, rel=1e-6) and factor < 1
        assert row["lr"] == pytest.approx(1e-3 * factor, rel=1e-6)
    plain = steps(runs["sft"])
    assert steps(runs["finch"])[0]["loss"] == pytest.approx(plain[0]["loss"])
    assert steps(runs["finch"])[2]["nll"] > plain[2]["nll"], "smaller steps learn less"


def test_l2_holds_the_weights(runs: dict[str, Run]) -> None:
    held, lightly, plain = (steps(runs[arm]) for arm in ("held", "lightly", "sft"))
    assert [row["anchor_l2"] for row in held] == pytest.approx([0.0] * 3, abs=1e-5)  # lr * coef = 1: back to the start
    assert [row["loss"] for row in lightly] == pytest.approx([row["loss"] for row in plain], rel=1e-6)
    distances = [row["anchor_l2"] for row in lightly]
    assert 0 < distances[0] < distances[1] < distances[2]
    assert runs["held"].info["fused_head"], "no logits are needed for it"


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", ["{name: finch, anchor: {kind: l2, coef: 30}}", "{name: idft, stats: base, warmup: 0.3}"]
)
def test_resumed_they_are_the_uninterrupted_run(objective: str, runs: dict[str, Run], monkeypatch: Any) -> None:
    """Killed at step 3 with the state of step 2: the start, the rate of a batch and the share of the run come back."""
    from eaft_verl.training.sft.trainer import Trainer

    def trained(output: str) -> list[dict[str, Any]]:
        overrides = [f"objective={objective}", f"output={output}", "verl.trainer.save_freq=2"]
        return steps(train(resolve(runs["recipe"], "sft", [*overrides, "verl.trainer.total_training_steps=4"]), []))

    def killed(self: Trainer, step: int, *_: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    folder = f"{runs['recipe'].path.parent}/{objective[7:11]}"
    whole = trained(f"{folder}-whole")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_check_finite", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(f"{folder}-killed")
    resumed = trained(f"{folder}-killed")
    names = whole[0].keys() & {"step", "loss", "nll", "grad_norm", "lr", "weight_mean", "anchor_l2", "step_factor"}
    assert [[row[name] for name in names] for row in resumed] == [[row[name] for name in names] for row in whole]
    assert len(whole) == 4 and Run(Path(f"{folder}-killed") / "sft-seed0").info["attempt"] == 2
