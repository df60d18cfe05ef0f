"""Whether an answer may be trained on: whole, right by the grader in a process of its own, free of benchmarks."""

import os
import queue
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from eaft_verl.data.leakage import Against
from eaft_verl.grading.process import Grade, GradingProcess

REASONS = ("failed", "truncated", "wrong", "unverifiable", "leaked", "duplicate")


class Verdict(NamedTuple):
    """reason: '' for an answer that may be trained on, else one of REASONS; detail: in words."""

    reason: str = ""
    detail: str = ""


class GradingPool:
    """Grading processes that several threads share."""

    def __init__(self, grader: str, seconds: float, size: int | None = None) -> None:
        self.size = size or min(8, len(os.sched_getaffinity(0)))
        self._all = [GradingProcess(grader, seconds) for _ in range(self.size)]
        self._free: queue.SimpleQueue[GradingProcess] = queue.SimpleQueue()
        for process in self._all:
            self._free.put(process)

    def grade(self, response: str, answer: str) -> Grade:
        """As GradingProcess.grade."""
        return self._with(lambda process: process.grade(response, answer))

    def answer_fault(self, answer: str) -> str:
        """As GradingProcess.answer_fault."""
        return self._with(lambda process: process.answer_fault(answer))

    def close(self) -> None:
        """End all of them."""
        for process in self._all:
            process.close()

    def _with(self, use: Callable[[GradingProcess], Any]) -> Any:
        process = self._free.get()
        try:
            return use(process)
        finally:
            self._free.put(process)


def judge(reply: Mapping[str, Any], answer: str, grading: GradingPool | None, against: Against | None) -> Verdict:
    """The verdict on a stored reply (see `answer_file`); answer: the reference."""
    if reply["outcome"] != "answered":
        return Verdict("failed", str(reply.get("error", "")))
    if reply["finish"] == "length":
        return Verdict("truncated", f"{reply.get('completion_tokens')} tokens")
    text = reply["content"] or ""
    if against and (hits := against.find([{"role": "assistant", "content": text}])):
        return Verdict("leaked", against.describe(hits))
    return judge_text(text, answer, grading)


def judge_text(text: str, answer: str, grading: GradingPool | None) -> Verdict:
    """Right, wrong, or not to be graded."""
    if grading is None:
        return Verdict()
    grade = grading.grade(text, answer)
    if grade.outcome == "timeout":
        return Verdict("unverifiable", "the grader hangs or crashes on it")
    if grade.outcome == "error":
        return Verdict("unverifiable", f"the grader raises: {grade.error}")
    return Verdict() if grade.score >= 1 else Verdict("wrong", f"score {grade.score:g}, it ends in {text[-60:]!r}")
