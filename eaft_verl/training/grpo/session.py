"""Ray for a GRPO run: verl's main_ppo starts its own workers and takes its settings from the environment."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from eaft_verl.cluster.session import ray_session, verl_variables, worker_environment
from eaft_verl.training.grpo.states import MAKER
from eaft_verl.training.verl_cpu.private import SLOT_VARIABLE, require_version


def environment(device: str, workers: int, metrics_file: str) -> dict[str, str]:
    """Environment of every process of the run. On CPU a worker takes a slot that Ray calls GPU; it is only a number."""
    chosen = {
        **worker_environment(device, workers),
        "VERL_FILE_LOGGER_PATH": metrics_file,
        "TRANSFER_QUEUE_ENABLE": "1",
        "VERL_ENGINE_VENDOR": MAKER,
        "VERL_LOGGING_LEVEL": os.environ.get("VERL_LOGGING_LEVEL", "WARNING"),
    }
    if device == "cpu":
        chosen |= {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cpu", SLOT_VARIABLE: "GPU"}
    return chosen


@contextlib.contextmanager
def grpo_session(device: str, workers: int, metrics_file: str, more: Mapping[str, str] | None = None) -> Iterator[None]:
    """A Ray connection with that environment, and `more`, in driver and workers; ConfigError for another verl."""
    require_version()
    variables = {**environment(device, workers, metrics_file), **(more or {})}
    runtime = ray_runtime(device, workers, variables)
    with ray_session(device, workers, trainer="grpo", variables=variables, runtime=runtime):
        yield


def ray_runtime(device: str, workers: int, variables: Mapping[str, str]) -> dict[str, Any]:
    """What main_ppo wants of every process. verl asks for its platform once, when it is imported, and keeps that."""
    with verl_variables(device, workers, variables):
        from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

        return get_ppo_ray_runtime_env()
