"""study_sums.json from the runs of recipes/study_smollm2.yaml, and the tables of study.md from that file.

    python recipes/results/study.py runs/study_smollm2        then: python recipes/results/rebuild.py

The folder is the recipe's output; arms and seeds that have finished are taken, the others are named. Differences are in
KL to the base on neutral prompts, paired by seed and row, at half and at all of the gain that both arms reach
(eaft_verl/reporting/paths.py); a prediction that says "less" holds where the interval lies below zero, fails where it
lies above, and is open otherwise.
"""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402

from eaft_verl.reporting.collect import BASE, Arm, RunData, load  # noqa: E402
from eaft_verl.reporting.measures import Board, build_board  # noqa: E402
from eaft_verl.reporting.paths import COST, equal_gain, paths  # noqa: E402
from eaft_verl.reporting.results import bounds  # noqa: E402

Row = dict[str, Any]
FILE = HERE / "study_sums.json"
COMMAND = "eaft compare recipes/study_smollm2.yaml --seeds 0,1,2"
RESAMPLES = 4000
COLUMNS = ("heldout", "target_mean", "general_mean", COST, "drift_task.kl")
PAIRS = (  # the prediction, what forgets less, than what, by it
    (1, "pilot_mask", "sft"),
    (2, "eaft", "sft"),
    (2, "eaft_base", "sft"),
    (3, "eaft", "dft"),
    (3, "eaft", "mile"),
    (6, "sft_low", "sft"),
    (6, "sft_low", "eaft"),
)
ARMS = "| arm | seeds | updates | held-out NLL |"  # how the tables begin
VERDICTS = "| prediction | KL to base | at half of the gain |"


def study(output: Path) -> Row:
    """What study_sums.json holds: every arm at its end, and what came of every prediction."""
    base, arms = load(_finished(output))
    board = build_board(base, arms, resamples=RESAMPLES, seed=0)
    named = {arm.name: arm for arm in arms}
    pairs = [_pair(base, named, *pair) for pair in PAIRS if {pair[1], pair[2]} <= named.keys()]
    about = json.loads((base.runs[0].run.path / "env.json").read_text(encoding="utf-8"))
    machine = f"{about['cpus']} cores of {about['cpu']}, {about['memory_gib']} GiB"
    return {
        "command": COMMAND,
        "commit": about["commit"],
        "machine": machine,
        "arms": {arm.name: _ends(board, arm) for arm in [base, *arms]},
        "pairs": pairs,
        "least": _least(board, named),
        "razor": _razor(board),
        "paths": _paths(board),
    }


def _finished(output: Path) -> list[Path]:
    """The run folders that were trained and evaluated to the end; the others are named on stderr."""
    folders = sorted(path.parent for path in output.glob("*/run.json"))
    told = {path: json.loads((path / "run.json").read_text(encoding="utf-8")) for path in folders}
    done = [path for path, info in told.items() if info["kind"] == BASE or info.get("evaluated")]
    if left := [path.name for path in folders if path not in done]:
        print(f"not finished, left out: {', '.join(left)}", file=sys.stderr)
    return done


def _ends(board: Board, arm: Arm) -> Row:
    """{seeds, step (None of an average), measure: [score, low, high]}: at the runs' ends, or at what a meter kept."""
    kept = [(run.info.get("meter") or {}).get("kept") for run in arm.runs]
    point = tuple(one["step"] if one else run.step for one, run in zip(kept, arm.runs, strict=True))
    found: Row = {"seeds": len(arm.runs), "step": None if arm.average else sum(point) / len(point)}
    for name in COLUMNS:
        if name in board.measures and board.has(name, arm, point):
            score = board.interval(name, arm, point)
            found[name] = [score.delta, *score.bounds]
    return found


def _pair(base: Arm, named: dict[str, Arm], number: int, less: str, than: str) -> Row:
    """KL of one arm less that of another where both have learnt as much, over the seeds that both have."""
    shared = set(named[less].seeds) & set(named[than].seeds)
    two = [Arm(name, tuple(run for run in named[name].runs if run.info["seed"] in shared)) for name in (than, less)]
    board = build_board(base, two, resamples=RESAMPLES, seed=0)
    axis = "heldout"
    found = equal_gain(board, axis)
    if not found["levels"]:  # one of the two does not lower the NLL of the demonstrations
        axis = "target_mean"
        found = equal_gain(board, axis)
    row: Row = {"prediction": number, "less": less, "than": than, "axis": axis, "seeds": len(shared)}
    for level in found["levels"]:
        reached = level["arms"][less] or {}
        row[str(level["fraction"])] = reached.get("difference")
    return row


def _least(board: Board, named: dict[str, Arm]) -> list[Row]:
    """[{arm, difference}]: KL less that of `grpo`, of every arm that ends with at least its accuracy in the target."""
    if "grpo" not in named:
        return []
    rl = named["grpo"]
    gained = board.interval("target_mean", rl, rl.end).delta
    able = [
        arm
        for arm in board.arms
        if arm is not rl and not _extra(arm) and board.interval("target_mean", arm, arm.end).delta >= gained
    ]
    seeds = {arm.name: len(set(arm.seeds) & set(rl.seeds)) for arm in able}
    return [
        {"arm": arm.name} | bounds(board.interval(COST, arm, arm.end, rl), seeds[arm.name])
        for arm in able
        if seeds[arm.name]
    ]


def _extra(arm: Arm) -> bool:
    """An average, or an arm that ends as another one does and whose result is what a meter kept."""
    return arm.average is not None or bool((arm.runs[0].info.get("meter") or {}).get("kept"))


