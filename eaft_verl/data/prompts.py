"""Prepared data as prompts for GRPO: the rows that SFT trains on, asked instead of shown.

Columns are those verl 0.9.1's RLHFDataset and reward loop read: data_source, prompt (list of {role, content}),
reward_model {style, ground_truth}, extra_info {index, id, opened}; opened: the marker by which the generation prompt
opens the response's thinking, '' if it does not. Ids and order are those of the prepared examples.
"""

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaft_verl.data.encode import render
from eaft_verl.data.parquet import Example, file_hash
from eaft_verl.data.prepare import Prepared, manifest_path
from eaft_verl.data.spec import RowError
from eaft_verl.errors import DataError
from eaft_verl.files import write_json
from eaft_verl.grading.answers import marked_answer, opened_thinking
from eaft_verl.grading.process import Grade, GradingProcess

DATA_SOURCE = "eaft_verl"
SCHEMA = 1
_SHOWN = 3  # rows named for each fault
_HUNG = 3  # gradings one after the other that end a preparation: the rest would take hours to say the same
_REMEDIES = {
    "no_answer": "give every row an `answer`, or responses that mark theirs by '#### 42' or \\boxed{42}",
    "answer": "correct these answers, or choose another reward.grader",
    "rollout": "leave these rows out: rollouts of verl 0.9.1 are one turn, without the row's tools",
    "over_long": "raise the prompt length, or set data.over_long=drop",
    "unrewarded": "correct or remove these rows: SFT would be taught what GRPO is punished for",
}


@dataclass(frozen=True)
class _Prompt:
    """One row to write."""

    id: str
    messages: list[dict[str, str]]
    answer: str
    tokens: int
    opened: str


def write_prompts(prepared: Prepared, out: Path, *, max_prompt_length: int, tokenizer: Any, grader: str) -> Path:
    """`out` (NAME.parquet), written with one prompt per prepared example, its manifest beside it.

    A prompt is an example's messages up to its last user turn, few-shot turns included. Its answer is the row's
    `answer`, else what its response marks by '####' or a box. max_prompt_length: tokens, generation prompt included.

    Raises DataError naming the rows that cannot be asked: no answer, one that the grader cannot read, turns or tools
    that a rollout would not show, a prompt that is too long (left out and counted if the data was prepared with
    over_long=drop), a demonstration to which the grader gives less than 1. Not one of the last is let pass: with a
    wrong answer or a grader that cannot read the format, arms trained on demonstrations and arms trained on rewards
    would not pursue the same thing.
    """
    prompts, refused = _take_all(prepared.examples, tokenizer, max_prompt_length, grader)
    may_drop = ("over_long",) if prepared.manifest["spec"]["over_long"] == "drop" else ()
    dropped = [(row, error) for row, error in refused if error.kind in may_drop]
    _raise_refused(prepared, [(row, error) for row, error in refused if error.kind not in may_drop])
    if not prompts:
        raise DataError(f"{prepared.path}: none of {len(prepared.examples)} prompts fits in {max_prompt_length} tokens")
    _write(Path(out), prompts)
    manifest = {
        "schema": SCHEMA,
        "prepared_sha256": prepared.key,
        "template_hash": prepared.manifest["template_hash"],
        "grader": grader,
        "max_prompt_length": max_prompt_length,
        "prompts": len(prompts),
        "longest": max(prompt.tokens for prompt in prompts),
        "dropped": [{"id": row, "reason": str(error)} for row, error in dropped],
        "parquet_sha256": file_hash(Path(out)),
    }
    write_json(manifest_path(Path(out)), manifest)
    return Path(out)


