"""Where an arm begins: after the newest sound state, at its first step, or not at all where progress would be lost."""

import sys
from pathlib import Path
from typing import NoReturn

from eaft_verl.errors import RunError
from eaft_verl.runs import Run
from eaft_verl.training import states
from eaft_verl.training.states import Saved

MOVED = (  # what a new start must not find
    *("metrics.jsonl", "metrics_verl.jsonl", "rollouts.jsonl", "tensorboard", "checkpoints", "eval", "samples"),
    *(states.FOLDER, states.EVER),
)


def starting_point(run: Run, mode: str, updates: int = 1) -> Saved | None:
    """The state to go on from; None: step 1 of a folder without progress. `updates`: from one row to the next.

    Damaged lines of metrics.jsonl, and rows that it lacks, are said and noted in run.json. Raises RunError, and deletes
    nothing, where steps were made and no state of them is left, unless `mode` is restart: then they are moved aside. So
    they are where it ended before its first state, as then there is nothing else to do.
    """
    saved = states.newest_sound(run, strict=mode == "strict")
    if damaged := run.mend_metrics():
        _note(run, f"metrics.jsonl had damaged lines, which are left out: {', '.join(map(str, damaged))}")
    made = [row["step"] for row in run.metrics()]
    reached = max([*made, *run.checkpoints()], default=0)
    if saved is None:
        if reached and mode == "restart":
            _move_aside(run, "")
        elif reached and mode != "strict" and not _was_saved(run):
            _move_aside(run, f"it ended at step {reached}, before its first state was saved: ")
        elif reached:
            _refuse(run, reached)
        return None
    expected = set(range(updates, saved.step + 1, updates))
    if lost := sorted(expected - set(made)):
        _note(
            run, f"metrics.jsonl lacks {len(lost)} of the steps up to {saved.step} (from step {lost[0]}); they are lost"
        )
    if reached > saved.step:
        print(f"eaft: warning: steps {saved.step + 1} to {reached} were not saved and are repeated", file=sys.stderr)
    return saved


def announce(saved: Saved | None, total: int) -> None:
    """Say from where an earlier attempt is gone on with."""
    if saved:
        print(f"eaft: resuming at step {saved.step} of {total} ({saved.folder})", file=sys.stderr, flush=True)


def _note(run: Run, text: str) -> None:
    print(f"eaft: warning: {run.path}: {text}", file=sys.stderr, flush=True)
    known = run.info.get("lost_metrics", [])
    run.update(lost_metrics=[*known, text] if text not in known else known)


def _refuse(run: Run, reached: int) -> NoReturn:
    aside = sorted(path.name for path in (run.path / states.FOLDER).glob("*.damaged"))
    why = f"those in {states.FOLDER}/ are damaged ({', '.join(aside)})" if aside else f"{states.FOLDER}/ holds none"
    raise RunError(
        f"{run.path} has reached step {reached} and no state is left to go on from: {why}. Put {states.FOLDER}/ back "
        "from a backup, choose another output=, or add resume=restart to begin at step 1 (what is there is moved aside)"
    )


def _was_saved(run: Run) -> bool:
    """Whether a state was ever whole, also where nothing is left of it."""
    return (run.path / states.EVER).exists() or any((run.path / states.FOLDER).glob(f"*/{states.MANIFEST}"))


def _move_aside(run: Run, why: str) -> None:
    number = 1
    while (aside := Path(run.path) / f"before_restart_{number}").exists():
        number += 1
    aside.mkdir()
    for name in MOVED:
        if (run.path / name).exists():
            (run.path / name).rename(aside / name)
    run.update(restarts=[*run.info.get("restarts", []), aside.name])
    print(f"eaft: warning: {why}begins at step 1; what was there is in {aside}", file=sys.stderr, flush=True)
