"""A GRPO arm: verl's own `main_ppo` trainer, started, followed and recorded as a run like any other."""

import importlib
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from eaft_verl.data.prepare import Prepared
from eaft_verl.data.prompts import write_prompts
from eaft_verl.errors import Diverged, RunError
from eaft_verl.files import read_json
from eaft_verl.models import check_no_code
from eaft_verl.recipe.budgets import evaluation_points
from eaft_verl.recipe.config import Config, plain
from eaft_verl.recipe.views import world_size
from eaft_verl.runs import Run, step_name
from eaft_verl.training import states
from eaft_verl.training.grpo.config import (
    RunFiles,
    Schedule,
    ppo_config,
    prompt_length,
    save_steps,
    stop_ids,
    total_ppo_steps,
    updates_per_step,
)
from eaft_verl.training.grpo.metrics import VERL_FILE, Follower, Watch, no_signal, rewind
from eaft_verl.training.grpo.states import CAUSE_FILE, CHECK_FILE, STOP_FILE, mark_newest, require_inert
from eaft_verl.training.interruption import StopRequest, stop_request
from eaft_verl.training.quiet import kept_in, printed_in
from eaft_verl.training.resume import announce, starting_point

if TYPE_CHECKING:
    from eaft_verl.training.watchdog import Watchdog

POLL_S = 0.2


@dataclass(frozen=True)
class Plan:
    """What is known before Ray starts: files, steps, and where an earlier attempt stopped."""

    files: RunFiles
    schedule: Schedule
    per_epoch: int
    updates: int
    ends: list[str]


def train_grpo(config: Config, run: Run, data: Prepared, model: str, tokenizer: Any) -> dict[str, Any]:
    """Train the arm in its open, locked run directory; the fields of a finished run.json besides its status.

    Raises RunError with the cause when the trainer, a worker, the rollout or the reward failed or stands still. Told to
    stop, the step in progress is finished and saved; then Interrupted.
    """
    plan = _plan(config, run, data, model, tokenizer)
    _export_newest(config, run, plan)
    metrics_file = run.path / ".verl_metrics.jsonl"
    started = time.monotonic()
    if plan.schedule.start < plan.schedule.steps:
        _run_steps(config, run, plan, metrics_file)
    rows = run.metrics()
    if not math.isfinite(rows[-1]["grad_norm"]):
        raise Diverged(
            "the last step had no finite gradient; go on with resume=changed and a lower verl.optim.lr, or choose "
            "another output="
        )
    states.remove(run.path)
    metrics_file.unlink(missing_ok=True)
    return _fields(config, rows) | {"wall_seconds": time.monotonic() - started}