def _take_all(
    examples: Iterable[Example], tokenizer: Any, max_length: int, grader: str
) -> tuple[list[_Prompt], list[tuple[str, RowError]]]:
    """(prompts, refused rows with the reason)."""
    prompts, refused, hung = [], [], 0
    process = GradingProcess(grader)
    try:
        for example in examples:
            try:
                prompts.append(_prompt(example, tokenizer, max_length, process))
                hung = 0
            except RowError as error:
                refused.append((example.id, error))
                hung = hung + 1 if error.kind == "hung" else 0
            if hung == _HUNG:  # each has cost the grader's whole time
                raise DataError(
                    f"the grader {grader!r} hangs or crashes on {hung} demonstrations one after the other, the last of "
                    f"them of row {example.id}; mend it, or give another by reward.grader"
                )
    finally:
        process.close()
    return prompts, refused


def _prompt(example: Example, tokenizer: Any, max_length: int, process: GradingProcess) -> _Prompt:
    """The prompt of an example; RowError says why it cannot be asked."""
    if example.weight != 1:
        raise RowError("rollout", f"it has weight {example.weight:g}; rewards are not weighted by row")
    last = max(index for index, message in enumerate(example.messages) if message["role"] == "user")
    asked, rest = example.messages[: last + 1], example.messages[last + 1 :]
    if len(rest) != 1:
        raise RowError("rollout", f"{len(rest)} turns answer the last user turn (tool calls?); a rollout has one")
    plain = [{"role": message["role"], "content": message["content"]} for message in asked]
    text = render(tokenizer, asked, example.tools, generate=True, kwargs=example.chat_template_kwargs)
    if render(tokenizer, plain, generate=True) != text:
        raise RowError("rollout", "its prompt holds tools, tool calls or reasoning, which a rollout's prompt cannot")
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    if tokens > max_length:
        raise RowError("over_long", f"the prompt has {tokens} tokens, allowed are {max_length}")
    answer = _answer(example.answer, rest[0]["content"])
    if fault := process.answer_fault(answer):
        raise RowError("answer", f"answer {answer[:60]!r} cannot be graded by {process.grader!r}: {fault}")
    _check_demonstration(process.grade(rest[0]["content"], answer), answer, rest[0]["content"])
    return _Prompt(example.id, plain, answer, tokens, opened_thinking(text))


def _answer(given: str | None, response: str) -> str:
    """The row's answer, reduced to what it marks if it is a worked solution; else what the response marks."""
    for text in (given, response):
        if text is not None and (marked := marked_answer(text)):
            return marked
        if text is given and text and text.strip():
            return text.strip()
    raise RowError("no_answer", "it has no `answer`, and its response marks none")


def _check_demonstration(grade: Grade, answer: str, response: str) -> None:
    if grade.outcome == "timeout":
        raise RowError("hung", "the grader hangs or crashes on the demonstration")
    if grade.outcome == "error":
        raise RowError("unrewarded", f"the grader raises on the demonstration: {grade.error}")
    if grade.score < 1:
        raise RowError(
            "unrewarded",
            f"the demonstration gets reward {grade.score:g} for answer {answer[:60]!r}; it ends in {response[-60:]!r}",
        )


def _raise_refused(prepared: Prepared, refused: list[tuple[str, RowError]]) -> None:
    if not refused:
        return
    lines = [f"{prepared.path}: {len(refused)} of {len(prepared.examples)} rows cannot be GRPO prompts"]
    for kind in sorted({error.kind for _, error in refused}):
        rows = [(row, error) for row, error in refused if error.kind == kind]
        lines.append(f"{len(rows)} rows: {_REMEDIES.get(kind, 'correct or remove these rows')}")
        lines += [f"  row {row}: {error}" for row, error in rows[:_SHOWN]]
    raise DataError("\n".join(lines))


def _write(path: Path, prompts: list[_Prompt]) -> None:
    """All rows in one move."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "data_source": DATA_SOURCE,
            "prompt": prompt.messages,
            "reward_model": {"style": "rule", "ground_truth": prompt.answer},
            "extra_info": {"index": index, "id": prompt.id, "opened": prompt.opened},
        }
        for index, prompt in enumerate(prompts)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
