"""Rows as prompts that can be asked and whose answers can be verified; a reason for every row that cannot."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from eaft_verl.data.columns import Row
from eaft_verl.data.formats import to_messages
from eaft_verl.data.leakage import Against, words
from eaft_verl.data.sources import iter_rows
from eaft_verl.data.spec import RowError
from eaft_verl.data.teacher.spec import PromptSource, SynthesisSpec
from eaft_verl.data.teacher.verify import GradingPool
from eaft_verl.data.validate import check_row
from eaft_verl.errors import DataError
from eaft_verl.grading.answers import marked_answer

_NO_RESPONSE = "-"
_COMMAND_LINE = re.compile(r" \(--column [^)]*\)")  # advice for `eaft prepare`


@dataclass(frozen=True)
class Prompt:
    """One row. key: 32 hex digits of what is asked. messages: the conversation up to its last user turn, as asked.

    plain: the same without system text and instruction of the spec. given: the row's own answer, as turns.
    """

    key: str
    id: str
    source: str
    row: int
    messages: list[dict[str, Any]]
    plain: list[dict[str, Any]]
    given: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    answer: str
    difficulty: Any


def iter_prompts(spec: SynthesisSpec) -> Iterator[Prompt | tuple[str, int, RowError]]:
    """A prompt for each row of each source in order, or (source, number, why not).

    Raises DataError, before anything is asked, for a column that is named but not there.
    """
    for name, source in spec.prompts.items():
        for number, row in enumerate(islice(iter_rows(source.source), source.rows), 1):
            if number == 1:
                _check_columns(name, source, row)
            try:
                yield _prompt(spec, name, source, number, row)
            except RowError as error:
                advice = _COMMAND_LINE.sub("", str(error)).replace("data.columns", f"prompts.{name}.columns")
                yield name, number, RowError(error.kind, advice)


class Screen:
    """What of a prompt is known before it is asked: whether it is a copy, leaks, or has no answer to grade against."""

    def __init__(self, against: Against | None, grading: GradingPool | None) -> None:
        self.against, self.grading = against, grading
        self._seen: dict[bytes, tuple[str, int]] = {}

    def check(self, prompt: Prompt) -> None:
        """RowError of kind duplicate, leaked or unverifiable."""
        said = [(turn["role"], words(turn["content"])) for turn in prompt.plain]
        digest = hashlib.sha256(json.dumps([said, prompt.tools], default=str).encode()).digest()[:16]
        name, row = self._seen.setdefault(digest, (prompt.source, prompt.row))
        if (name, row) != (prompt.source, prompt.row):
            raise RowError("duplicate", f"asks the same as row {row} of {name}")
        if self.against and (hits := self.against.find(prompt.plain)):
            raise RowError("leaked", self.against.describe(hits))
        if self.grading:
            if not prompt.answer:
                raise RowError("unverifiable", "it has no answer, and its solution marks none")
            if fault := self.grading.answer_fault(prompt.answer):
                raise RowError("unverifiable", f"answer {prompt.answer[:60]!r} cannot be graded: {fault}")


def _check_columns(name: str, source: PromptSource, row: Mapping[str, Any]) -> None:
    columns = source.columns or {}
    named = {f"columns.{role}": column for role, column in columns.items() if isinstance(column, str)}
    for key, column in {**named, "difficulty": source.difficulty}.items():
        if column is not None and column not in row and _value(row, column) is None:
            raise DataError(
                f"prompts.{name}.{key}={column!r}: there is no such column; {source.source} has {', '.join(row)}"
            )


def _value(row: Mapping[str, Any], column: str) -> Any:
    """Of a column, or for 'a.b' of field b of column a."""
    if column in row:
        return row[column]
    outer, _, inner = column.partition(".")
    found = row.get(outer)
    return found.get(inner) if isinstance(found, Mapping) else None


def _prompt(spec: SynthesisSpec, name: str, source: PromptSource, number: int, given_row: dict[str, Any]) -> Prompt:
    row, columns = _flat(given_row, source)
    seen = Row(row, columns)
    bare = not seen.find("messages") and not (seen.find("response") and columns.get("response", True))
    if bare:
        row[_NO_RESPONSE], columns["response"] = _NO_RESPONSE, _NO_RESPONSE
    messages, extra = to_messages(row, columns)
    plain, given = _parted(messages)
    if not source.thinking and any(turn.get("reasoning_content") for turn in messages):
        raise RowError("thinking", "its answer holds reasoning")
    asked, tools = _instructed(spec, plain), extra.get("tools") or []
    key = hashlib.sha256(json.dumps([asked, tools], sort_keys=True, default=str).encode()).hexdigest()[:32]
    answer = extra.get("answer") or ("" if bare else _reference(seen, given))
    level = _value(given_row, source.difficulty) if source.difficulty else None
    name_of = extra.get("id") or f"{name}-{number}"
    return Prompt(key, name_of, name, number, asked, plain, [] if bare else given, tools, answer.strip(), level)


def _flat(given: dict[str, Any], source: PromptSource) -> tuple[dict[str, Any], dict[str, Any]]:
    """(row, columns) with fields of columns as columns of their own, in place of those they are of."""
    row, columns = dict(given), dict(source.columns or {})
    lifted = [column for column in columns.values() if isinstance(column, str) and column not in given]
    for column in lifted:
        row.pop(column.partition(".")[0], None)
    return row | {column: _value(given, column) for column in lifted}, columns


def _parted(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What is asked, up to the last user turn, and what follows; RowError where nothing is, or not to be trained on."""
    last = max((at for at, turn in enumerate(messages) if turn["role"] == "user"), default=-1)
    if last < 0 or not messages[last]["content"].strip():
        raise RowError("format", "no turn of a user, which could be answered")
    check_row([*messages[: last + 1], {"role": "assistant", "content": "-"}])
    return messages[: last + 1], messages[last + 1 :]


def _reference(row: Row, given: list[dict[str, Any]]) -> str:
    """The answer that a response marks; all of it where its column is called `answer`."""
    said = given[-1]["content"] if given else ""
    if marked := marked_answer(said):
        return marked
    columns = [name.lower() for name in row.find("response")]
    return said if columns == ["answer"] else ""


def _instructed(spec: SynthesisSpec, plain: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with the spec's system text before it and its instruction after the last user turn."""
    asked = list(plain)
    if spec.instruction:
        asked[-1] = {**asked[-1], "content": f"{asked[-1]['content']}\n{spec.instruction}"}
    if spec.system and asked[0]["role"] != "system":
        asked = [{"role": "system", "content": spec.system}, *asked]
    return asked
