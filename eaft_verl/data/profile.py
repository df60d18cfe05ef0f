"""What a data file holds, before a recipe is written for it: format, rows, lengths, turns, and what can be graded."""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_verl.data.accept import Taker
from eaft_verl.data.columns import Row
from eaft_verl.data.parquet import Example
from eaft_verl.data.prepare import Prepared, manifest_path, prepare
from eaft_verl.data.sources import GENERATED, count_rows, files_of, iter_rows
from eaft_verl.data.spec import Columns, DataSpec
from eaft_verl.data.take import take_all
from eaft_verl.errors import DataError
from eaft_verl.grading.answers import marked_answer
from eaft_verl.grading.process import GradingProcess

LOOKED_AT = 5000  # rows at most whose tokens are counted
GRADED = 200  # examples at most whose answers are tried
LONGEST = 1 << 20  # tokens: what is longer is left out, as the recipe does with what is too long for it
QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Profile:
    """A data source as a model's tokenizer and chat template see it.

    total: rows of the source, None where they cannot be counted without parsing. manifest: of the rows looked at.
    lengths_E, trained_E: tokens of each example. turns_E: its assistant turns. system, tools, reasoning: examples that
    have them. graded: (of so many, whose own response the grader `number` accepts for the row's answer).
    turns, control_tokens: the settings of `data` that these rows need. asked: the columns that were named.
    """

    source: str
    kind: str
    columns: tuple[str, ...]
    total: int | None
    manifest: dict[str, Any]
    lengths_E: NDArray[np.int64]
    trained_E: NDArray[np.int64]
    turns_E: NDArray[np.int64]
    system: int
    tools: int
    reasoning: int
    graded: tuple[int, int]
    turns: str
    control_tokens: str
    asked: Columns | None = None

    @property
    def quantiles(self) -> list[int]:
        """Tokens of an example at QUANTILES."""
        return [int(value) for value in np.quantile(self.lengths_E, QUANTILES, method="lower")]

    @property
    def verifiable(self) -> bool:
        """Whether the answers can be a reward: every response tried is graded right, as a GRPO arm asks of all rows."""
        right, tried = self.graded
        return right == tried > 0

    @property
    def faulty(self) -> int:
        """Rows looked at that cannot be used, as `data.max_rejected` counts them: neither copies nor long ones."""
        rejected = self.manifest["counts"]["rejected"].items()
        return sum(count for kind, count in rejected if kind not in ("duplicate", "masked", "over_long"))


def profile(source: str, tokenizer: Any, columns: Columns | None = None) -> Profile:
    """The profile of a data source's first LOOKED_AT rows; DataError if none of them can be used."""
    first = next(islice(iter_rows(source), 1), None)
    if first is None:
        raise DataError(f"{source} holds no rows")
    with tempfile.TemporaryDirectory() as scratch:
        spec = DataSpec(source, max_length=LONGEST, rows=LOOKED_AT, columns=columns, over_long="drop")
        prepared, spec = _prepared(spec, tokenizer, Path(scratch))
        return _profile(source, first, prepared, spec)


def _prepared(spec: DataSpec, tokenizer: Any, scratch: Path) -> tuple[Prepared, DataSpec]:
    """The rows encoded with the mildest settings that take them: conversations whole, special tokens refused."""
    for number in range(3):
        try:
            return prepare(spec, tokenizer, scratch / f"{number}.parquet"), spec
        except DataError:
            with take_all(Taker(spec, tokenizer), scratch / "again") as outcome:
                kinds = {entry["kind"] for entry in outcome.refused}
            milder = replace(
                spec,
                turns="split" if "template" in kinds else spec.turns,
                control_tokens="escape" if "control_token" in kinds else spec.control_tokens,
            )
            if milder == spec:
                raise
            spec = milder
    raise AssertionError("two settings can be milder once each")


def _profile(source: str, first: dict[str, Any], prepared: Prepared, spec: DataSpec) -> Profile:
    examples = list(prepared.examples)
    return Profile(
        source=source,
        kind=_kind(source, first, spec.columns),
        columns=tuple(map(str, first)),
        total=count_rows(source),
        manifest=prepared.manifest,
        lengths_E=prepared.examples.lengths,
        trained_E=prepared.examples.trained,
        turns_E=np.array([sum(turn["role"] == "assistant" for turn in one.messages) for one in examples]),
        system=sum(one.messages[0]["role"] == "system" for one in examples),
        tools=sum(bool(one.tools) for one in examples),
        reasoning=sum(any(turn.get("reasoning_content") for turn in one.messages) for one in examples),
        graded=_graded(examples[:GRADED]),
        turns=spec.turns,
        control_tokens=spec.control_tokens,
        asked=spec.columns,
    )


def _kind(source: str, first: dict[str, Any], columns: Columns | None) -> str:
    """'ShareGPT in JSON Lines', as far as the first row and the names of the files tell."""
    keys = {str(key).lower() for key in first}
    row = Row(first, columns)
    asks, answers = (next(iter(row.find(role)), "?") for role in ("prompt", "response"))
    shape = f"columns {asks} and {answers}"
    for name, wanted in (
        ("chat messages", {"messages"}),
        ("ShareGPT conversations", {"conversations"}),
        ("Alpaca instructions", {"instruction", "output"}),
    ):
        if wanted <= keys:
            shape = name
            break
    if source.startswith(GENERATED):
        return f"{shape}, generated"
    files = files_of(source)
    if files is None:
        return f"{shape} of a hub"
    if Path(source).suffix == ".parquet" and manifest_path(Path(source)).exists():
        return f"{shape} as `eaft prepare` wrote them"
    names = sorted({re.sub(r"^[^.]*", "", Path(file).name) for file in files})
    return f"{shape} in {', '.join(names[:3])}" + f" ({len(files)} files)" * (len(files) > 1)


def _graded(examples: Sequence[Example]) -> tuple[int, int]:
    """(right, tried) of single exchanges whose answer is marked, or stands in a column of its own."""
    process, right = GradingProcess("number"), 0
    try:
        for one in examples:
            said = one.messages[-1]["content"]
            answer = marked_answer(one.answer or "") or one.answer or marked_answer(said)
            plain = sum(turn["role"] == "assistant" for turn in one.messages) == 1 and not one.tools
            if plain and answer and not process.answer_fault(answer):
                right += process.grade(said, answer).score >= 1
    finally:
        process.close()
    return right, len(examples)
