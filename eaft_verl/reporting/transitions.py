"""Question by question: what became wrong and what became right against the base, with exact tests.

A question is right where its score is 1 and wrong where it is 0; benchmarks with other scores have no transitions.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from eaft_verl.pages.statistics import holm, sign_flip_p
from eaft_verl.reporting.collect import Arm, RunData
from eaft_verl.reporting.provenance import shorten

Row = dict[str, Any]
SHOWN = 20  # lost questions of an arm and benchmark on the page; questions.jsonl has all of them


def transitions(base: Arm, arms: list[Arm]) -> list[Row]:
    """[{arm, benchmark, side, n, lost, gained, p, chance, unmarked}], benchmarks in order, arms within them.

    lost, gained: questions that went from right to wrong and from wrong to right, as means over the arm's seeds. p:
    exact and two-sided, of every question's difference to the base over all seeds, against a distribution symmetric
    about zero (`sign_flip_p`; with one seed McNemar's exact test). It is about these trained models and new questions.
    chance: of the questions with given choices, how many would be lost and as many gained by guessing alone
    (`guessed_flips`), None for others. unmarked: None where the change is significant within this table (Holm, 5 %).
    """
    rows = [
        _row(base, arm, name)
        for name, record in sorted(base.runs[0].evals.get(base.runs[0].step, {}).items())
        if record["side"] in ("target", "general")
        for arm in arms
        if _judged(base, arm, name)
    ]
    for row, rejected in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["unmarked"] = None if rejected else "holm"
    return rows


def guessed_flips(choices: Sequence[int], right_before: float, right_after: float) -> float:
    """Expected number of questions that two models which guess where they do not know turn from right to wrong.

    Model: a question is known, or answered by one of its k choices at random. Then accuracy = known + (1 - known) c, c
    the mean of 1 / k, so the share that is guessed is g = (1 - accuracy) / (1 - c), at most 1. What both guess
    is at most the smaller share of the two; each turns from right to wrong with probability 1/k (1 - 1/k), and back
    with the same: flips = min(g_before, g_after) * sum_i 1/k_i (1 - 1/k_i). An upper bound for models that are alike,
    because their guesses are too. The adjustment is that of arXiv 2510.17776 in idea; this derivation is our own.
    """
    chance = sum(1 / k for k in choices) / len(choices)
    if chance >= 1:
        return 0.0
    guessed = min(1.0, (1 - max(right_before, right_after)) / (1 - chance))
    return guessed * sum(1 / k * (1 - 1 / k) for k in choices)


def lost_questions(base: Arm, arms: list[Arm]) -> list[Row]:
    """[{arm, seed, benchmark, lost, examples: [{id, prompt, target, before, after}]}] of the first seed, by id."""
    found = []
    for row in transitions(base, arms):
        arm = next(arm for arm in arms if arm.name == row["arm"])
        before, after = (_rows(run, row["benchmark"]) for run in (base.runs[0], arm.runs[0]))
        metric = base.runs[0].evals[base.runs[0].step][row["benchmark"]]["metric"]
        lost = [key for key in sorted(before) if _score(before[key], metric) == 1 and _score(after[key], metric) == 0]
        if lost and all("response" in part[key] for key in lost for part in (before, after)):
            examples = [_lost(key, before[key], after[key]) for key in lost[:SHOWN]]
            named = {"arm": arm.name, "seed": arm.runs[0].info["seed"], "benchmark": row["benchmark"]}
            found.append({**named, "lost": len(lost), "examples": examples})
    return found


def _lost(key: str, before: Row, after: Row) -> Row:
    return {
        "id": key,
        "prompt": shorten(before.get("prompt"), head=0),
        "target": shorten(before.get("target")),
        "before": shorten(before["response"]),
        "after": shorten(after["response"]),
    }


def question_paths(base: Arm, arms: list[Arm]) -> list[Row]:
    """[{benchmark, question, id, base, paths: {run: {step: score}}}]: every question along every run's checkpoints.

    question: sixteen hex digits of benchmark, prompt and right answer, the same wherever that question stands.
    """
    found: dict[tuple[str, str], Row] = {}
    for run in (base.runs[0], *(run for arm in arms for run in arm.runs)):
        for step, records in run.evals.items():
            for name, record in records.items():
                if record["side"] in ("target", "general"):
                    _follow(found, run, step, name, record["metric"])
    return [found[key] for key in sorted(found)]


def _follow(found: dict[tuple[str, str], Row], run: RunData, step: int, name: str, metric: str) -> None:
    for key, sample in run.samples(step, name).items():
        if "prompt" not in sample or (score := _score(sample, metric)) is None:
            continue
        text = "\n".join((name, str(sample["prompt"]), str(sample.get("target"))))
        question = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
        row = found.setdefault((name, key), {"benchmark": name, "question": question, "id": key, "paths": {}})
        row["paths"].setdefault(run.label, {})[str(step)] = score


def _judged(base: Arm, arm: Arm, name: str) -> bool:
    """Whether base and every seed of the arm have answered the same questions, each right or wrong."""
    runs = (base.runs[0], *arm.runs)
    if any(name not in run.evals.get(run.step, {}) for run in runs):
        return False
    metric = base.runs[0].evals[base.runs[0].step][name]["metric"]
    rows = [_rows(run, name) for run in runs]
    same = all(found.keys() == rows[0].keys() for found in rows)
    return bool(rows[0]) and same and all(_score(row, metric) in (0, 1) for found in rows for row in found.values())


def _row(base: Arm, arm: Arm, name: str) -> Row:
    record = base.runs[0].evals[base.runs[0].step][name]
    metric, before = record["metric"], _rows(base.runs[0], name)
    was, *now = (_right(rows, metric) for rows in (before, *(_rows(run, name) for run in arm.runs)))
    seeds, number = len(now), len(was)
    lost = sum(was[key] > one[key] for one in now for key in was) / seeds
    gained = sum(was[key] < one[key] for one in now for key in was) / seeds
    after = sum(sum(one.values()) for one in now) / seeds / number
    return {
        **{"arm": arm.name, "benchmark": name, "side": record["side"], "n": number, "seeds": seeds},
        **{"lost": lost, "gained": gained, "chance": _by_chance(before, sum(was.values()) / number, after)},
        "p": sign_flip_p([sum(one[key] for one in now) - seeds * was[key] for key in was]),
    }


def _right(rows: dict[str, Row], metric: str) -> dict[str, int]:
    """{question: 1 where it was answered right}."""
    return {key: int(_score(row, metric) or 0) for key, row in rows.items()}


def _by_chance(rows: dict[str, Row], before: float, after: float) -> float | None:
    """`guessed_flips` of questions that all have several choices; None for others."""
    choices = [len(row["logprobs"]) for row in rows.values() if len(row.get("logprobs") or ()) > 1]
    return guessed_flips(choices, before, after) if len(choices) == len(rows) else None


def _rows(run: RunData, name: str) -> dict[str, Row]:
    return run.samples(run.step, name)


def _score(row: Row, metric: str) -> float | None:
    value = row["scores"].get(metric)
    return None if value is None else float(value)
