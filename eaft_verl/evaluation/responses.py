"""What is scored of a model's responses: what they say after thinking, and of several to one question mean and pass@k.

The harness scores one response, thinking and all; both are put between its answers and its scorers here, for its own
tasks as for ours.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lm_eval.api.filter import Filter
from lm_eval.api.task import Task
from lm_eval.filters.selection import TakeFirstFilter

from eaft_verl.errors import ConfigError
from eaft_verl.evaluation.tasks import Entry
from eaft_verl.grading.answers import opened_thinking, said

Scores = dict[str, Any]
# Where a model without a chat template goes on with a next question of its own, as in Qwen2.5-Math's evaluation.
STOPS = ["\nQuestion:", "\n\n\n"]


def pass_at_k(total: int, right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of the n answers, drawn without putting back, hold a right one.

    Unbiased for the chance that k fresh answers do (Chen et al. 2021, arXiv 2107.03374). total n >= k, right c of them.
    """
    return 1.0 - math.comb(total - right, k) / math.comb(total, k)


def counts_of(samples: int) -> list[int]:
    """The k of pass@k for n samples: 2, 4, 8, ... and n itself."""
    return sorted({*(2**power for power in range(1, samples.bit_length()) if 2**power < samples), samples} - {1})


class _Spoken(Filter):
    """Responses without their thinking; an unchanged one is left as it is, blanks and all."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.opened = opened_thinking(str(task.instances[0].args[0]))

    def apply(self, resps: Iterable[Any], docs: list[dict[str, Any]]) -> Iterable[Any]:
        return [[self._spoken(text) for text in given] for given in resps]

    def _spoken(self, text: str) -> str:
        spoken = said(whole := self.opened + text)
        return text if spoken == whole else spoken.strip()


def prepare_responses(task: Task, entry: Entry) -> None:
    """Let `task` score what is said, and draw and score as many responses as `entry` asks for, as long as it allows.

    Raises ConfigError where any of this is asked of a task that weighs given answers.
    """
    if task.OUTPUT_TYPE != "generate_until":
        if entry.sampling or entry.new_tokens:
            raise ConfigError(
                f"task {entry.task!r} weighs given answers and writes none: leave out samples, temperature, top_p "
                "and new_tokens"
            )
        return
    for ensemble in vars(task).get("_filters", []):
        kept = [build for build in ensemble.filters if entry.samples == 1 or not _takes_first(build)]
        ensemble.filters = [functools.partial(_Spoken, task), *kept]
    if entry.new_tokens:
        task.set_config(key="generation_kwargs", value={"max_gen_toks": entry.new_tokens}, update=True)
    if entry.sampling:
        task.set_config(key="generation_kwargs", value=entry.sampling | {"do_sample": True}, update=True)
    if entry.samples > 1:
        _score_several(task, entry)


def _takes_first(build: Callable[[], Filter]) -> bool:
    return isinstance(build(), TakeFirstFilter)


def _score_several(task: Any, entry: Entry) -> None:
    """Every metric the mean over a question's responses; pass@k beside it, of the primary metric."""
    first = entry.metric.partition(",")[0] if entry.metric else next(iter(task.higher_is_better()))
    task.set_config(key="repeats", value=entry.samples)
    for k in counts_of(entry.samples):
        vars(task)["_higher_is_better"][f"pass@{k}"] = True
        vars(task)["_aggregation_list"][f"pass@{k}"] = _mean
    vars(task)["process_results"] = functools.partial(_scores, task.process_results, first)


def _mean(scores: Sequence[float]) -> float:
    return math.fsum(scores) / len(scores)


def _scores(one: Callable[[Any, list[Any]], Scores], first: str, doc: Any, results: list[Any]) -> Scores:
    """The scores of one question from those of each of its responses, results[0]."""
    each = [one(doc, [response]) for response in results[0]]
    means = {name: _mean([float(scores[name]) for scores in each]) for name in each[0] if _single(each[0][name])}
    right = sum(float(scores[first]) == 1.0 for scores in each)
    return means | {f"pass@{k}": pass_at_k(len(each), right, k) for k in counts_of(len(each))}


def _single(value: Any) -> bool:
    return isinstance(value, bool | int | float)
