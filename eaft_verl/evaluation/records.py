"""lm-evaluation-harness results to the run directory's record and sample rows. Pure functions of plain containers."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from eaft_verl.errors import DataError

Sample = dict[str, Any]
_TOLERANCE = 1e-6


def digest(parts: Iterable[Any]) -> str:
    """sha256 of a sequence of JSON-able values, in order."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(json.dumps(part, sort_keys=True, ensure_ascii=True, default=str).encode("ascii") + b"\n")
    return hasher.hexdigest()


def mean_and_stderr(scores: list[float], weights: list[float] | None = None) -> tuple[float, float | None]:
    """Mean and its standard error; weighted by tokens if weights are given.

    Unweighted: sample standard deviation / sqrt(n). Weighted: the ratio estimator R = sum(w s) / sum(w) with its
    linearised error sqrt(sum((w (s - R))^2) n / (n - 1)) / sum(w), examples being the independent units; equal weights
    give the unweighted formula. None for fewer than two examples.
    """
    weights = weights or [1.0] * len(scores)
    total = math.fsum(weights)
    mean = math.fsum(weight * score for weight, score in zip(weights, scores, strict=True)) / total
    if len(scores) < 2:
        return mean, None
    squares = math.fsum((weight * (score - mean)) ** 2 for weight, score in zip(weights, scores, strict=True))
    return mean, math.sqrt(squares * len(scores) / (len(scores) - 1)) / total


def metric_entry(score: float, stderr: float | None, higher_is_better: bool) -> dict[str, Any]:
    """One value of a record's `metrics`."""
    return {"score": score, "stderr": stderr, "higher_is_better": higher_is_better}


class Fit(NamedTuple):
    """What was cut: max_length of prompt and answer together, and a text's length, both in tokens."""

    max_length: int
    length: Callable[[str], int]

    def cut(self, arguments: Sequence[tuple[str, Any]], response: Any) -> str | None:
        """'answer' if it is as long as it might be; 'prompt' if it was shortened to fit; None if nothing was cut.

        arguments: (prompt, generation settings) of an answer, or (prompt, choice) of every choice.
        """
        for prompt, second in arguments:
            if isinstance(second, str):  # one token more than fits is scored: the last one is not fed
                if self.length(prompt + second) > self.max_length + 1:
                    return "prompt"
            elif self.length(response) >= second.get("max_gen_toks", math.inf):
                return "answer"
        return None


def convert(results: dict[str, Any], name: str, primary: str | None, fit: Fit) -> tuple[dict[str, Any], list[Sample]]:
    """(record fields, samples) of one benchmark from the harness's results, which may hold several tasks (a group).

    A metric's score is the mean over all examples of all tasks. Where the harness aggregates otherwise (instruction
    level accuracy, F1), its own score is kept, without a standard error and without per-example scores, since their
    mean would be another number. primary: metric name; None means the first. Samples whose prompt or answer was cut say
    so in `truncated`, and the record counts them. Raises DataError for rows with equal ids.
    """
    tasks = {task: rows for task, rows in results["samples"].items() if rows}
    samples = [row for task, rows in tasks.items() for row in _samples(task if len(tasks) > 1 else "", rows, fit)]
    check_ids(samples, f"task {name!r}")
    metrics: dict[str, dict[str, Any]] = {}
    for metric, higher in _metrics(tasks, results["higher_is_better"]).items():
        reported = _reported(results, name, list(tasks), metric)
        if entry := _entry(metric, higher, samples, reported, single=len(tasks) == 1):
            metrics[metric] = entry
    rows = [row for task_rows in tasks.values() for row in task_rows]
    record = {
        "metric": primary or next(iter(metrics)),
        "metrics": metrics,
        "n": len(samples),
        "prompt_hash": digest(row["arguments"] for row in rows),
        "data_hash": digest(row["doc"] for row in rows),
        **truncations(samples),
    }
    return record, samples


