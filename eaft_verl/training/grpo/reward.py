"""The reward function of GRPO arms, as verl 0.9.1's reward loop calls it.

verl loads `compute_score` by `reward.custom_reward_function.{path, name, reward_kwargs}` inside its RewardLoopWorker
actors and calls it from a pool of threads, once per response. Its own graders are never used: `prime_math` runs text
of the model (CVE-2026-6878).
"""

import functools
import logging
import threading
from typing import Any

from eaft_verl.grading.process import Grade, GradingProcess
from eaft_verl.recipe.config import Config
from eaft_verl.training.stacks import write_stacks_when_asked

_LOG = logging.getLogger(__name__)
_ONE_AT_A_TIME = threading.Lock()  # or the first burst of answers would start, and leave, a process per thread


def reward_function(config: Config) -> dict[str, Any]:
    """verl's `reward.custom_reward_function` for a recipe's `reward` block: path, name, reward_kwargs."""
    block = config.reward
    kwargs = {"grader": block.grader, "format_bonus": block.format_bonus, "seconds": block.seconds}
    return {"path": f"pkg://{__name__}", "name": "compute_score", "reward_kwargs": kwargs}


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    *,
    grader: str,
    format_bonus: float = 0.0,
    seconds: float = 10.0,
    **_: Any,
) -> dict[str, float]:
    """{score, acc, format, reward_timeouts, reward_errors} of one response; verl trains on `score`, the rest it keeps.

    score = acc + format_bonus * format: acc is the grader's 0..1, format 1 where the response ends in '#### number' or
    a box. reward_timeouts: 1 where the grader hung or crashed, reward_errors: 1 where it raised; score is 0 in both.
    extra_info["opened"]: the marker by which the prompt has opened the thinking, which the response does not repeat.
    data_source and further keywords are verl's and do not change the score.
    """
    with _ONE_AT_A_TIME:
        process = _process(grader, seconds)
    grade = process.grade((extra_info or {}).get("opened", "") + solution_str, str(ground_truth))
    _warn(grade, grader)
    good = grade.outcome == "graded"
    return {
        "score": grade.score + (format_bonus * grade.formatted if good else 0.0),
        "acc": grade.score,
        "format": float(grade.formatted),
        "reward_timeouts": float(grade.outcome == "timeout"),
        "reward_errors": float(grade.outcome == "error"),
    }


@functools.cache
def _process(grader: str, seconds: float) -> GradingProcess:
    """One grading process per actor."""
    write_stacks_when_asked()
    return GradingProcess(grader, seconds)


def _warn(grade: Grade, grader: str) -> None:
    if grade.outcome == "error":
        _LOG.warning(f"grader {grader!r} raised {grade.error}; the response gets reward 0")
    elif grade.outcome == "timeout":
        _LOG.warning(f"grader {grader!r} hung or crashed and was killed; the response gets reward 0")
