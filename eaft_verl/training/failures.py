"""What became of a training in one line: the cause, the file with its details, what to change."""

import math
import re

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError, WorkerCrashedError

from eaft_verl.cluster.ray_logs import details_kept
from eaft_verl.errors import NO_SPACE, ConfigError, DiskFull, Lost, OutOfMemory, RunError, WorkerFailed
from eaft_verl.planning.units import one_unit
from eaft_verl.recipe.config import Config
from eaft_verl.runs import Run

NO_SPACE_SAID = re.compile(r"No space left|iostream error|Disk quota|File too large|failed writing file", re.I)
NO_MEMORY_SAID = re.compile(r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory", re.I)
KILLED_FOR_MEMORY = re.compile(r"due to the node running low on memory|killed due to .*memory|memory monitor", re.I)


def explained(error: BaseException, config: Config, run: Run) -> BaseException:
    """The error that the user is told: one with a cause that is known and an exit code, or what it was."""
    cause = innermost(error)
    if isinstance(cause, RunError) and not isinstance(cause, RayError):  # Ray mixes what was raised into its own
        return cause
    if isinstance(cause, OSError) and cause.errno in NO_SPACE:
        return _disk_full(cause, run)
    if not isinstance(error, RayError):
        return error
    text, pids = f"{error}", [int(found) for found in re.findall(r"pid[=:] ?(\d+)", str(error))]
    if isinstance(cause, ConfigError):  # ours, raised in another process
        return RunError(str(cause))
    where = details_kept(run, text, pids)
    said = " ".join(str(cause).split())
    if isinstance(error, OutOfMemoryError) or KILLED_FOR_MEMORY.search(text):
        return OutOfMemory(f"a host ran out of memory and Ray ended a worker: {on_host(config)}{where}")
    if isinstance(cause, MemoryError) or (isinstance(cause, RuntimeError) and NO_MEMORY_SAID.search(said)):
        device = type(cause).__name__ == "OutOfMemoryError"
        advice = _on_gpu(config) if device else on_host(config)
        return OutOfMemory(f"a worker ran out of memory{' on its GPU' * device}: {advice}{where}")
    if NO_SPACE_SAID.search(said):
        return _disk_full(cause, run)
    return _of_worker(cause, said, text, where, pids)


def _of_worker(cause: BaseException, said: str, text: str, where: str, pids: list[int]) -> RunError:
    """A worker's end that no number of the recipe explains; `text`: all that Ray says of it."""
    if isinstance(cause, RayActorError | WorkerCrashedError | NodeDiedError):
        pid = f" (pid {pids[0]})" if pids else ""
        return Lost(f"a worker{pid} has died: {_why(text)}{where}; run the same command again")
    if isinstance(cause, RayError):
        return Lost(f"Ray failed: {type(cause).__name__}: {said[:300]}{where}; run the same command again")
    return WorkerFailed(f"a worker failed: {type(cause).__name__}: {said[:500]}{where}")


def innermost(error: BaseException) -> BaseException:
    """What was raised first, in whichever process."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException) and error.cause is not error:
        error = error.cause
    return error


def on_device(config: Config) -> str:
    """The largest micro-batch and a smaller one; where it cannot be smaller, what else lowers the peak."""
    batch, longest = config.verl.data, config.data.max_length
    if not batch.use_dynamic_bsz and (rows := batch.micro_batch_size_per_gpu) > 1:
        return (
            f"a micro-batch has {rows} rows, up to {rows * longest} tokens; try "
            f"verl.data.micro_batch_size_per_gpu={rows // 2}"
        )
    least = math.ceil(longest / config.verl.engine.ulysses_sequence_parallel_size)  # one example must fit
    limit = batch.max_token_len_per_gpu if batch.use_dynamic_bsz else longest
    said = f"a micro-batch has up to {limit} tokens on a device; try "
    if batch.use_dynamic_bsz and limit > least:
        return said + f"verl.data.max_token_len_per_gpu={max(least, limit // 2)}"
    half = longest // 2
    return (
        f"{said}verl.engine.offload_policy=true, or shorter rows in another output=: data.max_length={half} "
        f"data.over_long=drop verl.data.max_token_len_per_gpu={half}"
    )


def _on_gpu(config: Config) -> str:
    layers = ", or verl.engine.wrap_policy.disable=false" if one_unit(config, config.model) else ""
    return on_device(config) + layers


def on_host(config: Config) -> str:
    """The same for the memory of a host, which all its workers share."""
    workers = config.verl.trainer.n_gpus_per_node
    fewer = f"verl.trainer.n_gpus_per_node={workers // 2}, or " if workers > 1 else ""
    told, _, advice = on_device(config).partition("try ")
    return f"{workers} worker(s) per node, {told}try {fewer}{advice}"


def _disk_full(cause: BaseException, run: Run) -> DiskFull:
    name = (isinstance(cause, OSError) and cause.filename) or run.path
    return DiskFull(
        f"no space left while writing {name}; what was saved before is whole. Free space or lower "
        "verl.trainer.max_ckpt_to_keep, then run the same command again"
    )


def _why(text: str) -> str:
    """Ray's reason, less its advice."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    told = [line for line in lines if "Worker exit" in line or "exit type" in line or "node" in line.lower()]
    return (told or lines[-1:] or ["no reason given"])[0][:300]
