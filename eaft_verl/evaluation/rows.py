"""The rows of our own benchmarks, checked when they are read: what cannot be asked or graded stops before any answer.

Imports neither torch nor lm_eval.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from eaft_verl.data.sources import read_rows
from eaft_verl.errors import ConfigError, DataError
from eaft_verl.evaluation.choices import boxed_fault, cluewsc_target, list_of, options_of, right_index
from eaft_verl.evaluation.tasks import Entry, OwnTask
from eaft_verl.grading.answers import only_number
from eaft_verl.grading.graders import GRADERS

Row = dict[str, Any]
_TEXTS = (
    *("question", "problem", "prompt", "text", "QUESTION", "sent1", "subject"),
    *("ctx_a", "activity_label", "sentence", "option1", "option2"),
)


def benchmark_rows(entry: Entry, own: OwnTask) -> list[Row]:
    """All rows of a task, options counted from 0.

    Raises DataError naming the source and the row: a field is missing or is no text, two rows have one id, the right
    answer is one that the task's grader cannot read, or is none of the options.
    """
    source = str(entry.data or own.data)
    rows = read_rows(source)
    if not rows:
        raise DataError(f"{source} holds no rows; task {entry.task!r} needs at least one")
    for number, row in enumerate(rows, 1):
        if missing := [names for names in own.fields if all(row.get(name) is None for name in names.split("|"))]:
            found, wanted = ", ".join(sorted(row)) or "nothing", " or ".join(map(repr, missing[0].split("|")))
            raise DataError(f"{source} row {number} has no {wanted}, as task {entry.task!r} needs; found {found}")
    try:
        check_ids(entry.task, rows)
        rows = _from_zero(rows)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    if own.checked is not None and own.checked not in _CHECKS:
        raise ConfigError(f"{own.file}: checked is {own.checked!r}; allowed: {', '.join(_CHECKS)}")
    check = _CHECKS[own.checked] if own.checked else dict
    checked = [_checked(row, check, f"{source} row {number}") for number, row in enumerate(rows, 1)]
    return _tabular(checked, source)


def _tabular(rows: list[Row], source: str) -> list[Row]:
    """The rows with one another's fields: a table takes its columns from the first, and values of one type in each."""
    import pyarrow  # a recipe is checked without it

    names = dict.fromkeys(name for row in rows for name in row)
    for name in names:
        try:
            pyarrow.array([row.get(name) for row in rows])
        except (pyarrow.ArrowException, OverflowError) as error:
            raise DataError(
                f"{source}: the values of {name!r} are not of one type ({str(error).splitlines()[0]}); write all of "
                "them as text, or all as numbers, or leave the field out"
            ) from None
    return [{**dict.fromkeys(names), **row} for row in rows]


def check_ids(task: str, rows: Iterable[Row]) -> None:
    """DataError if two rows would have the same id, which is the row's `id` or else its number from 0."""
    counts = Counter(str(row["id"] if isinstance(row.get("id"), str | int) else n) for n, row in enumerate(rows))
    if twice := [name for name, count in counts.items() if count > 1]:
        raise DataError(
            f"task {task!r} has rows with the same id {twice[0]!r} ({len(twice)} such ids); examples are matched by "
            "id, so make them unique"
        )


def _checked(row: Row, check: Callable[[Row], Row], where: str) -> Row:
    try:
        if check is not dict:
            _check_texts(row)
        return check(row)
    except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
        problem = str(error) if isinstance(error, DataError) else f"it cannot be read ({type(error).__name__}: {error})"
        raise DataError(f"{where}: {problem}") from None


def _from_zero(rows: list[Row]) -> list[Row]:
    """MedMCQA's `cop` is 1 to 4 in the original files and 0 to 3 in the hub's: which of both, all rows together say."""
    found = {
        row["cop"] if isinstance(row["cop"], int) else repr(row["cop"])
        for row in rows
        if row.get("opa") is not None and "cop" in row
    }
    if not found or (0 in found and 4 not in found):
        return rows
    if 0 in found or 4 not in found:
        shown = ", ".join(map(str, sorted(found, key=str)))
        raise DataError(
            f"cop is {shown}: it must be 0 to 3 or 1 to 4, and rows must show which of both (0 or 4 occurs); give "
            "`options` {A: ...} and `answer_idx` instead"
        )
    return [{**row, "cop": right_index(row["cop"] - 1, 4)} for row in rows]


