"""`eaft launch`: preflight, plan, then every stage of a comparison, on this machine or handed to a cluster.

Whatever the cluster, the job is `eaft launch ... --on local` on its first node: one code path, resumable by running the
same command again.
"""

import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from eaft_verl.boundary import masked, python_command
from eaft_verl.cluster.demand import demand_of
from eaft_verl.cluster.doctor import doctor
from eaft_verl.errors import ConfigError
from eaft_verl.experiment.compare import compare, parse_seeds
from eaft_verl.launch.files import accelerator, kuberay_job, skypilot_job, slurm_job, unpack_recipe
from eaft_verl.launch.request import Launch
from eaft_verl.recipe.checks import check, pending, warn
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.file import recipe_files, recipe_hash
from eaft_verl.recipe.resolve import Recipe, load_recipe, resolve


def launch(wanted: Launch, on: str, *, dry_run: bool) -> int:
    """Run or hand over; 0 when all is done (or, with `dry_run`, when the recipe is sound)."""
    if on not in PLACES:
        raise ConfigError(f"--on {on!r} is not one of {', '.join(PLACES)}")
    if wanted.env and on != "ray":
        raise ConfigError(f"--env is for --on ray; with --on {on} export the variables where the job starts")
    parse_seeds(wanted.seeds)
    if wanted.recipe_hash:
        unpack_recipe(Path(wanted.recipe))
    recipe, found = load_recipe(wanted.recipe), recipe_hash(Path(wanted.recipe))
    if wanted.recipe_hash not in (None, found):
        raise ConfigError(
            f"recipe {wanted.recipe} is not the one that was checked when this was launched (here {found}, there "
            f"{wanted.recipe_hash}): launch again, or bring both machines' copies and what they extend in line"
        )
    if on == "local":
        return _local(wanted, _configs(recipe, wanted, dry_run=dry_run), dry_run=dry_run)
    wanted = replace(_for_cluster(recipe, wanted, on), recipe_hash=found)
    if open_ := next((word for word in wanted.overrides if masked(word) != word), ""):
        key = open_.partition("=")[0]
        raise ConfigError(f"{key} holds a secret, which the list of jobs would show: write '{key}=${{oc.env:NAME}}'")
    configs = _configs(recipe, wanted, elsewhere=True, dry_run=dry_run)
    if dry_run:
        warn(list(dict.fromkeys(message for config in configs for message in pending(config, elsewhere=True))))
    if configs[0].device == "cuda":
        _plan(wanted, configs[0], elsewhere=True)
    return PLACES[on](wanted, configs[0], job_id(configs[0].name, wanted.arm), dry_run)


def job_id(name: str, arm: str | None) -> str:
    """A name no other job has: Ray answers 500 to one that was used before."""
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    return f"{name}-{arm or 'compare'}-{stamp}".replace("_", "-").lower()


def _configs(recipe: Recipe, wanted: Launch, *, elsewhere: bool = False, dry_run: bool = False) -> list[Config]:
    """Every arm that will run, resolved and checked."""
    configs = []
    for arm in [wanted.arm] if wanted.arm else list(recipe.arms):
        config = resolve(recipe, arm, wanted.overrides)
        try:
            check(config, elsewhere=elsewhere, dry_run=dry_run)
        except ConfigError as error:
            raise ConfigError(f"arm {arm}: {error}") from None
        configs.append(config)
    return configs


def _for_cluster(recipe: Recipe, wanted: Launch, on: str) -> Launch:
    """The same launch with what this machine must not decide for another one: the output folder and the device."""
    given = dict(word.partition("=")[::2] for word in wanted.overrides)
    said = {**recipe.shared, **recipe.arms.get(wanted.arm or "", {}), **given}
    if not Path(str(output := said.get("output"))).is_absolute():
        raise ConfigError(
            f"output={output!r} is relative: on a cluster it must be an absolute path that every node sees, "
            "e.g. output=/shared/runs/NAME"
        )
    travelling = recipe_files(Path(wanted.recipe)) if on in ("ray", "skypilot") else [Path(wanted.recipe)]
    for file in travelling:
        outside = ".." in Path(wanted.recipe).parts or os.path.relpath(file).startswith("..")
        if file.is_absolute() or outside:
            by = "" if file == travelling[0] else f", which {wanted.recipe} extends,"
            raise ConfigError(f"recipe {file}{by} must lie under the current folder: that is what the job gets")
    if said.get("device", "auto") == "auto":
        given["device"] = "cuda"
    return replace(wanted, overrides=tuple(f"{key}={value}" for key, value in given.items()))


def _local(wanted: Launch, configs: list[Config], *, dry_run: bool) -> int:
    """Preflight and plan for each kind of demand, then the stages that `eaft compare` would run."""
    first = {demand_of(config): config for config in reversed(configs)}
    failed = [config.arm for config in first.values() if doctor(config, wait_s=wanted.wait)]
    if failed and not dry_run:
        raise ConfigError(f"preflight failed for arm {', '.join(failed)}: see the lines above; nothing was started")
    _plan(wanted, configs[0], elsewhere=False)
    if dry_run:
        print(f"would run: eaft launch {shlex.join(wanted.words())} --on local")
    arms = [wanted.arm] if wanted.arm else None
    return compare(
        wanted.recipe, arms, parse_seeds(wanted.seeds), list(wanted.overrides), wanted.restarts, dry_run=dry_run
    )


def _plan(wanted: Launch, config: Config, *, elsewhere: bool) -> None:
    """Print the plan, for EAFT_GPU where the GPUs are not here; it informs, it does not decide."""
    words = [wanted.recipe, *(["--arm", wanted.arm] if wanted.arm else []), *wanted.overrides]
    if config.device == "cuda" and (elsewhere or not shutil.which("nvidia-smi")):
        trainer = config.verl.trainer
        words += ["--gpus", f"{trainer.n_gpus_per_node}x{accelerator().removesuffix('GB')}"]
        words += ["--nodes", str(trainer.nnodes)]
    sys.stdout.flush()
    subprocess.run(python_command("eaft_verl.cli", "plan", *words), check=False)


def _ray(wanted: Launch, config: Config, name: str, dry_run: bool) -> int:
    from eaft_verl.launch.ray_jobs import run_job

    return run_job(wanted, config, name, dry_run=dry_run)


def _handed_over(file_of: Callable[[Launch, Config, str], tuple[str, str, list[str]]]) -> Callable[..., int]:
    """A place that takes a file and a command: both are printed, and the command is run unless this is a dry run."""

    def place(wanted: Launch, config: Config, name: str, dry_run: bool) -> int:
        file_name, text, command = file_of(wanted, config, name)
        path = Path("runs") / "launched" / file_name
        command = [str(path) if word == "FILE" else word for word in command]
        print(f"--- {path}\n{text}---\n{shlex.join(command)}", flush=True)
        if dry_run:
            return 0
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if not shutil.which(command[0]):
            raise ConfigError(
                f"{command[0]} is not installed on this machine; run the command above where it is, or install it"
            )
        if command[0] == "sbatch":  # it opens its log in `output` before the script can make that folder
            _make(Path(config.output))
        return subprocess.run(command, check=False).returncode

    return place


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output={output} cannot be made here ({error.strerror}) and the job's log goes there: mount the shared "
            "file system on this machine, or launch where it is"
        ) from None


PLACES: dict[str, Callable[..., int]] = {
    "local": _local,
    "ray": _ray,
    "slurm": _handed_over(slurm_job),
    "kuberay": _handed_over(kuberay_job),
    "skypilot": _handed_over(skypilot_job),
}
