"""Evidence beside the numbers: sample answers of base and arms, and the environment of every run."""

import json
import os
from pathlib import Path
from typing import Any

from eaft_verl.reporting.collect import Arm, RunData
from eaft_verl.reporting.comparability import ABSENT, flatten

Row = dict[str, Any]
TEXT_LENGTH = 300
SHOWN = 3
_TAIL = 90  # an answer ends with its result, so its end is kept too


def sample_answers(base: Arm, arms: list[Arm]) -> list[Row]:
    """[{benchmark, metric, examples: [{id, prompt, target, answers: {arm: {score, text}}}]}] of the target side.

    First the smallest ids on which the arms' scores differ, then those on which an arm differs from the base; at
    most three. The first seed of each arm is shown. Benchmarks without responses are left out.
    """
    runs = [base.runs[0], *(arm.runs[0] for arm in arms)]
    found = []
    for name, record in sorted(base.runs[0].evals.get(base.runs[0].step, {}).items()):
        if record["side"] != "target" or any(name not in run.evals.get(run.step, {}) for run in runs):
            continue
        rows = [run.samples(run.step, name) for run in runs]
        shared = sorted(set.intersection(*(set(item) for item in rows)))
        if shared and all("response" in item[key] for item in rows for key in shared):
            examples = [_example(key, runs, rows, record["metric"]) for key in _chosen(shared, rows, record["metric"])]
            found.append({"benchmark": name, "metric": record["metric"], "examples": examples})
    return found


def _chosen(ids: list[str], rows: list[dict[str, Row]], metric: str) -> list[str]:
    scores = {key: [item[key]["scores"].get(metric) for item in rows] for key in ids}
    between_arms = [key for key in ids if len(set(scores[key][1:])) > 1]
    from_base = [key for key in ids if len(set(scores[key])) > 1 and key not in between_arms]
    return (between_arms + from_base)[:SHOWN]


def _example(key: str, runs: list[RunData], rows: list[dict[str, Row]], metric: str) -> Row:
    answers = {
        run.arm: {"score": _score(item[key]["scores"].get(metric)), "text": shorten(item[key]["response"])}
        for run, item in zip(runs, rows, strict=True)
    }
    first = rows[0][key]
    prompt, target = shorten(first.get("prompt"), head=0), shorten(first.get("target"))
    return {"id": key, "prompt": prompt, "target": target, "answers": answers}


def _score(value: Any) -> float | None:
    return None if value is None else float(value)


def shorten(value: Any, head: int = TEXT_LENGTH - _TAIL) -> str:
    """At most 300 characters: start and end, with ' … ' for what was cut. Values other than text become JSON."""
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    text = text.strip()
    if len(text) <= TEXT_LENGTH:
        return text
    gap = " … "
    return text[:head] + gap + text[len(text) - (TEXT_LENGTH - head - len(gap)) :]


def _recorded(run: RunData) -> dict[str, str]:
    """{dotted key: text} of env.json, and what differed where the run was gone on with, or evaluated, later."""
    found = {key: shorten(json.loads(text)) for key, text in flatten(run.run.env).items()}
    for entry in run.info.get("environments", []):
        lines = "; ".join(line for group in entry["found"].values() for line in group)
        found[f"then ({entry['stage']}, attempt {entry['attempt']})"] = shorten(lines)
    return found


def environment(base: Arm, arms: list[Arm], out: Path) -> Row:
    """{runs: {run: folder relative to the report}, equal: {key: text}, differing: {key: {run: text}}} of env.json.

    Of what is installed beside the packages that decide a number, only what differs.
    """
    runs = [base.runs[0], *(run for arm in arms for run in arm.runs)]
    flat = {run.label: _recorded(run) for run in runs}
    keys = sorted({key for values in flat.values() for key in values})
    found = {key: {label: env.get(key, ABSENT) for label, env in flat.items()} for key in keys}
    equal = {key: next(iter(values.values())) for key, values in found.items() if len(set(values.values())) == 1}
    differing = {key: found[key] for key in keys if key not in equal}
    equal = {key: text for key, text in equal.items() if not key.startswith("installed.")}
    folders = {run.label: os.path.relpath(run.run.path, out.resolve()) for run in runs}
    return {"runs": folders, "equal": equal, "differing": differing}
