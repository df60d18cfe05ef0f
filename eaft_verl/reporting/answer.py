"""The first line of the report: which checkpoint to ship and why, in words."""

from typing import Any

from eaft_verl.pages.numbers import number, percent
from eaft_verl.recipe.choose import AIMS
from eaft_verl.reporting.wording import arm_name, score

Row = dict[str, Any]
_AIM_WORDS = {"heldout": "held-out NLL", "target": "target mean"}
_BOUND_WORDS = {"kl": "KL to base", "task_kl": "KL to base on the task's prompts"}


def answer(report: Row) -> list[str]:
    """The first line, and what stands below it: the choice and its probability, or that there is none and why."""
    found = report["choice"]
    rule = found["rule"]
    if rule is None:
        return _without_rule(report)
    changed = [f"This rule is not the one that runs were started with: {'; '.join(found['changed'])}."]
    changed = changed if found["changed"] else []
    if found["unjudged"]:
        return [
            f"Nothing is chosen: whether checkpoints {_bound(rule)} cannot be judged: {found['unjudged']}.",
            *changed,
        ]
    columns = {column["id"]: column for column in report["columns"]}
    seeds = max(len(seeds) for seeds in report["seeds"].values())
    said = _shipped(columns, rule, found) if found["chosen"] else _nothing(columns, rule, found)
    return [said, _probability(found, seeds), *changed]


def place(row: Row) -> str:
    """'EAFT, step 32'; the steps of all seeds where they are not the same."""
    if row["arm"] is None:
        return "none"
    if len(set(row["steps"].values())) == 1:
        return f"{arm_name(row['arm'])}, step {number(row['step'], 0)}"
    steps = ", ".join(f"{step:,} of seed {seed}" for seed, step in row["steps"].items())
    return f"{arm_name(row['arm'])}, step {steps}"


def _bound(rule: Row) -> str:
    """What a checkpoint must do to be allowed, as a verb."""
    if rule["bound"] == "general":
        lost = number(-rule["limit"], 2).rstrip("0").rstrip(".")
        return f"lose at most {lost} point{'s' if rule['limit'] != -1 else ''} of the general mean"
    return f"keep the {_BOUND_WORDS[rule['bound']]} at or below {rule['limit']:g} nats per token"


def _cost(rule: Row, row: Row) -> str:
    if rule["bound"] == "general":
        return f"general mean {number(-row['cost'], 1, signed=True)} points"
    return f"KL {row['cost']:.3g}"


def _aim(columns: dict[str, Row], rule: Row, row: Row) -> str:
    column = columns[AIMS[rule["by"]]]
    sign = 1 if column["higher_is_better"] else -1
    change = score(column, sign * row["gain"], signed=True)
    unit = " %" if column["percent"] else ""
    return f"{_AIM_WORDS[rule['by']]} {score(column, row['score'])}{unit} ({change} against the base)"


def _shipped(columns: dict[str, Row], rule: Row, found: Row) -> str:
    row, best = found["chosen"], "lowest" if rule["by"] == "heldout" else "highest"
    return (
        f"Ship {place(row)}, seed {row['seed']}: {best} {_aim(columns, rule, row)} of the {found['allowed']} of "
        f"{found['candidates']} checkpoints that {_bound(rule)} (its own: {_cost(rule, row)})."
    )


def _nothing(columns: dict[str, Row], rule: Row, found: Row) -> str:
    row = found["closest"]
    learnt = _aim(columns, rule, row)
    return (
        f"Ship none: of {found['candidates']} checkpoints none is better than the base and allowed, which is to "
        f"{_bound(rule)}. Closest: {place(row)} ({_cost(rule, row)}, {learnt})."
    )


def _probability(found: Row, seeds: int) -> str:
    if found["probability"] is None:
        return "How likely that is right is not known: there are no scores of single examples to resample."
    what = "the best of those that truly are allowed" if found["chosen"] else "that truly none is allowed"
    over = (
        f"examples and {seeds} seeds" if seeds > 1 else "examples; with one seed, the chance of training is not in it"
    )
    text = f"Probability that this is right, {what}: {_share(found['probability'])} (resampled over {over})"
    if found["bound_probability"] is not None:
        text += f"; that it truly is allowed: {_share(found['bound_probability'])}"
    if found["others"]:
        text += f". Otherwise most often {place(found['others'][0])} ({_share(found['others'][0]['share'])})"
    return f"{text}."


def _share(value: float) -> str:
    """Resamples say no more than 'above 99 %'."""
    return "above 99 %" if value > 0.99 else "below 1 %" if value < 0.01 else percent(value)


def _without_rule(report: Row) -> list[str]:
    """What can be said where nothing was fixed beforehand: the ends; then that none of them is recommended."""
    columns = {column["id"]: column for column in report["columns"]}
    axis = next((name for name in ("heldout", "target_mean") if name in report["paths"]), None)
    text = (
        "No checkpoint is recommended: no rule for that was fixed before training, such as choose: "
        "{forget_at_most: {kl: 0.02}} in the recipe."
    )
    if axis is None:
        return [text]
    ends = {arm: points[-1] for arm, points in report["paths"][axis].items()}
    higher = columns[axis]["higher_is_better"]
    learnt = (max if higher else min)(ends, key=lambda arm: ends[arm]["x"])
    kept = min(ends, key=lambda arm: ends[arm]["kl"])
    name = {"heldout": "held-out NLL", "target_mean": "target mean"}[axis]

    def at(arm: str) -> str:
        return (
            f"{name} {score(columns[axis], ends[arm]['x'])}, KL to base {score(columns['drift.kl'], ends[arm]['kl'])}"
        )

    if len(ends) == 1:  # the most of one says nothing
        return [f"At the end {arm_name(learnt)}: {at(learnt)}.", text]
    if learnt == kept:
        return [f"At the end {arm_name(learnt)} learnt most and moved least ({at(learnt)}).", text]
    return [
        f"At the end {arm_name(learnt)} learnt most ({at(learnt)}) and {arm_name(kept)} moved least ({at(kept)}).",
        text,
    ]
