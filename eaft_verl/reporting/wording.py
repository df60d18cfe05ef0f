"""Numbers and findings in words. Nothing is prejudged: every verdict is read off an interval."""

from collections.abc import Iterable
from typing import Any

from eaft_verl.pages.numbers import DASH, number, percent

Row = dict[str, Any]
LABELLED = 6  # arms whose names and steps find room beside their paths; more are told apart by a legend
AXES_IN_WORDS = {"heldout": "held-out NLL", "target_mean": "target mean"}
UNMARKED = {
    "interval": "no interval",
    "zero": "no clear difference",
    "noise": "within the noise floor",
    "seeds": "too few seeds for a claim",
    "holm": "no clear difference among so many",
}
SPELLED = {"sft": "SFT", "eaft": "EAFT", "dft": "DFT", "grpo": "GRPO", "sft_kl": "SFT-KL", "base": "Base"}


def arm_name(arm: str) -> str:
    """How an arm is printed: known methods as in the paper, others as written in the recipe."""
    return SPELLED.get(arm, arm)


def names(arms: Iterable[str]) -> str:
    """Arms as a list in words."""
    return ", ".join(map(arm_name, arms))


def control_wording(row: Row) -> str:
    """What a control was made by, and what the difference to it does and does not say."""
    of, runs = arm_name(row["of"]), row["runs"]
    ends = ", ".join(
        f"seed {seed}: update {run['steps']:,}, NLL {number(run['level'])}"
        + ("" if run["nll_reached"] else ", not reached")
        for seed, run in runs.items()
    )
    window = ", ".join(sorted({str(run["window"]) for run in runs.values()}))
    return (
        f"{row['arm']} is SFT stopped where its training NLL, a mean over the last {window} updates, first came down "
        f"to the final one of {of} ({ends}). A difference of {of} to it that excludes zero is there at an equal fit to "
        "the training data. The learning rate follows the schedule of the whole training up to there."
    )


def score(column: Row, value: float | None, *, signed: bool = False) -> str:
    """A score or difference in the column's own unit: shares in percent."""
    return number(value, column["decimals"], signed=signed, scale=100.0 if column["percent"] else 1.0)


def span(column: Row, bounds: Row, *, signed: bool = True) -> str:
    """'[+1.0, +2.0]', or a dash without an interval."""
    if bounds["low"] is None:
        return DASH
    return f"[{score(column, bounds['low'], signed=signed)}, {score(column, bounds['high'], signed=signed)}]"


def direction(column: Row, bounds: Row) -> str:
    """'better', 'worse', or '' where no mark is due (`marks.set_marks`)."""
    if bounds["unmarked"]:
        return ""
    return "better" if (bounds["delta"] > 0) == column["higher_is_better"] else "worse"


def verdict(column: Row, bounds: Row) -> str:
    """A finding in words: 'better', 'less forgetting', 'no clear difference', 'no interval' ..."""
    if bounds["unmarked"]:
        return UNMARKED[bounds["unmarked"]]
    words = {"better": "less forgetting", "worse": "more forgetting"} if column["id"] == "drift.kl" else {}
    return words.get(direction(column, bounds), direction(column, bounds))


def marked(report: Row) -> str:
    """What it takes to be called better or worse, and what the noise floor is."""
    noise = "Noise floor not measured."
    if report["noise"] is not None:
        noise = "Noise: what changes between two evaluations of the base, at another batch size and in another order."
    return (
        "A change is called better or worse only if its interval excludes zero, also after correction for the number "
        f"of differences in its table (Holm), and if it is larger than the noise floor. {noise}"
    )


def floor(column: Row) -> str:
    """The noise floor of a measure in its own unit."""
    return f"{column['floor'] * 100:.2g} %" if column["percent"] else f"{column['floor']:.2g}"


def headline(report: Row) -> list[Row]:
    """[{arm, sentences}]: gain, forgetting and general change of every arm against the base; from the second arm on
    also its differences to the first arm, at the end and at equal gain."""
    columns = {column["id"]: column for column in report["columns"]}
    found = []
    for arm in report["arms"]:
        cells = report["results"][arm]
        sentences = [_gain(columns, cells), _forgetting(columns, cells), _general(columns, cells)]
        if arm in report["versus"]["arms"]:
            reference = report["versus"]["reference"]
            sentences.append(_versus(columns, reference, report["versus"]["arms"][arm]))
            sentences += [_equal_gain(columns, report["equal_gain"], axis, arm, reference) for axis in AXES_IN_WORDS]
        found.append({"arm": arm, "sentences": [text for text in sentences if text]})
    return found


def _size(column: Row, bounds: Row) -> str:
    unit = " points" if column["percent"] else " nats per token" if column["unit"] == "nats per token" else ""
    interval = f" {span(column, bounds)}" if bounds["low"] is not None else ""
    return f"{score(column, bounds['delta'], signed=True)}{unit}{interval}"


def _change(column: Row, bounds: Row, subject: str) -> str:
    words = {"better": "is better", "worse": "is worse", "": "is not clearly changed"}[direction(column, bounds)]
    if bounds["low"] is None:
        words = "changed without a known interval"
    return f"{subject} {words}: {_size(column, bounds)}"


def _gain(columns: dict[str, Row], cells: Row) -> str:
    parts = [
        _change(columns[name], cells[name]["delta"], subject)
        for name, subject in (("target_mean", "target mean"), ("heldout", "held-out NLL"))
        if name in cells and "delta" in cells[name]
    ]
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else "Target learning was not measured."


def _forgetting(columns: dict[str, Row], cells: Row) -> str:
    if "drift.kl" not in cells:
        return "Drift from the base was not measured."
    kl, column = cells["drift.kl"], columns["drift.kl"]
    if kl.get("delta", {}).get("unmarked") == "noise":
        return f"On general text its KL to the base is within the noise floor of {floor(column)} nats per token."
    text = f"On general text it moved {score(column, kl['score'])} nats per token away from the base (KL"
    text += f", {span(column, kl, signed=False)})" if kl["low"] is not None else ")"
    if "drift.agreement" in cells:
        share = score(columns["drift.agreement"], cells["drift.agreement"]["score"])
        text += f"; on {share} % of tokens its first choice is still the base's"
    return text + "."


def _general(columns: dict[str, Row], cells: Row) -> str:
    if "general_mean" not in cells or "delta" not in cells["general_mean"]:
        return "General skill was not measured."
    return _change(columns["general_mean"], cells["general_mean"]["delta"], "General mean") + "."


def _versus(columns: dict[str, Row], reference: str, cells: Row) -> str:
    subjects = (("target_mean", "target mean"), ("drift.kl", "KL"), ("general_mean", "general mean"))
    parts = [
        f"{subject} {_size(columns[name], cells[name])}, {verdict(columns[name], cells[name])}"
        for name, subject in subjects
        if name in cells
    ]
    return f"Against {arm_name(reference)} at the end: {'; '.join(parts)}." if parts else ""


def _equal_gain(columns: dict[str, Row], found: Row, axis: str, arm: str, reference: str) -> str:
    """KL against the reference arm at the same gain: a comparison that a slow learner does not win for free."""
    parts = []
    for level in found.get(axis, {}).get("levels", []):
        row = level["arms"].get(arm)
        if row and "difference" in row:
            column, apart = columns["drift.kl"], row["difference"]
            change = score(column, apart["delta"], signed=True)
            parts.append(f"{change} at {percent(level['fraction'])} ({verdict(column, apart)})")
    if not parts:
        return ""
    return f"KL against {arm_name(reference)} at equal gain in {AXES_IN_WORDS[axis]}: {', '.join(parts)}."
