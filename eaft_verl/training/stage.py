"""`eaft train`: a resolved configuration -> a finished run directory, resumed where an earlier attempt stopped."""

import shutil
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from eaft_verl.cluster.doctor import require_machine
from eaft_verl.data.prepare import Prepared
from eaft_verl.environment import describe
from eaft_verl.errors import ConfigError, RunError
from eaft_verl.evaluation.settings import evaluation_key
from eaft_verl.models import check_same_vocabulary, load_tokenizer, model_key, resolve_model
from eaft_verl.objectives import Objective, Psft
from eaft_verl.recipe.datasets import prepare_data
from eaft_verl.recipe.views import evaluate_settings, objective_of, world_size
from eaft_verl.runs import Run, cause_of
from eaft_verl.training.derive import derive
from eaft_verl.training.grpo.run import train_grpo


def run_folder(config: DictConfig) -> Path:
    """Where an arm's run lives: OUTPUT/ARM-seedN."""
    return Path(config.output) / f"{config.arm}-seed{config.seed}"


def train(config: DictConfig, declared: list[str]) -> Run:
    """Train one arm; the returned run is finished. A failure is written into run.json and raised."""
    require_machine(config)
    model = resolve_model(config.model)
    if config.objective and (anchor := objective_of(config).anchor) and anchor.reference:
        check_same_vocabulary(model, anchor.reference)
    tokenizer = load_tokenizer(model)
    data = prepare_data(config, tokenizer, "train")
    heldout = prepare_data(config, tokenizer, "heldout") if config.data.heldout else None
    if config.trainer == "sft":
        _check_lengths(config, data)
    keys = {
        "model": model_key(config.model),
        "data": data.key,
        "template": data.manifest["template_hash"],
        "evaluation": evaluation_key(evaluate_settings(config, heldout and heldout.path)),
    }
    config, declared, derived = derive(config, declared, keys, data.examples)
    run = _open(config, declared, keys, derived)
    with run.locked():
        run.update(status="running", attempt=run.info.get("attempt", 0) + 1, error=None)
        try:
            if config.trainer == "grpo":
                run.update(**train_grpo(config, run, data, str(model), tokenizer))
                run.update(status="finished", finished=time.time())
            else:
                _train(config, run, data, heldout.examples if heldout else [], str(model), keys)
        except BaseException as error:
            run.update(status="failed", error=cause_of(error))
            raise
    return run


def _open(config: DictConfig, declared: list[str], keys: dict[str, str], derived: dict[str, Any]) -> Run:
    """A new run directory, or the unfinished one of the same configuration, data and model."""
    folder = run_folder(config)
    if not (folder / "run.json").exists():
        info = {"kind": "arm", "recipe": config.name, "arm": config.arm, "seed": config.seed, "model": config.model}
        objective = config.objective and OmegaConf.to_container(config.objective)
        info |= {"keys": keys, "declared": declared, "objective": objective, "derived": derived}
        return Run.create(folder, info=info, config=OmegaConf.to_yaml(config), env=describe())
    run = Run(folder)
    if run.info["status"] == "finished":
        raise RunError(
            f"{folder} holds a finished run, which is never overwritten; choose another output= or remove it"
        )
    if run.config != OmegaConf.to_container(config) or run.info["keys"] != keys:
        raise RunError(
            f"{folder} holds an unfinished run of another configuration, model or data set; choose another output= or "
            "remove it"
        )
    return run


def _check_lengths(config: DictConfig, data: Prepared) -> None:
    """A packed micro-batch must hold the longest example: verl would fail at the step that meets it."""
    batch = config.verl.data
    limit = batch.max_token_len_per_gpu * config.verl.engine.ulysses_sequence_parallel_size
    longest = max(len(example.input_ids) for example in data.examples)
    if batch.use_dynamic_bsz and longest > limit:
        raise ConfigError(
            f"the longest example has {longest} tokens and verl.data.max_token_len_per_gpu allows {limit}"
        )


def _train(config: DictConfig, run: Run, data: Prepared, heldout: list[Any], model: str, keys: dict[str, str]) -> None:
    from eaft_verl.cluster.preflight import require_cluster
    from eaft_verl.cluster.session import ray_session
    from eaft_verl.training.interruption import sigterm_as_request
    from eaft_verl.training.sft.workers import start_workers, stop_workers
    from eaft_verl.training.verl_cpu.private import require_version

    require_version()
    with ray_session(config.device, world_size(config)), sigterm_as_request() as stop:
        require_cluster(config)
        from eaft_verl.training.sft import checkpoint
        from eaft_verl.training.sft.anchor import anchor_sources, needs_second_model, reference_model
        from eaft_verl.training.sft.loss import TokenLoss
        from eaft_verl.training.sft.old_policy import OldPolicy
        from eaft_verl.training.sft.trainer import Trainer, total_steps

        steps = total_steps(config, len(data.examples))
        objective = objective_of(config)
        reference = (reference_model(objective) or model) if needs_second_model(config, objective) else None
        group = start_workers(config, model, steps, TokenLoss(_probe(objective)), reference)
        try:
            trainer = Trainer(config, run, group, data.examples, heldout, model)
            objective = _calibrate(config, trainer, objective, keys)
            trainer.sources.extend(anchor_sources(config, trainer, objective, keys))
            group.set_loss_fn(TokenLoss(objective))
            if state := checkpoint.load(run, group):
                trainer.state.update(state)
            if isinstance(objective, Psft):
                trainer.old_policy = OldPolicy(objective.updates_per_refresh, trainer.state)
                trainer.sources.append(trainer.old_policy)
            run.rewind_metrics(trainer.state["step"])
            drop_checkpoints_after(run, trainer.state["step"])
            started = time.monotonic()
            trainer.fit(objective, stop)
            checkpoint.remove(run)
            run.update(
                status="finished",
                finished=time.time(),
                total_steps=trainer.state["step"],
                train_seconds=trainer.state["seconds"],
                wall_seconds=time.monotonic() - started,
                workers=group.world_size,
                **trainer.plan.outcome(),
                memory_gib_per_worker=group.peak_memory(),
            )
        finally:
            stop_workers(group)


def _probe(objective: Objective) -> Objective:
    """Plain SFT with the same K, for passes before the objective is complete."""
    from eaft_verl.objectives import Sft

    return Sft(k=objective.k)


def _calibrate(config: DictConfig, trainer: Any, objective: Objective, keys: dict[str, str]) -> Objective:
    """Thresholds and sample weights from the base model's pass over the data, where the objective takes them there."""
    if "base" not in objective.needs:
        return objective
    from eaft_verl.training.sft.base_pass import base_stats

    path = Path(config.output) / "data" / f"base_stats_k{objective.k}.safetensors"
    key = "/".join(keys[name] for name in ("model", "data", "template"))
    size = config.verl.data.train_batch_size
    base = base_stats(
        path, key, trainer.examples, objective.k, lambda rows: trainer.infer(trainer.examples, rows), size
    )
    weights = objective.sample_weights(base)
    trainer.sample_weights = None if weights is None else weights.tolist()
    calibrated = objective.calibrate(base)
    trainer.run.update(calibrated=dict(vars(calibrated).items()))
    return calibrated


def drop_checkpoints_after(run: Run, step: int) -> None:
    """Exports of steps that are about to be trained again."""
    for found, folder in run.checkpoints().items():
        if found > step:
            shutil.rmtree(folder)
