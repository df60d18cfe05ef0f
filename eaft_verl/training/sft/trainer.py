"""The training loop: batches to the workers, metrics to the run, a model at every evaluation point."""

import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from eaft_verl.data.parquet import Example, lengths_of
from eaft_verl.errors import Diverged
from eaft_verl.files import write_json
from eaft_verl.objectives import Objective, Talr
from eaft_verl.recipe.config import Config
from eaft_verl.runs import Run, step_name
from eaft_verl.training.export import export_dtype
from eaft_verl.training.interruption import StopRequest
from eaft_verl.training.progress import Progress
from eaft_verl.training.schedule import MAX_NONFINITE_STEPS, Moment, SaveClock, training_plan
from eaft_verl.training.sft import checkpoint
from eaft_verl.training.sft.base_tokens import BaseTokens
from eaft_verl.training.sft.batches import TokenSource, balanced, make_batch
from eaft_verl.training.sft.loss import BATCH_FLAGS
from eaft_verl.training.sft.meter import DriftMeter
from eaft_verl.training.sft.old_policy import OldPolicy
from eaft_verl.training.sft.order import PADDING, batch_indices, sequential_batches, steps_per_epoch
from eaft_verl.training.sft.self_check import check_export
from eaft_verl.training.sft.token_pass import metrics_of
from eaft_verl.training.trackers import Trackers

LOGGED = (
    *("loss", "nll", "token_accuracy", "entropy", "weight_mean", "weight_p10", "weight_p50", "weight_p90", "ess"),
    *("conflict_share", "nll_low_entropy", "nll_high_entropy", "grad_norm", "lr", "step_tokens"),
)
VALIDATED = ("nll", "token_accuracy", "entropy", "conflict_share")


def total_steps(config: Config, examples: int) -> int:
    """Optimizer steps of the arm."""
    trainer = config.verl.trainer
    per_epoch = steps_per_epoch(examples, config.verl.data.train_batch_size)
    return trainer.total_training_steps or per_epoch * trainer.total_epochs


