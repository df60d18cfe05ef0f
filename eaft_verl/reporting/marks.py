"""Which differences may be called better or worse, and the noise of the measurement that they must exceed."""

from collections.abc import Iterable, Iterator
from typing import Any

from eaft_verl.errors import RunError
from eaft_verl.files import read_json
from eaft_verl.pages.statistics import holm
from eaft_verl.reporting.collect import Arm

Row = dict[str, Any]
MIN_SEEDS = 3  # below it nothing between arms is claimed: two runs say too little of the chance of training
ONE_WAY = (
    "drift.kl",
    "drift.agreement",
    "drift_task.kl",
    "drift_task.agreement",
)  # the base is their best value, so every arm is 'worse' than it
PARTS = {"kl", "agreement", "nll", "accuracy"}


def read_noise(base: Arm) -> Row | None:
    """What the base run recorded of itself at another batch size and order; None if that was not measured.

    {kl, agreement, nll, accuracy: {benchmark: {changed, n, difference}}}: KL and NLL in nats per token, None where they
    are not evaluated; how many of n answers became right or wrong. RunError if a part is missing.
    """
    path = base.runs[0].run.path / "eval" / "noise.json"
    if not path.exists():
        return None
    noise = read_json(path)
    if missing := sorted(PARTS - set(noise)):
        raise RunError(f"{path} lacks {', '.join(missing)}; delete it and evaluate the base again")
    return dict(noise)


def with_floors(columns: list[Row], noise: Row | None) -> list[Row]:
    """The columns with `floor`, the size up to which a difference may be noise of the measurement; None: not known.

    Of a benchmark the share of answers that changed, as if all had changed the same way, or what its score changed by
    if that is no share; of a mean over benchmarks the mean of theirs; of held-out NLL that of NLL.
    """
    found: dict[str, float] = {}
    if noise is not None:
        off = {"drift.kl": (noise["kl"], 0.0), "drift.agreement": (noise["agreement"], 1.0)}
        off |= {"drift.nll": (noise["nll"], 0.0), "heldout": (noise["nll"], 0.0)}
        if task := noise.get("task"):  # runs of earlier versions have none
            off |= {"drift_task.kl": (task["kl"], 0.0), "drift_task.agreement": (task["agreement"], 1.0)}
        found = {name: abs(size - exact) for name, (size, exact) in off.items() if size is not None}
        shares = {column["id"] for column in columns if column["percent"]}
        for name, row in noise["accuracy"].items():
            found[name] = row["changed"] / row["n"] if name in shares else row["difference"]
    for column in columns:
        members = column["members"]
        if members and all(name in found for name in members):
            found[column["id"]] = sum(found[name] for name in members) / len(members)
    return [{**column, "floor": found.get(column["id"])} for column in columns]


def set_marks(report: Row) -> None:
    """Give every difference its `unmarked`: None if it may be called better or worse, else why not.

    interval  it has none             zero   the raw interval holds zero      noise  not larger than the noise floor
    seeds     arms, below 3 seeds     holm   not significant at 5 % familywise error within its table (Holm)
    one_way   against the base every model differs in that direction
    """
    floors = {column["id"]: column["floor"] or 0.0 for column in report["columns"]}
    known = {column["id"] for column in report["columns"] if column["floor"] is not None}
    table = [(name, cell["delta"]) for name, cell in _pairs(report["results"].values()) if "delta" in cell]
    for name, row in table:
        none = "noise" if name in known else "zero"  # a floor that was not measured explains nothing
        row["unmarked"] = none if abs(row["delta"]) <= floors[name] else "one_way"
    _mark([pair for pair in table if pair[0] not in ONE_WAY], floors, seeds=1)
    _mark(list(_pairs(report["versus"]["arms"].values())), floors, MIN_SEEDS)
    _mark(list(_pairs(item["versus"] for item in report["controls"])), floors, MIN_SEEDS)
    _mark(_at_equal_gain(report["equal_gain"].values()), floors, MIN_SEEDS)


def _at_equal_gain(axes: Iterable[Row]) -> list[tuple[str, Row]]:
    rows = _pairs(level["arms"] for found in axes for level in found["levels"])
    return [("drift.kl", row["difference"]) for _, row in rows if row and "difference" in row]


def _pairs(groups: Iterable[Row]) -> Iterator[tuple[str, Any]]:
    return (pair for group in groups for pair in group.items())


def _mark(table: list[tuple[str, Row]], floors: dict[str, float], seeds: int) -> None:
    """One table of (measure, difference), of which a claim needs that many seeds."""
    judged = [row for _, row in table if row["p"] is not None]
    rejected = {id(row) for row, found in zip(judged, holm([row["p"] for row in judged]), strict=True) if found}
    for name, row in table:
        reasons = {
            "interval": row["p"] is None,
            "zero": not row["excludes_zero"],
            "noise": abs(row["delta"]) <= floors[name],
            "seeds": row["seeds"] < seeds,
            "holm": id(row) not in rejected,
        }
        row["unmarked"] = next((reason for reason, holds in reasons.items() if holds), None)