def _fields(config: Config, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What run.json says of a finished run, from its training rows; a warning where many taught nothing."""
    silent = sum(map(no_signal, rows))
    if silent:
        print(
            f"eaft: warning: {silent} of {len(rows)} steps of {config.arm} had equal rewards in every group and zero "
            "policy gradient; prompts that the model solves sometimes would teach it more",
            file=sys.stderr,
        )
    return {
        "total_steps": rows[-1]["step"],
        "steps_without_signal": silent,
        "train_seconds": rows[-1]["seconds"],
        "workers": world_size(config),
        "memory_gib_per_worker": [rows[-1]["memory_gib"]],
        **({"memory_gib_rollout": rows[-1]["rollout_memory_gib"]} if "rollout_memory_gib" in rows[-1] else {}),
    }


def _run_steps(config: Config, run: Run, plan: Plan, metrics_file: Path) -> None:
    """main_ppo in a Ray session of its own, to its end; Interrupted where it was told to stop before."""
    from eaft_verl.cluster.preflight import require_cluster
    from eaft_verl.cluster.ray_logs import logs_folder
    from eaft_verl.training.grpo.session import grpo_session
    from eaft_verl.training.watchdog import Watchdog

    with (
        kept_in(run.path),
        Watchdog(run.path) as watch,
        grpo_session(config.device, world_size(config), str(metrics_file), watch.variables),
        stop_request() as stop,
    ):
        run.update(ray_logs=logs_folder())
        require_cluster(config)
        settings = _settings(config, plan)
        metrics_file.unlink(missing_ok=True)
        _follow(config, run, plan, settings, Follower(run, metrics_file, plan.per_epoch), stop, watch)
    rows = run.metrics()
    if not rows or rows[-1]["step"] < plan.schedule.steps * plan.updates:
        raise _stopped(config, run, plan, stop)


def _export_newest(config: Config, run: Run, plan: Plan) -> None:
    """The export that an earlier attempt ended in, from its state."""
    from eaft_verl.training.export import export_dtype
    from eaft_verl.training.saved_model import export_saved

    start, model = plan.schedule.start, plan.files.model
    target = run.path / "checkpoints" / step_name(start * plan.updates)
    if start in plan.schedule.points and not (target / "config.json").exists():
        settings = {**plain(config.verl.model), "model_dtype": config.verl.engine.model_dtype}
        state = states.folders(run.path)[start] / "actor"
        export_saved(state, target, model, settings, export_dtype(model), plan.ends)


def _stopped(config: Config, run: Run, plan: Plan, stop: StopRequest) -> RunError:
    """What a stop request ends with: whether there is something to go on from."""
    saved = mark_newest(run.path) * plan.updates
    total = plan.schedule.steps * plan.updates
    return stop.outcome(f"step {saved} of {total}" if saved else None, str(run.path))


def _plan(config: Config, run: Run, data: Prepared, model: str, tokenizer: Any) -> Plan:
    """Prompts written, and the run's files cut back to the newest state that can be resumed."""
    import pyarrow.parquet as pq

    from eaft_verl.runs import drop_checkpoints_after

    check_no_code(Path(model) if Path(model).is_dir() else model)
    prompts = write_prompts(
        data,
        run.path / "prompts.parquet",
        max_prompt_length=prompt_length(config),
        tokenizer=tokenizer,
        grader=config.reward.grader,
    )
    files = RunFiles(str(prompts), model, str(run.path))
    count, updates = pq.read_metadata(prompts).num_rows, updates_per_step(config)
    steps = total_ppo_steps(config, count)
    if steps < 1:
        raise RunError(f"{count} prompts do not fill one batch of verl.data.train_batch_size; lower it")
    saved = starting_point(run, config.resume, updates)
    if saved:
        require_inert(saved.folder)
    start = saved.number if saved else 0
    mark_newest(run.path)
    announce(saved, steps * updates)
    run.rewind_metrics(start * updates)
    rewind(run.path / VERL_FILE, start)
    rewind(run.path / "rollouts.jsonl", start * updates)
    drop_checkpoints_after(run, start * updates)
    for leftover in (CAUSE_FILE, CHECK_FILE, STOP_FILE):
        (run.path / leftover).unlink(missing_ok=True)
    schedule = Schedule(
        steps, evaluation_points(steps), save_steps(config, steps, count), start, 60 * config.save_minutes
    )
    ends = sorted(data.manifest.get("end_of_turn", {}))
    return Plan(files, schedule, max(1, count // config.verl.data.train_batch_size), updates, ends)


def _settings(config: Config, plan: Plan) -> DictConfig:
    """main_ppo's configuration, passed through main_ppo's own validation."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    from eaft_verl.training.export import export_dtype

    model, ends = plan.files.model, plan.ends
    settings = ppo_config(config, plan.files, plan.schedule, stop_ids(model, ends), export_dtype(model), ends)
    with printed_in(Path(plan.files.run)):
        validate_config(settings, need_reference_policy(settings), need_critic(settings))
    return settings


def _follow(
    config: Config, run: Run, plan: Plan, settings: DictConfig, follower: Follower, stop: StopRequest, watch: "Watchdog"
) -> None:
    """Run main_ppo's trainer actor to its end, logging what it logs as it comes."""
    import ray
    from ray.exceptions import RayError

    from eaft_verl.training.failures import explained
    from eaft_verl.training.progress import Progress
    from eaft_verl.training.trackers import Trackers
    from eaft_verl.training.verl_cpu.private import trainer_actor

    trackers = Trackers(config, run)
    trainer = trainer_actor().remote()
    ready = trainer.__ray_call__.remote(lambda _: importlib.import_module("eaft_verl.training.grpo.trainer") and None)
    running = trainer.run.remote(settings)
    progress = Progress(config.arm, plan.schedule.steps * plan.updates, plan.schedule.start * plan.updates)
    judge = Watch(follower.totals["samples"])
    try:
        ray.get(ready)
        done: list[Any] = []
        while not done:
            done, _ = ray.wait([running], timeout=POLL_S)
            _take_check(run)
            for row in follower.poll():
                watch.beat(row["step_s"])
                progress.update(row["step"], row)
                trackers.log(row)
                judge.see(row)
            if stop.requested:
                (run.path / STOP_FILE).touch()
        ray.get(running)
    except RayError as error:
        found = explained(error, config, run)
        told = type(found)(f"main_ppo failed: {found}{_reported(run.path)}")
        raise (_stopped(config, run, plan, stop) if stop.requested else told) from None
    finally:
        progress.close()
        trackers.close()


def _take_check(run: Run) -> None:
    """Say what the trainer's self-check found, and keep it in run.json."""
    file = run.path / CHECK_FILE
    if file.exists():
        found = read_json(file)
        print(f"eaft: {found.pop('line')}", flush=True)
        run.update(self_check=found)
        file.unlink()


def _reported(run: Path) -> str:
    """What a rollout worker wrote of what happened to it: verl only counts that."""
    file = run / CAUSE_FILE
    return (
        f"; the rollout reported: {' '.join(file.read_text(encoding='utf-8').split())[:1000]}" if file.exists() else ""
    )
