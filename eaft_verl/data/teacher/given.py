"""Rows that have answers already, screened, verified and drawn like new ones; nobody is asked.

Two passes over the sources, so that the rows of 5 GB of trajectories are not all held.
"""

import heapq
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from eaft_verl.data.leakage import Against
from eaft_verl.data.spec import RowError
from eaft_verl.data.teacher.account import Account
from eaft_verl.data.teacher.asking import draw_order
from eaft_verl.data.teacher.prompts import Prompt, Screen, iter_prompts
from eaft_verl.data.teacher.spec import SynthesisSpec
from eaft_verl.data.teacher.verify import GradingPool, judge_text

_AT_A_TIME = 256  # rows that are graded side by side


def draw_given(spec: SynthesisSpec, against: Against | None, grading: GradingPool | None) -> Account:
    """The account of it, with the rows in the order of the draw."""
    account, screen = Account(), Screen(against, grading)
    kept: list[tuple[bytes, str, int]] = []
    waiting: list[Prompt] = []
    with ThreadPoolExecutor(grading.size if grading else 1) as threads:

        def settle() -> None:
            for prompt, fault in zip(waiting, threads.map(lambda one: _fault(one, grading), waiting), strict=True):
                account.answers[fault.kind if fault else "verified"] += 1
                if fault:
                    account.reject(prompt.source, prompt.row, fault.kind, str(fault))
                else:
                    kept.append((draw_order(spec.seed, prompt.key), prompt.source, prompt.row))
            waiting.clear()

        for found in iter_prompts(spec):
            fault = found[2] if isinstance(found, tuple) else _screened(screen, found, against)
            source, row = found[:2] if isinstance(found, tuple) else (found.source, found.row)
            account.read[source] += 1
            if fault:
                account.reject(source, row, fault.kind, str(fault))
            elif isinstance(found, Prompt):
                waiting.append(found)
            if len(waiting) == _AT_A_TIME:
                settle()
        settle()
    chosen = heapq.nsmallest(spec.rows, kept) if spec.rows else sorted(kept)
    account.drawn, account.not_drawn = len(chosen), len(kept) - len(chosen)
    account.rows = _rows(spec, [(source, row) for _, source, row in chosen])
    return account


def _screened(screen: Screen, prompt: Prompt, against: Against | None) -> RowError | None:
    try:
        if not prompt.given:
            raise RowError("format", "it has no answer, and nobody is asked (endpoint: null)")
        screen.check(prompt)
        if against and (hits := against.find(prompt.given)):
            raise RowError("leaked", against.describe(hits))
    except RowError as error:
        return error
    return None


def _fault(prompt: Prompt, grading: GradingPool | None) -> RowError | None:
    verdict = judge_text(prompt.given[-1]["content"], prompt.answer, grading)
    return RowError(verdict.reason, verdict.detail) if verdict.reason else None


def _rows(spec: SynthesisSpec, places: list[tuple[str, int]]) -> list[dict[str, Any]]:
    order = {place: number for number, place in enumerate(places)}
    rows: list[dict[str, Any]] = [{} for _ in places]
    for found in iter_prompts(spec):
        if isinstance(found, Prompt) and (at := order.get((found.source, found.row))) is not None:
            turns = found.messages if spec.keep_instruction else found.plain
            row = {"id": found.id, "messages": [*turns, *found.given], "answer": found.answer, "tools": found.tools}
            rows[at] = {key: value for key, value in row.items() if value not in ("", [])} | {"source": found.source}
    return rows
