"""One connection to Ray for both trainers: a cluster's, or a local one that ends with the block."""

import contextlib
import functools
import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined] # compiled, its stub lacks it
from ray.job_config import JobConfig

from eaft_verl.boundary import in_cluster
from eaft_verl.cluster.demand import CPUS_PER_WORKER
from eaft_verl.cluster.runtime_env import build_runtime_env
from eaft_verl.errors import ConfigError, Lost
from eaft_verl.planning.machine import FREED_IS_KEPT, cpus_here, waiting_threads

_ROOM = {"sft": 0, "grpo": 16}  # logical CPUs, which cost nothing, for the actors of verl's that are no workers


def worker_environment(device: str, workers: int) -> dict[str, str]:
    """Environment of the workers (and, on CPU, of the driver before it imports verl). Values already set win."""
    wanted = {"TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        wanted |= {
            "VERL_PLATFORM": "cpu",
            "VERL_ENGINE_DEVICE": "cuda",  # verl registers its FSDP engine under this name; it runs on CPU as it is
            # threads beyond the cores spin against each other: 200 times slower was measured
            "OMP_NUM_THREADS": str(max(1, cpus_here() // workers)),
            **waiting_threads(),
            **FREED_IS_KEPT,
        }
    chosen = {key: os.environ.get(key, value) for key, value in wanted.items()}
    if path := os.environ.get("PYTHONPATH"):
        chosen["PYTHONPATH"] = path  # a user's own objective must be importable in the workers
    return chosen


def submitted_with() -> dict[str, Any]:
    """The runtime_env of the Ray job that this process belongs to; empty outside a job."""
    return json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")).get("runtime_env") or {}


@contextlib.contextmanager
def ray_session(
    device: str,
    workers: int,
    *,
    trainer: str = "sft",
    variables: Mapping[str, str] | None = None,
    runtime: Mapping[str, Any] | None = None,
) -> Iterator[None]:
    """A Ray connection: the cluster of RAY_ADDRESS where one is set, else a local one that ends with the block.

    Whoever reaches a Ray process can run code in it, so every one wants a token unless RAY_AUTH_MODE says otherwise,
    and those of a local one listen on the loopback interface only.

    Args: variables: set in this process until the block ends, and in the processes of the cluster. runtime: what the
    trainer wants of every process besides. One that is open already is used as it is.
    ConfigError for a CPU cluster whose nodes were not started with the slots that main_ppo counts.
    """
    want_token()
    local = {} if in_cluster() else {name: value for name, value in _local_ray().items() if name not in os.environ}
    with verl_variables(device, workers, {**local, **(variables or {})}):
        if ray.is_initialized():
            yield
            return
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; silences a warning
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # a note on tokens at every start
        try:
            _connect(device, workers, trainer, variables or {}, dict(runtime or {}))
            yield
        finally:
            ray.shutdown()


def want_token() -> None:
    """Token authentication unless RAY_AUTH_MODE says otherwise. Ray's own guess depends on its version, and on what ran
    before on this account."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    RayConfig.initialize("")  # Ray read the variable when it was imported


@functools.cache  # Ray reads a token once in a process
def _local_ray() -> dict[str, str]:
    """A token that no file keeps, as Ray's own in ~/.ray would lock later clusters of this account; loopback."""
    return {"RAY_AUTH_TOKEN": secrets.token_hex(32), ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}


@contextlib.contextmanager
def verl_variables(device: str, workers: int, variables: Mapping[str, str] | None = None) -> Iterator[None]:
    """Within the block this process has verl's platform for the device, and `variables`; verl is imported in it."""
    verl = {name: value for name, value in worker_environment(device, workers).items() if name.startswith("VERL_")}
    with _variables({"VERL_LOGGING_LEVEL": "WARNING", **os.environ, **verl, **(variables or {})}):
        yield


@contextlib.contextmanager
def _variables(wanted: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted.keys() - before.keys():
            os.environ.pop(name, None)
        os.environ.update(before)


class _OwnPath(JobConfig):
    """Ray would put the driver's current folder first on the path of its workers: a torch.py there would be run."""

    def _runtime_env_has_working_dir(self) -> bool:
        return True


def _connect(device: str, workers: int, trainer: str, variables: Mapping[str, str], runtime: dict[str, Any]) -> None:
    """main_ppo counts devices as Ray's resource 'GPU': on CPU a slot of that name is only a number."""
    slots = workers if trainer == "grpo" else 0
    ray_constants.ENABLE_RAY_CLUSTER = in_cluster()  # off: 127.0.0.1 is this node, as on macOS; read at import before
    if in_cluster():
        address = os.environ["RAY_ADDRESS"]
        asked = {**runtime.pop("env_vars", {}), **variables}
        # a trainer that names its variables takes no settings of this shell besides
        runtime |= build_runtime_env({} if variables else os.environ, job=submitted_with(), asked=asked)
        _start(address=address, log_to_driver=False, job_config=_OwnPath(), runtime_env=runtime)
        if (offered := int(ray.cluster_resources().get("GPU", 0))) < slots:
            raise ConfigError(
                f"the Ray cluster at {address} offers {offered} GPUs on {sum(node['Alive'] for node in ray.nodes())} "
                f"living node(s) and the arm asks for {slots}"
                + ("; on CPU nodes these are numbers: start each with `ray start --num-gpus=N`" * (device == "cpu"))
            )
        return
    _start(
        address="local",
        job_config=_OwnPath(),
        num_cpus=max(cpus_here(), workers * CPUS_PER_WORKER[trainer] + _ROOM[trainer]),
        num_gpus=slots if slots and device == "cpu" else None,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )


def _start(**arguments: Any) -> None:
    """`ray.init`; Lost where Ray does not come up, as it gives its own processes 30 s on however busy a machine."""
    try:
        ray.init(**arguments)
    except Exception as error:  # Ray raises that class itself
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise Lost(
            f"Ray did not start: {said} Run the same command again, when the machine has less to do or with "
            "--max-restarts 3"
        ) from error
