"""`eaft checkpoints`: a run's states to resume and its exports; a Hugging Face folder from any of the states."""

import time
from pathlib import Path

from eaft_verl.errors import RunError, require
from eaft_verl.experiment.chain import began_at
from eaft_verl.files import read_json
from eaft_verl.models import resolve_model
from eaft_verl.runs import Run, step_name
from eaft_verl.training import states

GIB = 1024**3
LENGTHS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def listing(run: Run, out: Path | None = None) -> list[str]:
    """A line per state, every byte of it verified, and one for the exports. ConfigError for an `out`."""
    require(out is None, "--out is of --export STEP")
    keys, lines = run.info.get("keys"), [f"{run.path} ({run.info['status']})"]
    for folder in sorted((run.path / states.FOLDER).glob("*step_*")):
        lines.append(f"  {folder.name:<24} {_described(folder, keys)}")
    if len(lines) == 1:
        lines.append(f"  {states.FOLDER}/ holds no state" + (": a finished run needs none" * _finished(run)))
    exports = ", ".join(map(str, run.checkpoints())) or "none"
    return [*lines, f"  exports in checkpoints/ at steps: {exports}"]


def _described(folder: Path, keys: object) -> str:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / GIB
    if folder.name.startswith("."):
        return f"{size:8.2f} GiB  being written, or cut off"
    if wrong := states.problem(folder, keys):
        return f"{size:8.2f} GiB  DAMAGED: {wrong}"
    manifest = read_json(folder / states.MANIFEST)
    workers = f"{manifest['world_size']} worker" + "s" * (manifest["world_size"] > 1)
    return f"{size:8.2f} GiB  complete: step {manifest['step']}, {_age(manifest['saved'])} old, {workers}"


def _age(saved: float) -> str:
    seconds = max(0.0, time.time() - saved)
    unit, length = next((pair for pair in LENGTHS if seconds >= pair[1]), LENGTHS[-1])
    return f"{seconds / length:.0f} {unit}"


def _finished(run: Run) -> bool:
    return bool(run.info["status"] == "finished")


def export_step(run: Run, step: int, out: Path | None) -> Path:
    """A Hugging Face folder (default: RUN/exports/step_N) from the state of this step; no Ray is started."""
    found = {}
    for folder in states.folders(run.path).values():
        if not (wrong := states.problem(folder, run.info.get("keys"))):
            manifest = read_json(folder / states.MANIFEST)
            found[manifest["step"]] = folder
        elif int(folder.name.rpartition("_")[2]) == step:
            raise RunError(f"{folder} is damaged: {wrong}")
    if step not in found:
        raise RunError(f"{run.path} has no state of step {step}; it has {', '.join(map(str, found)) or 'none'}")
    target = (out or run.path / "exports" / step_name(step)).resolve()
    if target.exists():
        raise RunError(f"{target} exists and is never overwritten; give another --out")
    from eaft_verl.training.export import export_dtype
    from eaft_verl.training.saved_model import export_saved

    config = run.config
    model = str(began_at(run) or resolve_model(config["model"]))
    settings = {**config["verl"]["model"], "model_dtype": config["verl"]["engine"]["model_dtype"] or "fp32"}
    shards = next(found[step].rglob(states.SHARDS)).parent
    export_saved(shards, target, model, settings, export_dtype(model), run.info.get("end_of_turn", []))
    return target
