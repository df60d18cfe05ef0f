"""Controls: SFT runs stopped where they fit as well as another arm, and what of its effect is left beside them."""

from typing import Any

from eaft_verl.reporting.collect import Arm
from eaft_verl.reporting.measures import Board
from eaft_verl.reporting.results import differences

Row = dict[str, Any]


def controls(board: Board) -> list[Row]:
    """[{arm, of, by, runs: {seed: what was derived}, versus: {measure: `bounds`}}].

    versus: the arm minus its control, paired by example and seed; empty where that arm is not in the report.
    """
    arms = {arm.name: arm for arm in board.arms}
    return [
        {
            "arm": arm.name,
            "of": arm.control["of"],
            "by": arm.control["by"],
            "runs": {str(run.info["seed"]): _derived(run.info) for run in arm.runs},
            "versus": differences(board, arms[arm.control["of"]], arm) if arm.control["of"] in arms else {},
        }
        for arm in board.arms
        if arm.control is not None
    ]


def control_notes(arms: list[Arm]) -> list[str]:
    """Runs that ended before they had become the control they were meant to be."""
    return [
        f"{run.label} never came down to the training NLL of {arm.control['of']}: it ran to its planned end, so it is "
        "less fitted than the arm it is a control of"
        for arm in arms
        if arm.control is not None
        for run in arm.runs
        if run.info.get("nll_reached") is False
    ]


def _derived(info: Row) -> Row:
    found = {"steps": info["total_steps"], **info["derived"]["control"]}
    return found | ({"nll_reached": info["nll_reached"]} if "nll_reached" in info else {})
