"""What a reader must know before believing the numbers, computed from the report itself."""

from typing import Any

from eaft_verl.pages.numbers import number
from eaft_verl.reporting.collect import Arm
from eaft_verl.reporting.marks import MIN_SEEDS

SMALL = 100


def caveats(report: dict[str, Any], notes: list[str]) -> list[str]:
    """Seeds, sample sizes, number of intervals, end points; then whatever was noted while reading the runs."""
    lines = [_seeds(report["seeds"])]
    lines += _small(report) + _intervals(report)
    aside = {item["arm"] for item in report["controls"]}
    aside |= {item["arm"] for item in report["budgets"]["arms"] if item["average"]}
    steps = {item["arm"]: item["steps"] for item in report["cost"] if item["arm"] not in aside}
    if len(set(steps.values())) > 1:
        counts = ", ".join(f"{arm} {number(count, 0)}" for arm, count in steps.items())
        lines.append(f"the arms were trained for different numbers of updates: {counts}")
    if report["lost_seeds"]:
        lines.append(f"the arms do not have the same seeds: {'; '.join(report['lost_seeds'])}")
    chosen = report["choice"]["chosen"]
    ends = (
        "no checkpoint was chosen by its scores" if chosen is None else "the first line's choice is the one exception"
    )
    lines.append(f"end points are the last step of each run; {ends}")
    if chosen is not None:
        lines.append("the chosen checkpoint was the best of several by this score, so its score flatters it a little")
    return lines + list(dict.fromkeys(notes))


def run_notes(base: Arm, arms: list[Arm]) -> list[str]:
    """What happened to single runs that a reader of their numbers must know."""
    return [*interruptions(arms), *together(arms), *truncations(base, arms)]


def truncations(base: Arm, arms: list[Arm]) -> list[str]:
    """One line per benchmark that had to cut prompts or answers at the end of a run: in which run, how many."""
    found: dict[str, list[str]] = {}
    for run in (run for arm in (base, *arms) for run in arm.runs):
        for name, record in run.evals.get(run.step, {}).items():
            for part, count in record.get("truncated", {}).items():
                total = record.get("answers", record["n"]) if part == "answers" else record["n"]
                if count:
                    share = f"{run.label} {count} of {total} ({count / total:.0%})"
                    found.setdefault(f"{name}: {part} cut off", []).append(share)
    return [f"{what}: {', '.join(counts)}" for what, counts in sorted(found.items())]


def interruptions(arms: list[Arm]) -> list[str]:
    """One line per run that was not trained in one way from beginning to end: settings changed, metrics lost."""
    lines = []
    for run in (run for arm in arms for run in arm.runs):
        changed = [
            f"{line} from attempt {row['attempt']} on"
            for row in run.info.get("changes", [])
            for line in row["settings"]
        ]
        if told := changed + run.info.get("lost_metrics", []):
            lines.append(f"{run.label} was interrupted and gone on with: {'; '.join(told)}")
        meter = run.info.get("meter") or {}
        if meter.get("alarm") is not None:
            then = {"stop": "which ended its training", "keep_best": "after which its best export before was kept"}
            lines.append(
                f"{run.label}: the forgetting meter's alarm went off after update {meter['alarm']}, "
                f"{then.get(meter['then'], 'and training went on')}"
            )
    return lines


def together(arms: list[Arm]) -> list[str]:
    """One line where an evaluation went on beside a training: neither had the processors to itself."""
    runs = ", ".join(run.label for arm in arms for run in arm.runs if run.info.get("beside"))
    said = "trained while another model was evaluated on the same processors, so that seconds and tokens per second"
    return [f"{said} are not those of a machine of its own (`eaft compare --alone` gives these): {runs}"] * bool(runs)


def _small(report: dict[str, Any]) -> list[str]:
    small = [f"{item['name']} ({item['n']:,})" for item in report["columns"] if item["n"] and item["n"] < SMALL]
    names = ", ".join(dict.fromkeys(small))
    return [f"fewer than {SMALL} examples: {names}; only large effects can be seen there"] if small else []


def _intervals(report: dict[str, Any]) -> list[str]:
    count = sum("delta" in cell for cells in report["results"].values() for cell in cells.values())
    lines = [
        f"{count} intervals against the base are shown without correction: about {max(1, round(count / 20))} would "
        "exclude zero by chance alone; marks are corrected for the number of differences in their table (Holm): the "
        "chance of any false one in a table is at most 5 %"
    ]
    if lacking := [column["name"] for column in report["columns"] if column["floor"] is None]:
        what = "" if report["noise"] is None else f" for {', '.join(lacking)}"
        lines.append(f"noise floor not measured{what}: a mark there may be as small as the noise of the evaluation")
    if zero := _flat(report):
        lines.append(f"no example differs from the base, so the interval has no width: {', '.join(zero)}")
    return lines


def _seeds(seeds: dict[str, list[int]]) -> str:
    counts = {len(found) for found in seeds.values()}
    claim = "no arm is called better or worse than another"
    if counts == {1}:
        return f"one seed: intervals cover examples only, not the chance of training, so {claim}"
    some = "" if min(counts) > 1 else "; arms with one seed have intervals that cover examples only"
    number = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    few = f"; below {MIN_SEEDS} shared seeds {claim}" if min(counts) < MIN_SEEDS else ""
    return f"scores are means over {number} seeds, and intervals are for new examples and new seeds{few}{some}"


def _flat(report: dict[str, Any]) -> list[str]:
    """Cells whose paired interval is a single point at zero."""
    return [
        f"{arm} on {name}"
        for arm, cells in report["results"].items()
        for name, cell in cells.items()
        if "delta" in cell and cell["delta"]["low"] == cell["delta"]["high"] == cell["delta"]["delta"] == 0
    ]