class Trainer:
    """One arm's training on a worker group. `state` is all that must survive a restart besides the workers' own."""

    def __init__(
        self,
        config: Config,
        run: Run,
        group: Any,
        examples: Sequence[Example],
        heldout: Sequence[Example],
        model: str,
    ) -> None:
        self.config, self.run, self.group, self.model = config, run, group, model
        self.examples, self.heldout = examples, heldout
        self.lengths = lengths_of(examples)
        self.batch_size: int = config.verl.data.train_batch_size
        self.steps = total_steps(config, len(examples))
        self.plan = training_plan(config, self.steps, group.world_size)
        self.per_epoch = steps_per_epoch(len(examples), self.batch_size)
        self.sample_weights: list[float] | None = None
        self.sources: list[TokenSource] = []
        self.base: BaseTokens | None = None
        self.state: dict[str, Any] = {"step": 0, "seconds": 0.0, "tokens": 0, "samples": 0, "tau": None}
        self.state |= {"nonfinite": 0, "skipped": 0}  # steps without an update: in a row until now, and in all
        self.old_policy: OldPolicy | None = None
        self.exported = False
        keep = config.verl.trainer.max_ckpt_to_keep
        self.saver = checkpoint.Saver(run, group, keep, background=bool(config.async_save))
        self.board: Any = None
        self.trackers: Trackers | None = None
        self.meter: DriftMeter | None = None
        self.validated = (0, math.nan)  # step of the last pass over the held-out rows, their NLL
        self.beat: Callable[..., None] = lambda seconds=None: None  # told of every call that has come back

    def infer(self, examples: Sequence[Example], indices: list[int], **flags: Any) -> Any:
        """Forward pass over these rows, in their order; the worker's answer with per-token outputs and metrics."""
        known = examples is self.examples
        sources = [self.base] if known and self.base else []
        weights = self.sample_weights if known else None
        found = self.group.infer_batch(make_batch(examples, indices, {**BATCH_FLAGS, **flags}, weights, sources)).get()
        self.beat()
        return found

    def _balanced(self, rows: list[int]) -> list[int]:
        """The rows in an order that gives every worker about the same work."""
        if not self.config.verl.trainer.balance_batch:
            return rows
        ranks = self.group.world_size // self.config.verl.engine.ulysses_sequence_parallel_size
        lengths = {index: int(self.lengths[index]) for index in rows if index != PADDING}
        lengths[PADDING] = min(lengths.values())
        return balanced(rows, lengths, ranks)

    def fit(self, objective: Objective, stop: StopRequest) -> None:
        """Train from `state` to the end; Diverged when the loss stays non-finite, Interrupted once `stop` is set."""
        trainer = self.config.verl.trainer
        save_every = self._frequency(trainer.save_freq)
        test_every = self._frequency(trainer.test_freq)
        evaluate = last = False
        for row in self.run.metrics():
            evaluate, last = self._recalled(row["step"], self.plan.after(row))
        self.board = SummaryWriter(str(self.run.path / "tensorboard"), purge_step=self.state["step"] + 1)
        progress = Progress(f"{self.config.arm}", self.plan.expected, self.state["step"])
        clock = SaveClock(self.config.save_minutes)
        try:
            if evaluate:
                self.export(self.state["step"])  # where an earlier attempt could not
            while not last:
                self._leave_if_asked(stop)
                step = self.state["step"] + 1
                row = self._step(step, objective)
                self.saver.settle(wait=False)
                evaluate, last = self._watched(step, self.plan.after(row))
                progress.total = self.plan.expected
                progress.update(step, row)
                if self.heldout and step % test_every == 0:
                    self.validate(step)
                if evaluate:
                    self.export(step)
                if not last and (step % save_every == 0 or clock.due(row["step_s"])):
                    self._save(step)
                    clock.restart()
            self.saver.settle(wait=True)
        except Diverged:
            self.saver.settle(wait=True)  # the workers live, and what they are writing was sound
            raise
        finally:
            progress.close()
            self.board.close()

    def _recalled(self, step: int, moment: Moment) -> Moment:
        return moment if self.meter is None else self.meter.recalled(step, moment)

    def _watched(self, step: int, moment: Moment) -> Moment:
        """What happens after this update, once the meter was read."""
        return moment if self.meter is None else self.meter.after(step, moment)

    def _leave_if_asked(self, stop: StopRequest) -> None:
        """Save what is not saved and end, between two steps."""
        if not stop.requested:
            return
        step = self.state["step"]
        self.saver.settle(wait=True)
        if step and checkpoint.newest(self.run) != step:
            self._save(step)
            self.saver.settle(wait=True)
        saved = checkpoint.newest(self.run)
        raise stop.outcome(f"step {saved} of {self.steps}" if saved else None, str(self.run.path))

    def _save(self, step: int) -> None:
        self.saver.save(step, {**self.state, "epoch": step / self.per_epoch})

    def _step(self, step: int, objective: Objective) -> dict[str, Any]:
        started = time.monotonic()
        rows = self.rows(step)
        if self.old_policy is not None:
            self.old_policy.refresh(step, self.rows, lambda rows: self.infer(self.examples, rows))
        batch_state = self._batch_state(step, rows, objective)
        flags = {**BATCH_FLAGS, "objective_state": batch_state}  # the worker advances the learning rate
        batch = make_batch(self.examples, self._balanced(rows), flags, self.sample_weights, self.sources)
        metrics = metrics_of(self.group.train_batch(batch).get())
        seconds = time.monotonic() - started
        self.beat(seconds)
        self.state.update(
            step=step,
            seconds=self.state["seconds"] + seconds,
            tokens=self.state["tokens"] + int(metrics["step_tokens"]),
            samples=self.state["samples"] + sum(index != PADDING for index in rows),
        )
        if math.isfinite(metrics["median_example_nll"]):
            self.state["tau"] = metrics["median_example_nll"]
        row: dict[str, Any] = {
            "split": "train",
            "step": step,
            "epoch": step / self.per_epoch,
            "time": time.time(),
            "seconds": self.state["seconds"],
            "tokens": self.state["tokens"],
            "samples": self.state["samples"],
            **{name: metrics[name] for name in LOGGED},
            **({} if objective.divergence is None else {"anchor_kl": metrics["anchor_kl"]}),
            **{name: metrics[name] for name in ("anchor_l2", "step_factor") if name in metrics},
            "step_s": seconds,
            "tokens_per_s": float(self.lengths[[index for index in rows if index >= 0]].sum()) / seconds,
            "memory_gib": metrics["perf/max_memory_allocated_gb"],
        }
        self.log(row)
        self._check_finite(step, rows, metrics)
        return row

    def rows(self, step: int) -> list[int]:
        """Rows of the training data, padding among them, that a step trains on."""
        return batch_indices(step, len(self.examples), self.batch_size, self.config.seed)

    def log(self, row: dict[str, Any]) -> None:
        """One row to metrics.jsonl and to whoever else is told."""
        self.run.log(row)
        for name in row.keys() - {"split", "step", "time"}:
            self.board.add_scalar(f"{row['split']}/{name}", row[name], row["step"])
        if self.trackers is not None:
            self.trackers.log(row)

    def _batch_state(self, step: int, rows: list[int], objective: Objective) -> dict[str, float]:
        """Scalars of the global batch that the objective asks for; an extra forward pass where they must be exact."""
        state: dict[str, float] = {"progress": (step - 1) / self.steps}
        if isinstance(objective, Talr) and "tau" in objective.needs:
            known = self.state["tau"] if objective.tau == "previous_step" else None
            known = self.base.median_nll(rows) if self.base else known
            state["tau"] = known or self._forward(rows, {})["median_example_nll"]
        if objective.weight_norm == "batch_mean":
            mean = self._forward(rows, state)["weight_mean"]
            state["weight_scale"] = 1.0 / mean if mean > 0 else 1.0
        return state

    def _forward(self, rows: list[int], state: dict[str, float]) -> dict[str, float]:
        return metrics_of(self.infer(self.examples, rows, objective_state=state))

    def _check_finite(self, step: int, rows: list[int], metrics: dict[str, float]) -> None:
        """Count steps whose update was skipped, keep their rows, and end when there are too many in a row."""
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            self.state["nonfinite"] = 0
            return
        self.state["nonfinite"] += 1
        self.state["skipped"] += 1
        what = f"step {step}: loss {metrics['loss']:.4g}, gradient norm {metrics['grad_norm']:.4g}"
        file = self.run.path / "nonfinite" / f"{step_name(step)}.json"
        found = [{"row": row, "id": self.examples[row].id} for row in rows if row != PADDING]
        write_json(file, {**{name: metrics[name] for name in ("loss", "nll", "grad_norm", "lr")}, "rows": found})
        count = self.state["nonfinite"]
        if count >= MAX_NONFINITE_STEPS:
            raise Diverged(
                f"{what}: not finite for {count} steps in a row; their rows are listed in {file.parent}. Go on "
                "with resume=changed and a lower verl.optim.lr, or mend those rows and choose another output="
            )
        print(
            f"eaft: warning: {what}: update skipped ({count} of at most {MAX_NONFINITE_STEPS} in a row); its rows "
            f"are listed in {file}",
            file=sys.stderr,
            flush=True,
        )

    def require_finite(self) -> None:
        """Diverged where the last step was not finite: what comes out is not what was asked for."""
        if self.state["nonfinite"]:
            raise Diverged(
                f"the last {self.state['nonfinite']} step(s) had no finite loss or gradient and changed nothing; their "
                f"rows are listed in {self.run.path / 'nonfinite'}. Go on with resume=changed and a lower "
                "verl.optim.lr, or mend those rows and choose another output="
            )

    def validate(self, step: int) -> float:
        """Plain cross-entropy over every held-out row, whatever the objective: one row in metrics.jsonl a step."""
        if self.validated[0] == step:
            return self.validated[1]
        total, sums = 0.0, dict.fromkeys(VALIDATED, 0.0)
        for indices in sequential_batches(len(self.heldout), self.batch_size):
            metrics = metrics_of(self.infer(self.heldout, indices))
            total += metrics["step_tokens"]
            for name in VALIDATED:
                sums[name] += metrics[name] * metrics["step_tokens"]
        means = {name: sums[name] / total for name in VALIDATED}
        self.log({"split": "val", "step": step, "time": time.time(), "step_tokens": total, **means})
        self.validated = (step, means["nll"])
        return means["nll"]

    def export(self, step: int) -> None:
        """The model at this step, for evaluation and use."""
        folder = self.run.path / "checkpoints" / step_name(step)
        if not (folder / "config.json").exists():
            ends, dtype = self.run.info.get("end_of_turn", []), export_dtype(self.model)
            try:
                self.group.export(str(folder), self.model, dtype, ends)
                if not self.exported:
                    check_export(self.config, self.group, self.examples, str(folder), dtype)
                self.exported = True
            except Exception:  # whatever it is, what has been learned is kept: the next attempt begins with this export
                shutil.rmtree(folder, ignore_errors=True)
                self.saver.save(step, self.state)
                self.saver.settle(wait=True)
                raise
            self.beat()

    def _frequency(self, value: int | str) -> float:
        """Steps between two events; infinity for never (any step % inf is the step itself, never 0)."""
        if value == "after_each_epoch":
            return self.per_epoch
        return math.inf if value == -1 else float(value)
