"""`eaft tasks`: the benchmarks that may stand in `evaluate.target` and `evaluate.general`, and what each needs."""

from eaft_verl.evaluation.tasks import BFCL, LOCAL_VARIANTS, OWN_TASKS, OwnTask, definition

HEADER = ("task", "data", "metric", "shots")
HARNESS = {"gsm8k": ("exact_match", "5")}  # metric and shots of lm-evaluation-harness's own, where ours has others


def tasks_listing() -> list[str]:
    """One line per task of ours; then what else may be named."""
    rows = [HEADER, *(_row(name, task) for name, task in sorted((OWN_TASKS | LOCAL_VARIANTS).items()))]
    rows.append((BFCL, "bfcl-eval, in an environment of its own: bash examples/setup_bfcl.sh", "accuracy", "0"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 2)]
    lines = [f"{name:{widths[0]}}  {metric:{widths[1]}}  {shots:>5}  {data}" for name, data, metric, shots in rows]
    return [
        *lines,
        "",
        "An entry is a name or {task, data, limit, metric, new_tokens, samples, temperature, top_p}.",
        "new_tokens: 256 ends every answer there; how many were cut is in the record's truncation_rate.",
        "samples: 8 scores the mean of eight answers to every question, and pass@2, pass@4, pass@8.",
        "Any other task of lm-evaluation-harness may be named too, or a task file of yours by its path.",
    ]


def _row(name: str, task: OwnTask) -> tuple[str, str, str, str]:
    text = definition(task.file)
    ours = text["metric_list"][0]["metric"], str(text["num_fewshot"])
    if task.data:
        data = task.data
    elif task.built_in:
        data = "lm-evaluation-harness's own, or data: FILE"
        if name in HARNESS:
            return name, f"{data} (then {ours[0]}, {ours[1]} shots)", *HARNESS[name]
    else:
        data = "data: FILE" + (f" ({task.get})" if task.get else "")
    return name, data, *ours
