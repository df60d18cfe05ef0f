"""What the models say: greedy answers of base and arms to the same held-out prompts, beside the demonstration."""

from typing import Any

from eaft_verl.files import read_jsonl
from eaft_verl.reporting.collect import Arm, RunData
from eaft_verl.runs import answers_file

LENGTH = 1200  # characters of a text that are shown


def held_out_answers(base: Arm, arms: list[Arm]) -> list[dict[str, Any]]:
    """[{id, prompt, target, answers: {arm: {text, cut}}}] of the prompts that all of them answered, first seed each."""
    runs = [base.runs[0], *(arm.runs[0] for arm in arms)]
    found = [_answered(run) for run in runs]
    shared = [key for key in found[0] if all(key in rows for rows in found)]
    return [
        {
            "id": key,
            "prompt": _short(found[0][key]["prompt"]),
            "target": _short(found[0][key]["target"]),
            "answers": {
                run.arm: {"text": _short(rows[key]["response"]), "cut": bool(rows[key]["cut"])}
                for run, rows in zip(runs, found, strict=True)
            },
        }
        for key in shared
    ]


def _answered(run: RunData) -> dict[str, dict[str, Any]]:
    file = answers_file(run.run.path, run.step)
    needed = {"id", "prompt", "target", "response", "cut"}
    rows = read_jsonl(file) if file.exists() else []
    return {str(row["id"]): row for row in rows if isinstance(row, dict) and needed <= row.keys()}


def _short(text: Any) -> str:
    said = str(text).strip()
    return said if len(said) <= LENGTH else f"{said[:LENGTH]} \u2026"
