"""Whether a run directory holds what is asked for now: finished is not the same as finished with these settings."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from eaft_verl.boundary import masked
from eaft_verl.errors import RunError
from eaft_verl.evaluation.settings import evaluation_key
from eaft_verl.experiment.chain import stale
from eaft_verl.models import model_key
from eaft_verl.recipe.config import Config, plain
from eaft_verl.recipe.datasets import changed_content, prepared_path
from eaft_verl.recipe.views import evaluate_settings, source_of
from eaft_verl.reporting.comparability import ABSENT, flatten
from eaft_verl.runs import Run, is_run

# where a run lies, how it is saved, watched, resumed and fitted into memory decide nothing of what it becomes
FREE = (
    *("recipe", "output", "save_minutes", "async_save", "resume", "data.max_rejected", "choose", "trackers"),
    *("verl.trainer.save_freq", "verl.trainer.test_freq", "verl.trainer.max_ckpt_to_keep"),
    *("verl.data.use_dynamic_bsz", "verl.data.micro_batch_size_per_gpu", "verl.data.max_token_len_per_gpu"),
    *("verl.engine.offload_policy", "verl.engine.wrap_policy"),
)
PLACES = ("verl.trainer.nnodes", "verl.trainer.n_gpus_per_node")  # free too: a state is loaded by any number of workers
CHANGEABLE = ("verl.optim",)  # in an unfinished run, where that is asked for
OF_BASE = ("model", "evaluate", "data.heldout", "data.heldout_rows", "data.max_length")  # all that its scores rest on
SHOWN = 5


def require_same(folder: Path, config: Config) -> None:
    """RunError that names every key in which the run in `folder`, where there is one, is not this configuration's."""
    if not is_run(folder):
        return
    run = Run(folder)
    if found := forbidden(run, config, differences(run, config)):
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise RunError(
            f"{folder} (status {run.info['status']}) was made with other settings: {'; '.join(found[:SHOWN])}{more}. "
            f"Ask for those again, choose another output=, or remove {folder}"
        )


def differences(run: Run, config: Config) -> list[str]:
    """'key=stored (now asked)' for every setting, and what is another one in the files behind them."""
    base, keys = run.info["kind"] == "base", run.info.get("keys", {})
    found = [
        line
        for line in settings_that_differ(asked_of(run), plain(config))
        if not base or _under(line.partition("=")[0], OF_BASE)
    ]
    if not _named(found, "model") and keys.get("model") != model_key(config.model):
        found.append(f"model: the files of {config.model} have changed")
    for which in ("heldout",) if base else ("train", "heldout"):
        if source_of(config, which) and not _named(found, f"data.{which}"):
            found += changed_content(config, which, keys)
    if not base:
        found += stale(run, config)
    if not found:
        heldout = prepared_path(config, "heldout") if config.data.heldout else None
        if keys.get("evaluation") != evaluation_key(evaluate_settings(config, heldout)):
            found.append("evaluate: the data, a task file or the harness behind it have changed")
    return found


def settings_that_differ(stored: Any, asked: Any) -> list[str]:
    """'key=stored (now asked)', sorted by key."""
    before, now = flatten(masked(stored)), flatten(masked(asked))
    spent_in_devices = now.get("compare.match") == '"device_seconds"'
    free = FREE if spent_in_devices else FREE + PLACES
    return [
        f"{key}={before.get(key, ABSENT)} (now {now.get(key, ABSENT)})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, ABSENT) != now.get(key, ABSENT) and not _under(key, free)
    ]


def forbidden(run: Run, config: Config, found: list[str]) -> list[str]:
    """Of these differences those that an unfinished run cannot be gone on with, as `resume` says."""
    if config.resume != "changed" or run.info["status"] == "finished":
        return found
    return [line for line in found if not changeable(line)]


def changeable(line: str) -> bool:
    """Whether `resume=changed` allows this difference."""
    return _under(line.partition("=")[0], CHANGEABLE)


def asked_of(run: Run) -> dict[str, Any]:
    """The configuration that was asked for: the run's own, less what it derived from another run."""
    config = OmegaConf.create(run.config)
    for key, value in (run.info.get("derived") or {}).get("asked", {}).items():
        OmegaConf.update(config, key, value, merge=False)
    return dict(plain(config))


def _named(found: list[str], key: str) -> bool:
    return any(line.startswith(f"{key}=") for line in found)


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