def _check_texts(row: Row) -> None:
    for name in _TEXTS:
        value = row.get(name)
        if value is not None and not (isinstance(value, str) and value.strip()):
            raise DataError(f"{name!r} is {str(value)[:60]!r} ({type(value).__name__}); expected text, and not empty")


def _answer(row: Row) -> str:
    answer = row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise DataError(f"'answer' is {str(answer)[:60]} ({type(answer).__name__}); expected text or a number")
    return str(answer)


def _number(row: Row) -> Row:
    if fault := GRADERS["number"].fault(_answer(row)):
        raise DataError(f"answer {str(row['answer'])[:60]!r} cannot be graded: {fault}")
    return row


def _integer(row: Row) -> Row:
    value = only_number(str(_number(row)["answer"]))
    if value and value.value.denominator != 1:
        raise DataError(f"answer {str(row['answer'])[:60]!r} cannot be graded: it is no whole number")
    return row


def _boxed(row: Row) -> Row:
    if fault := boxed_fault({**row, "answer": _answer(row)}):
        raise DataError(f"answer {str(row['answer'])[:60]!r} cannot be graded: {fault}")
    return row


def _options(row: Row) -> Row:
    options_of(row)
    return row


def _four_choices(row: Row) -> Row:
    """MMLU by likelihood: letters A to D, the right one an index as the task file needs it."""
    _, options, right = options_of({"question": row["question"], "choices": row["choices"], "answer": row["answer"]})
    if len(options) != 4:
        raise DataError(f"it has {len(options)} choices; the task asks for A to D, so 4 are needed")
    return {**row, "answer": right}


def _cluewsc(row: Row) -> Row:
    cluewsc_target(row)
    if missing := {"span1_text", "span2_text"} - set(row["target"]):
        raise DataError(f"target has no {min(missing)!r}")
    return row


def _instructions(row: Row) -> Row:
    names, given = list_of(row, "instruction_id_list", str), list_of(row, "kwargs", dict | None)
    if len(names) != len(given) or not names:
        raise DataError("instruction_id_list and kwargs must be lists of one length, not empty")
    return row if all(given) else {**row, "kwargs": [kwargs or {} for kwargs in given]}


def _endings(row: Row) -> Row:
    right = right_index(row["label"], len(list_of(row, "endings", str)))
    return row if str(row["label"]).strip().isdecimal() else {**row, "label": str(right)}


def _blank(row: Row) -> Row:
    if row["sentence"].count("_") != 1:
        raise DataError(f"sentence {row['sentence'][:60]!r} has not one '_' where the options go")
    if str(row["answer"]) not in ("1", "2"):
        raise DataError(f"answer is {row['answer']!r}; allowed: 1, 2")
    return {**row, "answer": str(row["answer"])}


def _truths(row: Row) -> Row:
    for name in ("mc1_targets", "mc2_targets"):
        choices, labels = list_of(row[name], "choices", str), list_of(row[name], "labels", int)
        if len(choices) != len(labels) or 1 not in labels or not set(labels) <= {0, 1}:
            raise DataError(f"{name} needs as many labels as choices, 0 or 1, and a true one among them")
    if sum(row["mc1_targets"]["labels"]) > 1:
        raise DataError("mc1_targets has several true choices; it is scored by its only one")
    return row


_CHECKS: dict[str, Callable[[Row], Row]] = {
    "number": _number,
    "integer": _integer,
    "boxed": _boxed,
    "options": _options,
    "four choices": _four_choices,
    "cluewsc": _cluewsc,
    "instructions": _instructions,
    "endings": _endings,
    "blank": _blank,
    "truths": _truths,
}
