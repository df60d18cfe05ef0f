"""May these runs stand in one table? Every reason why not, with key, values and runs; and what the arms differ in."""

import json
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from eaft_verl.errors import RunError
from eaft_verl.recipe.config import OF_SFT
from eaft_verl.reporting.chains import own_rows
from eaft_verl.reporting.collect import Arm, RunData
from eaft_verl.reporting.spending import unequal

Row = dict[str, Any]
RUN_KEYS = ("model", "data", "template", "evaluation")
BENCHMARK_KEYS = ("side", "metric", "prompt_hash", "task_version", "data_hash", "n")
IGNORED_CONFIG = frozenset(
    {"arm", "seed", "output", "output_dir", "out", "run", "run_dir", "recipe", "budget"}
    | {"save_minutes", "async_save", "resume", "choose", "trackers"}
)
CHOSEN_WHOLE = {
    "objective.name": "objective",  # a named objective drops the parameters of another one
    "control.of": "control",
}
ABSENT = "(absent)"


DERIVED = {"verl.trainer.total_training_steps": "budget"}  # keys that follow from another run, seed by seed


def config_differences(arms: list[Arm]) -> list[Row]:
    """Dotted config keys that are not equal in all arm runs: [{key, values: {run: text}, declared, of_trainer}].

    The arm's name, seeds, output folders and the recipe's path are left out. `declared` is True if every two runs that
    differ in the key are of two arms of which one sets it, or one above it, itself. `of_trainer`: the key exists for
    one trainer only and is equal in all its runs; an arm that declares its trainer declares those.
    """
    return [{**row, "declared": row["undeclared"] is None} for row in _differences(arms)]


def _differences(arms: list[Arm]) -> list[Row]:
    """As above, with `undeclared`: the first two runs that may not differ, None if there are none."""
    runs = [run for arm in arms for run in arm.runs]
    flat = {run.label: _config(run) for run in runs}
    trainers = {label: config.get("trainer", ABSENT) for label, config in flat.items()}
    rows = []
    for key in sorted({key for config in flat.values() for key in config}):
        values = {label: config.get(key, ABSENT) for label, config in flat.items()}
        if len(set(values.values())) > 1 and not _ignored(key):
            pairs = ((x, y) for x, y in combinations(runs, 2) if values[x.label] != values[y.label])
            bad = next((pair for pair in pairs if not _may_differ(key, values, trainers, *pair)), None)
            rows.append({"key": key, "values": values, "undeclared": bad, "of_trainer": _of_trainer(values, trainers)})
    return rows


def _may_differ(key: str, values: dict[str, str], trainers: dict[str, str], x: RunData, y: RunData) -> bool:
    """Two arms may differ in what one of them declares; seeds of one arm only in what follows from another run."""
    if x.arm == y.arm:
        return all(DERIVED.get(key) in run.info.get("derived", {}) for run in (x, y))
    declared = {CHOSEN_WHOLE.get(name, name) for run in (x, y) for name in run.info.get("declared", [])}
    said = {key} | {key[:index] for index, char in enumerate(key) if char == "."}
    of_one = key in OF_SFT or ABSENT in (values[x.label], values[y.label])
    if trainers[x.label] != trainers[y.label] and of_one:
        said.add("trainer")
    if {values[x.label], values[y.label]} == {ABSENT, "null"}:  # `meter: null` of one arm, `meter.every` of the other
        said |= {name for name in declared if name.startswith(f"{key}.")}
    return not declared.isdisjoint(said)


def _of_trainer(values: dict[str, str], trainers: dict[str, str]) -> bool:
    groups: dict[str, set[str]] = {}
    for label, value in values.items():
        groups.setdefault(trainers[label], set()).add(value)
    return any(group <= {ABSENT, "null"} for group in groups.values()) and all(
        len(group) == 1 for group in groups.values()
    )


def _config(run: RunData) -> dict[str, str]:
    own = str(run.run.path)  # a folder inside the run directory is the same setting in every run
    config = run.run.config
    if control := config.get("control"):  # what it led to is derived, and different for every seed
        config["control"] = f"{control['by']} of {control['of']}"
    return {key: text.replace(own, "RUN") for key, text in flatten(config).items()}


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """{dotted key: value as JSON text}; lists stay whole, empty mappings too."""
    if not isinstance(value, dict) or not value:
        return {prefix: json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)}
    found: dict[str, str] = {}
    for key, item in value.items():
        found |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def _ignored(key: str) -> bool:
    parts = key.split(".")
    wrapping = key.startswith("verl.engine.wrap_policy.")  # changes no number
    return parts[0] in IGNORED_CONFIG or parts[-1] in ("seed", "output_dir", "run_dir") or wrapping


def check(
    base: Arm, arms: list[Arm], models: Sequence[Arm] = (), *, force: bool = False, failed: Sequence[Row] = ()
) -> list[str]:
    """Every reason why the runs are not comparable; empty if they are.

    Raises RunError listing them unless `force`, with which the caller must show them to the reader. failed: runs that
    are missing for a reason the report states, so that their seeds are no mismatch.
    """
    runs = [base.runs[0], *(run for arm in arms for run in arm.runs)]
    groups = (
        _unfinished(runs),
        _run_keys(runs),
        _benchmarks(runs),
        _undeclared(arms),
        _seeds(arms, failed),
        unequal(arms),
        _models(base.runs[0], [arm.runs[0] for arm in models]),
    )
    found = list(dict.fromkeys(line for group in groups for line in group))
    if found and not force:
        listing = "\n".join(f"- {line}" for line in found)
        raise RunError(
            f"these runs cannot be compared:\n{listing}\n"
            "Train and evaluate them with one recipe, or pass --force to get a report that says so on its first line."
        )
    return found


