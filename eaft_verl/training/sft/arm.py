"""An SFT arm on its workers: passes before the first step, the loop, what run.json says in the end."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

from eaft_verl.data.mixture import drawn
from eaft_verl.data.parquet import Example, Examples, trained_of
from eaft_verl.errors import ConfigError
from eaft_verl.objectives import Objective, Psft, Sft
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.views import objective_of
from eaft_verl.runs import Run, drop_checkpoints_after
from eaft_verl.tokens.stats import BaseStats
from eaft_verl.training import states
from eaft_verl.training.interruption import StopRequest
from eaft_verl.training.resume import announce
from eaft_verl.training.sft import checkpoint
from eaft_verl.training.sft.anchor import anchor_sources, needs_second_model, reference_model
from eaft_verl.training.sft.base_tokens import BaseTokens
from eaft_verl.training.sft.loss import TokenLoss, base_columns
from eaft_verl.training.sft.meter import drift_meter
from eaft_verl.training.sft.old_policy import OldPolicy
from eaft_verl.training.sft.order import PADDING
from eaft_verl.training.sft.self_check import self_check
from eaft_verl.training.sft.token_pass import EmitDistribution, Infer
from eaft_verl.training.sft.trainer import Trainer, total_steps
from eaft_verl.training.sft.workers import start_workers, stop_workers
from eaft_verl.training.trackers import Trackers
from eaft_verl.training.watchdog import Watchdog

BaseOf = Callable[[Infer], tuple[BaseStats, float]]  # what the base says of the training data, seconds of its pass


def train_arm(
    config: Config,
    run: Run,
    examples: Sequence[Example],
    heldout: Sequence[Example],
    model: str,
    keys: dict[str, str],
    base_of: BaseOf,
    probe: Sequence[Example],
    stop: StopRequest,
    saved: states.Saved | None,
) -> None:
    """Start the workers, train from what is saved to the end, and mark the run finished."""
    objective = objective_of(config)
    reference = (reference_model(objective) or model) if needs_second_model(config, objective) else None
    plain = Sft(k=objective.k)  # for passes before the objective is complete
    with Watchdog(run.path) as watch, closing(Trackers(config, run)) as trackers:
        steps = total_steps(config, len(examples))
        group = start_workers(config, model, steps, TokenLoss(plain), reference, watch.variables)
        try:
            _require_finite(config, group)
            trainer = Trainer(config, run, group, examples, heldout, model)
            trainer.trackers = trackers
            trainer.beat = _leaving(stop, watch, run, steps)
            run.update(self_check=self_check(config, group, examples, model))
            trainer.meter = drift_meter(config, trainer, probe, keys)
            objective = _complete(config, trainer, objective, keys, base_of, saved)
            if trainer.meter is not None:
                trainer.meter.recall()
            _say_whether_fused(config, run, objective, group)
            trainer.beat = watch.beat
            _fit(trainer, objective, stop)
        finally:
            stop_workers(group)


def _fit(trainer: Trainer, objective: Objective, stop: StopRequest) -> None:
    """The loop, and what run.json says after it."""
    started = time.monotonic()
    trainer.fit(objective, stop)
    trainer.require_finite()
    states.remove(trainer.run.path)
    trainer.run.update(
        status="finished",
        finished=time.time(),
        total_steps=trainer.state["step"],
        train_seconds=trainer.state["seconds"],
        wall_seconds=time.monotonic() - started,
        workers=trainer.group.world_size,
        skipped_steps=trainer.state["skipped"],
        **trainer.plan.outcome(),
        **_drawn(trainer),
        **({} if trainer.meter is None else {"meter": trainer.meter.outcome()}),
        memory_gib_per_worker=trainer.group.peak_memory(),
    )


def _drawn(trainer: Trainer) -> dict[str, Any]:
    """What of each part of a mixture was really trained on; nothing where the data is no mixture."""
    examples = trainer.examples
    if not isinstance(examples, Examples) or "source" not in examples.table.column_names:
        return {}
    names = examples.table.column("source").to_pylist()
    rows = [row for step in range(1, trainer.state["step"] + 1) for row in trainer.rows(step) if row != PADDING]
    found = drawn(names, trained_of(examples), rows)
    parts = [f"{name} {share['examples']:.1%} ({share['tokens']:.1%} of the tokens)" for name, share in found.items()]
    print(f"[{trainer.config.arm}] drawn of the training examples: {', '.join(parts)}", flush=True)
    return {"drawn": found}


def _leaving(stop: StopRequest, watch: Watchdog, run: Run, steps: int) -> Callable[..., None]:
    """`watch.beat` for the passes before the first step, which a stop request ends where they are."""

    def beat(seconds: float | None = None) -> None:
        watch.beat(seconds)
        if stop.requested:
            saved = checkpoint.newest(run)
            raise stop.outcome(f"step {saved} of {steps}" if saved else None, str(run.path))

    return beat


def _say_whether_fused(config: Config, run: Run, objective: Objective, group: Any) -> None:
    reason = group.plain_head()[0]
    if reason is None and objective.divergence is not None:
        reason = "the anchor is computed from them"
    if reason is None and not config.verl.model.use_remove_padding:
        reason = "verl.model.use_remove_padding=false"
    if reason and config.fused_head:
        print(f"[{config.arm}] the loss is formed from whole logits: {reason}")
    run.update(fused_head=reason is None)
    if made := group.row_kernels()[0]:  # on a GPU, by the passes of the self-check
        kernels, why = made
        if why:
            print(f"[{config.arm}] {why}: chunked torch is used instead, about half as fast in the head")
        run.update(head_kernels=kernels)


def _require_finite(config: Config, group: Any) -> None:
    """ConfigError for a model that is broken before anything has been learned."""
    if broken := sorted({name for names in group.nonfinite_weights() for name in names}):
        raise ConfigError(
            f"model {config.model} holds values that are not finite in {len(broken)} weight(s), e.g. {broken[0]}; "
            "download or convert it again"
        )


def _complete(
    config: Config,
    trainer: Trainer,
    objective: Objective,
    keys: dict[str, str],
    base_of: BaseOf,
    saved: states.Saved | None,
) -> Objective:
    """The objective with what it takes from the base model, its sources, and the state of an earlier attempt."""
    objective = _calibrate(trainer, objective, base_of)
    trainer.sources.extend(anchor_sources(config, trainer, objective, keys))
    trainer.group.set_loss_fn(TokenLoss(objective))
    if saved:
        info = trainer.run.info
        now = info.get("calibrated", info.get("objective"))
        trainer.state.update(checkpoint.restore(saved, trainer.group, now))
        announce(saved, trainer.plan.expected)
    if isinstance(objective, Psft):
        trainer.old_policy = OldPolicy(objective.updates_per_refresh, trainer.state)
        trainer.sources.append(trainer.old_policy)
    trainer.run.rewind_metrics(trainer.state["step"])
    drop_checkpoints_after(trainer.run, trainer.state["step"])
    return objective


def _calibrate(trainer: Trainer, objective: Objective, base_of: BaseOf) -> Objective:
    """Thresholds and sample weights from the base model's pass over the data, where the objective takes them there."""
    if not objective.needs_base:
        return objective
    trainer.group.set_loss_fn(EmitDistribution(objective.k))
    base, seconds = base_of(lambda rows: trainer.infer(trainer.examples, rows))
    weights = objective.sample_weights(base)
    trainer.sample_weights = None if weights is None else weights.tolist()
    if objective.stats == "base":
        trainer.base = BaseTokens(trainer.examples, base, base_columns(objective))
        trainer.sources.append(trainer.base)
    calibrated = objective.calibrate(base)
    trainer.state["seconds"] += seconds
    trainer.run.update(calibrated=asdict(calibrated), base_pass={"seconds": seconds})  # anchors included
    return calibrated