def truncations(samples: list[Sample]) -> dict[str, Any]:
    """How many prompts and answers were cut, and the share of all answers; `answers`: how many, if more than samples.

    Of weighed choices, which are no answers, the share of the samples.
    """
    answers = sum(len(sample.get("responses", [""])) for sample in samples)
    prompts = sum(sample.get("truncated") == "prompt" for sample in samples)
    cut = sum(sample.get("cut_answers", sample.get("truncated") == "answer") for sample in samples)
    counts = {"truncated": {"prompts": prompts, "answers": cut}, "truncation_rate": (prompts + cut) / answers}
    return counts | ({"answers": answers} if answers > len(samples) else {})


def check_ids(rows: Iterable[Sample], source: str) -> None:
    """DataError if two rows have the same id."""
    ids = [row["id"] for row in rows]
    if len(set(ids)) < len(ids):
        raise DataError(f"{source} has rows with the same id; examples are matched by id, so make them unique")


def _entry(
    metric: str, higher: bool, samples: list[Sample], reported: float | None, *, single: bool
) -> dict[str, Any] | None:
    """The mean of the samples' scores, or what the harness reported, without which there is no such metric."""
    scores = [sample["scores"].get(metric) for sample in samples]
    if None not in scores:
        mean, stderr = mean_and_stderr(scores)
        if not single or (reported is not None and abs(mean - reported) <= _TOLERANCE):
            return metric_entry(mean, stderr, higher)
    for sample in samples:
        sample["scores"].pop(metric, None)
    return None if reported is None else metric_entry(reported, None, higher)


def label(metric: str, filter_name: str) -> str:
    """'accuracy' for the only filter there is, 'exact_match,strict-match' where the harness has several."""
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _metrics(tasks: dict[str, list[Sample]], directions: dict[str, dict[str, bool]]) -> dict[str, bool]:
    """{label: higher is better}, filter by filter, metrics in the task file's order."""
    found: dict[str, bool] = {}
    for task, rows in tasks.items():
        for filter_name in dict.fromkeys(row["filter"] for row in rows):
            reported = next(row["metrics"] for row in rows if row["filter"] == filter_name)
            order = [metric for metric in directions[task] if metric in reported]
            for metric in order:
                found.setdefault(label(metric, filter_name), bool(directions[task][metric]))
    return found


def _reported(results: dict[str, Any], name: str, tasks: list[str], metric: str) -> float | None:
    """The harness's own aggregate: that of the single task, or of the group if it has one."""
    key = metric if "," in metric else f"{metric},none"
    source = results["results"].get(tasks[0] if len(tasks) == 1 else name, {})
    return float(source[key]) if key in source else None


def _samples(task: str, rows: list[Sample], fit: Fit) -> list[Sample]:
    """One row per document; the harness has one per document and filter."""
    merged: dict[Any, Sample] = {}
    for row in rows:
        if row["doc_id"] not in merged:
            merged[row["doc_id"]] = _describe(task, row, fit)
        scores = merged[row["doc_id"]]["scores"]
        for metric in row["metrics"]:
            if isinstance(row[metric], bool | int | float):
                scores[label(metric, row["filter"])] = float(row[metric])
    return list(merged.values())


def _describe(task: str, row: Sample, fit: Fit) -> Sample:
    """id, prompt, response and target; of several responses the first, and all. A multiple-choice response is the
    likeliest choice, of equally likely ones the first; all log-probs are kept."""
    own_id = row["doc"].get("id")
    identity = str(own_id if isinstance(own_id, str | int) else row["doc_id"])
    first = row["arguments"][0]
    sample = {
        "id": f"{task}:{identity}" if task else identity,
        "scores": {},
        "prompt": first[0],
        "response": row["resps"][0][0],
        "target": row["target"],
    }
    cuts = [cut for response in row["resps"][0] if (cut := fit.cut(row["arguments"], response))]
    if cuts:
        sample["truncated"] = cuts[0]
    if len(row["resps"][0]) > 1:
        sample |= {"responses": row["resps"][0], "cut_answers": len(cuts)}
    if not isinstance(sample["response"], str):
        # Winogrande's choices are two prompts with one ending
        differing = len({arguments[1] for arguments in row["arguments"]}) > 1
        logprobs = {
            arguments[differing]: float(resps[0][0])
            for arguments, resps in zip(row["arguments"], row["resps"], strict=True)
        }
        sample |= {"response": max(logprobs, key=lambda choice: logprobs[choice]), "logprobs": logprobs}
    return sample
