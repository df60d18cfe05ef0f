"""What a dry run looks at beside the keys: first rows, rows and names of benchmarks, a user's own objective."""

import functools
import importlib.util
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from eaft_verl.data.formats import to_messages
from eaft_verl.data.sources import GENERATED, at_hand, iter_rows
from eaft_verl.data.spec import RowError, Source
from eaft_verl.errors import ConfigError, DataError
from eaft_verl.evaluation.rows import benchmark_rows
from eaft_verl.evaluation.tasks import BFCL, OWN_TASKS, Entry, unknown_task
from eaft_verl.grading.answers import marked_answer
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.views import data_spec, evaluate_settings, objective_of, source_of

FIRST = 20  # rows of a data file
_NAMES = re.compile(r"^\s*(?:-\s*)?(?:['\"]?(?:task|group|tag)['\"]?:|-)\s*['\"]?([\w.-]+)['\"]?\s*$", re.MULTILINE)


def rehearse(config: Config) -> list[str]:
    """What would stop a run of this configuration once it reads its rows, benchmarks and objective."""
    return [*_data_faults(config), *_task_faults(config), *_objective_faults(config)]


def _data_faults(config: Config) -> Iterator[str]:
    for which in ("train", "heldout"):
        if not source_of(config, which):
            continue
        for source in data_spec(config, which).sources:
            if at_hand(source.source):
                asks = config.trainer == "grpo" and which == "train"
                yield from _row_faults(f"data.{which}={source.source!r}", source, answers=asks)


def _row_faults(key: str, source: Source, *, answers: bool) -> Iterator[str]:
    """Whether any of the first rows can be used, and with `answers` whether each that can has one to be graded by."""
    faults, read = [], 0
    try:
        for number, row in enumerate(islice(iter_rows(source.source), min(FIRST, source.rows or FIRST)), 1):
            read = number
            try:
                messages, extra = to_messages(row, source.columns)
            except RowError as error:
                faults.append(f"row {number}: {error}")
                continue
            if answers and not extra.get("answer") and not marked_answer(messages[-1]["content"]):
                yield (
                    f"{key} row {number} has no `answer`, and its response marks none (#### 42, \\boxed{{42}}): "
                    "trainer grpo has nothing to grade it by"
                )
                return
    except DataError:
        return  # said by whoever looks whether the file can be read
    if read and len(faults) == read:
        yield f"{key}: none of its first {read} rows can be used; {faults[0]}"


def _task_faults(config: Config) -> Iterator[str]:
    settings = evaluate_settings(config)
    for side in ("target", "general"):
        for number, entry in enumerate(settings.entries(side)):
            if fault := _task_fault(entry):
                yield f"evaluate.{side}[{number}]: {fault}"


def _task_fault(entry: Entry) -> str:
    own = entry.own
    if own is None:
        known = _harness_names()
        return "" if entry.task in (known | {BFCL}) or not known else unknown_task(entry.task, "evaluate", [])
    source = entry.data or own.data
    if source is None or source.startswith(GENERATED) or not at_hand(source):
        return ""
    try:
        benchmark_rows(entry, own)
    except (DataError, ConfigError) as error:
        return str(error)
    return ""


@functools.cache
def _harness_names() -> frozenset[str]:
    """Names of lm-evaluation-harness's tasks, groups and tags, read off its files: its own index takes ten seconds."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        return frozenset()
    files = (Path(spec.origin).parent / "tasks").rglob("*.yaml")
    return frozenset(OWN_TASKS).union(*(_NAMES.findall(file.read_text(encoding="utf-8")) for file in files))


def _objective_faults(config: Config) -> Iterator[str]:
    """Only of an objective that is not of this package: ours have their tests, and torch takes seconds to import."""
    if config.trainer != "sft" or ":" not in config.objective.name:
        return
    from eaft_verl.tokens.rehearsal import weight_fault

    if fault := weight_fault(objective_of(config)):
        yield f"objective.name={config.objective.name!r}: {fault}"
