"""Arms that failed: out of the comparison, but on the page with their cause and what is lost with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eaft_verl.errors import RunError
from eaft_verl.reporting.collect import Arm
from eaft_verl.runs import Run

Row = dict[str, Any]


def lost_seeds(arms: Sequence[Arm]) -> list[str]:
    """Every arm that lacks a seed which another arm has, in words: differences to it are over the others."""
    every = {seed for arm in arms for seed in arm.seeds}
    return [
        f"{arm.name} has no run of seed {', '.join(map(str, lacking))}: its differences to other arms are over the "
        "seeds that both have, and its own scores over fewer seeds than theirs"
        for arm in arms
        if (lacking := sorted(every - set(arm.seeds)))
    ]


def split(paths: Sequence[Path]) -> tuple[list[Path], list[Row]]:
    """(runs to compare, [{arm, seed, run, error}] of the arm runs that failed or were stopped).

    RunError with every cause if no arm is left.
    """
    good: list[Path] = []
    failed: list[Row] = []
    for path in map(Path, paths):
        info = Run(path).info
        if info.get("kind") == "arm" and info.get("status") in ("failed", "interrupted"):
            failed.append(
                {
                    "arm": info["arm"],
                    "seed": info["seed"],
                    "run": path.name,
                    "error": info.get("error") or "it left no cause",
                }
            )
        else:
            good.append(path)
    if failed and all(Run(path).info.get("kind") == "base" for path in good):
        causes = "\n".join(f"- {row['run']}: {row['error']}" for row in failed)
        raise RunError(f"every arm failed, so there is nothing to report:\n{causes}")
    return good, failed