def _where(run: RunData) -> str:
    return f"{run.label} ({run.run.path})"


def _unfinished(runs: list[RunData]) -> Iterator[str]:
    for run in runs:
        if (status := run.info["status"]) != "finished":
            yield f"status: {_where(run)} is {status!r}, a report needs 'finished'; resume it"
        planned = int(run.info.get("total_steps", 0))
        if planned not in run.evals:
            have = sorted(run.evals) or "none"
            yield f"final evaluation: {_where(run)} has no evaluation at step {planned} (it has {have}); evaluate it"


def _run_keys(runs: list[RunData]) -> Iterator[str]:
    for key in RUN_KEYS:
        # the base model saw no training data, and an arm may declare rows of its own: the report says so
        having = [run for run in runs[1:] if not own_rows(run)] if key == "data" else runs
        if not having:
            continue
        first = having[0]
        for run in having[1:]:
            left, right = (item.info.get("keys", {}).get(key) for item in (first, run))
            if left != right or left is None:
                yield f"keys.{key}: {left!r} in {_where(first)}, {right!r} in {_where(run)}"


def other_keys(base: Row, model: Row) -> list[str]:
    """'key: value of the base's, value of the model's' of all by which a MODEL's scores may not stand beside a base's.

    base, model: the `keys` of their run.json.
    """
    pairs = {"base": (base.get("model"), model.get("base"))}
    pairs["evaluation"] = (base.get("evaluation"), model.get("evaluation"))
    return [f"keys.{key}: {ours!r}, {theirs!r}" for key, (ours, theirs) in pairs.items() if ours != theirs]


def _models(base: RunData, models: list[RunData]) -> Iterator[str]:
    """Models that are not trained here: evaluated alike, and drift measured from this base."""
    yield from _unfinished(models)
    yield from _benchmarks([base, *models])
    for run in models:
        ours, theirs = base.info.get("keys", {}), run.info.get("keys", {})
        for line in other_keys(ours, theirs):
            yield f"{line}: of {_where(base)} and {_where(run)}; evaluate the model with the recipe of this base"
        rendered = {"heldout", "drift"} & run.evals.get(run.step, {}).keys()
        if rendered and ours.get("template") != theirs.get("template"):
            yield (
                f"keys.template: {_where(run)} has another chat template than {_where(base)}, so its "
                f"{' and '.join(sorted(rendered))} are of other texts; leave it out, or evaluate both without them"
            )


def _benchmarks(runs: list[RunData]) -> Iterator[str]:
    base = runs[0]
    known = base.evals.get(base.step, {})
    for run in runs[1:]:
        for step, records in run.evals.items():
            names = known.keys() | records.keys() if step == run.step else records.keys()
            for name in sorted(names):
                if name not in known or name not in records:
                    lacking, having = (base, run) if name not in known else (run, base)
                    yield f"benchmark {name}: {_where(lacking)} lacks it, {_where(having)} has it"
                else:
                    yield from _benchmark(name, base, run, step)


def _benchmark(name: str, base: RunData, run: RunData, step: int) -> Iterator[str]:
    left, right = base.evals[base.step][name], run.evals[step][name]
    for key in BENCHMARK_KEYS:
        if left.get(key) != right.get(key):
            yield (
                f"benchmark {name}, {key}: {left.get(key)!r} in {_where(base)}, "
                f"{right.get(key)!r} in {_where(run)} at step {step}"
            )
    ours, theirs = base.samples(base.step, name).keys(), run.samples(step, name).keys()
    if ours != theirs:
        only_base, only_run = sorted(ours - theirs), sorted(theirs - ours)
        yield (
            f"benchmark {name}, example ids: {len(only_base)} only in {_where(base)} ({only_base[:3]}), "
            f"{len(only_run)} only in {_where(run)} at step {step} ({only_run[:3]})"
        )


def _seeds(arms: list[Arm], failed: Sequence[Row]) -> Iterator[str]:
    seeds = {arm.name: {*arm.seeds, *(int(row["seed"]) for row in failed if row["arm"] == arm.name)} for arm in arms}
    first, *others = seeds
    for name in others:
        if seeds[name] != seeds[first]:
            yield (
                f"seeds: {first} has {sorted(seeds[first])}, {name} has {sorted(seeds[name])}; differences are paired "
                "by seed, so train every arm with the same ones"
            )


def _undeclared(arms: list[Arm]) -> Iterator[str]:
    for row in _differences(arms):
        if row["undeclared"] is not None:
            x, y = row["undeclared"]
            found = f"config {row['key']}: {row['values'][x.label]} in {x.label}, {row['values'][y.label]} in {y.label}"
            if x.arm == y.arm:
                yield f"{found}; runs of one arm may differ in their seed only, so train them with one recipe"
            else:
                yield (
                    f"{found}, and neither {x.arm} nor {y.arm} declares it; "
                    "set it in the recipe's arms if the difference is meant"
                )
