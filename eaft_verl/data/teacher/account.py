"""Which answers become rows, and where every prompt has gone."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eaft_verl.data.teacher.answer_file import AnswerFile
from eaft_verl.data.teacher.asking import Verdicts
from eaft_verl.data.teacher.prompts import Prompt
from eaft_verl.data.teacher.spec import SynthesisSpec
from eaft_verl.data.teacher.verify import REASONS, Verdict

_FEW = 10  # different difficulties up to which each is stated by itself; more numbers than that are stated by fifths


@dataclass
class Account:
    """Where prompts have gone. read = drawn + not_drawn + not_asked + all of `rejected`, always.

    not_drawn: verified, but enough were drawn before. not_asked: enough were verified before. rejected: {source, row,
    kind, reason} each. answers: how many came to what. rows: what is written.
    """

    read: Counter[str] = field(default_factory=Counter)
    drawn: int = 0
    not_drawn: int = 0
    not_asked: int = 0
    rejected: list[dict[str, Any]] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    rows: list[dict[str, Any]] = field(default_factory=list)
    acceptance: dict[str, Any] = field(default_factory=dict)

    def reject(self, source: str, row: int, kind: str, reason: str) -> None:
        """Note a prompt that makes no row."""
        self.rejected.append({"source": source, "row": row, "kind": kind, "reason": reason})

    def counts(self) -> dict[str, Any]:
        """The manifest's `prompts`."""
        kinds = dict(sorted(Counter(entry["kind"] for entry in self.rejected).items()))
        total = sum(self.read.values())
        left = {"drawn": self.drawn, "not_drawn": self.not_drawn, "not_asked": self.not_asked}
        assert total == sum(left.values()) + len(self.rejected), "a prompt is not accounted for"
        return {"read": total, **left, "rejected": kinds, "sources": dict(self.read)}


def choose(
    account: Account, spec: SynthesisSpec, prompts: Sequence[Prompt], verdicts: Verdicts, file: AnswerFile
) -> None:
    """The first verified answers in the order of the draw as rows, and every prompt into the account."""
    shares: list[tuple[Prompt, float]] = []
    for prompt in prompts:
        found = verdicts.of(prompt)
        account.answers.update(verdict.reason or "verified" for verdict in found.values())
        judged = [verdict for verdict in found.values() if verdict.reason != "failed"]
        if len(judged) == spec.samples:
            shares.append((prompt, sum(verdict.reason in ("", "duplicate") for verdict in judged) / spec.samples))
        _settle(account, spec, prompt, found, file)
    account.acceptance = _acceptance(spec, account.answers, shares) | {"alike": verdicts.alike(prompts)}


def _settle(
    account: Account, spec: SynthesisSpec, prompt: Prompt, found: Mapping[int, Verdict], file: AnswerFile
) -> None:
    """One prompt into the account, its rows if there is room for them."""
    right = [sample for sample, verdict in found.items() if not verdict.reason]
    if not found:
        account.not_asked += 1
    elif not right:
        kind = Counter(verdict.reason for verdict in found.values()).most_common(1)[0][0]
        reason = next(verdict.detail for verdict in found.values() if verdict.reason == kind)
        account.reject(prompt.source, prompt.row, kind, reason)
    elif chosen := right[: spec.keep][: None if spec.rows is None else spec.rows - len(account.rows)]:
        account.drawn += 1
        account.rows += [_row(spec, prompt, sample, file) for sample in chosen]
    else:
        account.not_drawn += 1


def _row(spec: SynthesisSpec, prompt: Prompt, sample: int, file: AnswerFile) -> dict[str, Any]:
    """A row that `eaft prepare` reads; of its assistant turns only the answer is trained."""
    reply = file.get((prompt.key, sample))
    assert reply is not None
    turns = prompt.messages if spec.keep_instruction else prompt.plain
    before = [turn | ({"train": False} if turn["role"] == "assistant" else {}) for turn in turns]
    answer = {"role": "assistant", "content": reply["content"], "reasoning_content": reply["reasoning"]}
    answer = {key: value for key, value in {**answer, "tool_calls": reply["tool_calls"]}.items() if value is not None}
    name = prompt.id if spec.samples == 1 else f"{prompt.id}-{sample}"
    row = {"id": name, "messages": [*before, answer], "answer": prompt.answer, "tools": prompt.tools}
    return {key: value for key, value in row.items() if value not in ("", [])} | {"source": prompt.source}


def _acceptance(spec: SynthesisSpec, answers: Counter[str], shares: list[tuple[Prompt, float]]) -> dict[str, Any]:
    """Share of right answers: of all, by how many of a prompt's answers are right, by difficulty where one is named.

    by_right: {'3/4': prompts of whose 4 answers 3 are right}; a prompt with a failed request is left out.
    """
    judged = sum(answers[reason] for reason in REASONS if reason != "failed") + answers["verified"]
    right = answers["verified"] + answers["duplicate"]
    found: dict[str, Any] = {"answers": right / judged if judged else None}
    by_right = Counter(round(share * spec.samples) for _, share in shares)
    found["by_right"] = {f"{count}/{spec.samples}": by_right[count] for count in range(spec.samples + 1)}
    if levels := [(prompt.difficulty, share) for prompt, share in shares if prompt.difficulty is not None]:
        found["by_difficulty"] = _by_difficulty(levels)
    return found


def _by_difficulty(levels: list[tuple[Any, float]]) -> dict[str, dict[str, Any]]:
    """{difficulty: {prompts, accepted (mean share of right answers)}}."""
    values = [level for level, _ in levels]
    numeric = all(isinstance(value, int | float) and value == value for value in values)
    names = [str(value) for value in values]
    if numeric and len(set(values)) > _FEW:
        edges = np.quantile(values, [0, 0.2, 0.4, 0.6, 0.8, 1])
        fifths = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, 4)
        names = [f"{edges[at]:.3g} to {edges[at + 1]:.3g}" for at in fifths]
    elif numeric:
        levels = sorted(levels, key=lambda pair: pair[0])
        names = [str(value) for value, _ in levels]
    groups: dict[str, list[float]] = {}
    for name, (_, share) in zip(names, levels, strict=True):
        groups.setdefault(name, []).append(share)
    return {name: {"prompts": len(shares), "accepted": sum(shares) / len(shares)} for name, shares in groups.items()}