def _razor(board: Board) -> Row:
    """Spearman's correlation, over runs, of KL on the task's prompts with the loss in the general mean.

    The interval is over rows and arms: every resample takes its draw of the rows and as many arms, with their seeds,
    drawn with replacement.
    """
    base = board.base.runs[0]
    lost, far, owner = [], [], []
    for number, arm in enumerate(board.arms):
        for run in (run for run in arm.runs if not _extra(arm) and _has(board, run)):
            key = (run.label, run.step)
            lost.append(board.resampled("general_mean", (base.label, base.step)) - board.resampled("general_mean", key))
            far.append(board.resampled("drift_task.kl", key))
            owner.append(number)
    loss_RN, kl_RN, owner_N = np.column_stack(lost), np.column_stack(far), np.array(owner)
    rng = np.random.default_rng(0)
    members = [np.flatnonzero(owner_N == number) for number in np.unique(owner_N)]
    draws = []
    for row in range(1, len(loss_RN)):
        picked = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        draws.append(spearmanr(kl_RN[row, picked], loss_RN[row, picked]).statistic)
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    rho = float(spearmanr(kl_RN[0], loss_RN[0]).statistic)
    return {"runs": len(owner), "delta": rho, "low": float(low), "high": float(high)}


def _paths(board: Board) -> dict[str, list[list[float]]]:
    """{arm: [[held-out NLL, KL to base] at every evaluation]}, means over the seeds."""
    found = paths(board, "heldout")
    return {name: [[point["x"], point["kl"]] for point in points] for name, points in found.items()}


def figure(found: Row) -> bytes:
    """PNG of the paths, KL to the base on a logarithmic axis: the base, at zero, is its left edge."""
    import matplotlib
    import matplotlib.pyplot as plt

    from eaft_verl.pages.canvas import STYLE, png

    with matplotlib.rc_context(STYLE):
        drawn, axes = plt.subplots(figsize=(7.2, 4.8))
        markers = "os^Dv"
        for number, (arm, points) in enumerate(found["paths"].items()):
            x, y = zip(*((nll, kl) for nll, kl in points if kl > 0), strict=True)
            axes.plot(x, y, marker=markers[number // 10], markersize=4, color=f"C{number % 10}", label=arm)
        axes.set(yscale="log", xlabel="held-out NLL, nats per token (right: learnt more)")
        axes.set(ylabel="KL to base, nats per token", ylim=(1e-5, None))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.invert_xaxis()
        axes.legend(frameon=False, fontsize=8, ncols=2)
        return png(drawn)


def _has(board: Board, run: RunData) -> bool:
    return all((run.label, run.step) in board.measures[name].scores for name in ("general_mean", "drift_task.kl"))


def sums() -> Row:
    """study_sums.json."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def tables(found: Row) -> dict[str, str]:
    """{how it begins: the table}, for study.md."""
    head = f"{ARMS} two-shot sums | general mean | KL to base | KL, task's prompts |"
    rows = [head, "|" + " --- |" * 8]
    for name, ends in found["arms"].items():
        cells = [_score(ends.get(column), column) for column in COLUMNS]
        trained = "" if ends["step"] is None else f"{ends['step']:g}"
        counted = " | " if name == BASE else f"{ends['seeds']} | {trained}"
        rows.append(f"| {_name(name)} | {counted} | {' | '.join(cells)} |")
    verdicts = [f"{VERDICTS} at all of it | verdict |", "|" + " --- |" * 5]
    found_rows = [_pair_row(pair) for pair in found["pairs"]] + [_least_row(row) for row in found["least"]]
    razor = found["razor"]
    words = f"rank correlation over {razor['runs']} runs"
    found_rows.append(f"| 5 | {words} | | {_change(razor)} | {_verdict(_negative(razor))} |")
    verdicts += sorted(found_rows, key=lambda row: row[:4])
    return {ARMS: "\n".join(rows) + "\n", VERDICTS: "\n".join(verdicts) + "\n"}


def _pair_row(pair: Row) -> str:
    words = f"`{pair['less']}` less `{pair['than']}`" + (", gain in sums" if pair["axis"] != "heldout" else "")
    parts = [_change(pair.get(part)) for part in ("0.5", "1.0")]
    return f"| {pair['prediction']} | {words} | {' | '.join(parts)} | {_verdict(pair.get('1.0'))} |"


def _least_row(row: Row) -> str:
    less = _negative(row)
    return f"| 4 | `grpo` less `{row['arm']}`, at the end | | {_change(less)} | {_verdict(less)} |"


def _name(arm: str) -> str:
    return arm if arm == BASE else f"`{arm}`"


def _score(cell: list[float | None] | None, column: str) -> str:
    if cell is None:
        return "not measured"
    percent = column.endswith("_mean")
    score, low, high = (value if value is None else 100 * value if percent else value for value in cell)
    digits = ".1f" if percent else ".4f" if column == COST else ".3f"
    bracket = "" if low is None else f" [{low:{digits}}, {high:{digits}}]"
    return "0" if not score else f"{score:{digits}}{' %' if percent else ''}{bracket}"


def _change(row: Row | None) -> str:
    if not row or row["low"] is None:
        return "not known"
    return f"{row['delta']:+.2g} [{row['low']:+.2g}, {row['high']:+.2g}]"


def _negative(row: Row) -> Row:
    if row["low"] is None:
        return row
    return row | {"delta": -row["delta"], "low": -row["high"], "high": -row["low"]}


def _verdict(row: Row | None) -> str:
    """Of a prediction that the difference is below zero."""
    if not row or row["low"] is None:
        return "open"
    return "holds" if row["high"] < 0 else "fails" if row["low"] > 0 else "open"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    FILE.write_text(json.dumps(study(Path(sys.argv[1])), indent=1) + "\n", encoding="utf-8")
