"""Training rows that contain what a benchmark asks: found by shared runs of 13 words.

A question is in a conversation if at least half of its words lie in runs of 13 consecutive words (GPT-3, arXiv
2005.14165, appendix C; lower case, without punctuation) that both share. One run alone, GPT-3's rule, finds mostly
phrases of the trade ("in rectangular coordinates to polar coordinates. Enter your answer in the form"); half of the
words is between the 20 % and 80 % by which Llama 2 (arXiv 2307.09288, A.6) calls a question not clean, or dirty. As
with GPT-3, runs that many questions share are boilerplate and do not count: here, those in more than a tenth of one
benchmark's questions, and in at least three. A question shorter than a run must stand there in whole, and one of fewer
than 8 words (GPT-3's shortest run) must be a whole user turn, because three words such as `2 + 3` are everywhere.
Digits and signs of arithmetic are words, or all sums would be one question.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from eaft_verl.errors import DataError

RUN, SHORTEST = 13, 8
_OPENING = 3  # words by which a run is looked for
COVERED = 0.5  # of a question's words
_SHARED_BY = 10  # a run in more than one of so many questions is boilerplate
_SHOWN = 20  # ids listed per benchmark
# Scripts without spaces between words: every character is one.
_CHARACTER = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CHARACTER}]|[^\W{_CHARACTER}]+|[-+*/=<>^%\u2212\u00d7\u00f7]")
_ASCII_WORD = re.compile("[0-9_a-z]+|[-+*/=<>^%]")  # the same of lower-case ASCII, in two thirds of the time

Words = tuple[str, ...]
Hit = tuple[str, int]  # benchmark, index of its question
Place = tuple[str, int, int]  # and index of a word in it


def words(text: str) -> list[str]:
    """The text's words, lower case: runs of letters and digits, single CJK characters, signs of arithmetic."""
    lower = text.lower()
    return (_ASCII_WORD if lower.isascii() else _WORD).findall(lower)


@dataclass(frozen=True)
class Against:
    """What training rows are compared with: questions by benchmark, and benchmarks whose questions are not known.

    policy: `warn` counts leaked rows in the manifest, `error` refuses the data set, `drop` rejects the rows.
    """

    questions: dict[str, list[str]]
    not_checked: dict[str, str] = field(default_factory=dict)
    policy: str = "warn"

    @property
    def key(self) -> str:
        """Sixteen hex digits, equal for equal questions."""
        return hashlib.sha256(
            json.dumps([RUN, SHORTEST, COVERED, self.questions], sort_keys=True).encode()
        ).hexdigest()[:16]

    @cached_property
    def _texts(self) -> dict[str, list[list[str]]]:
        return {name: [words(question) for question in questions] for name, questions in self.questions.items()}

    @cached_property
    def _places(self) -> dict[Words, list[Place]]:
        """Where each run of 13 words stands, boilerplate left out."""
        places: dict[Words, list[Place]] = {}
        for name, texts in self._texts.items():
            most = max(2, len(texts) // _SHARED_BY)
            common = Counter(run for text in texts for run in set(_runs(text)))
            for number, text in enumerate(texts):
                for start, run in enumerate(_runs(text)):
                    if common[run] <= most:
                        places.setdefault(run, []).append((name, number, start))
        return places

    @cached_property
    def _short(self) -> dict[Words, list[tuple[list[str], Hit]]]:
        """(all words, place) of questions shorter than a run, by their first SHORTEST words."""
        short: dict[Words, list[tuple[list[str], Hit]]] = {}
        for name, texts in self._texts.items():
            for number, text in enumerate(texts):
                if text and len(text) < RUN:
                    short.setdefault(tuple(text[:SHORTEST]), []).append((text, (name, number)))
        return short

    @cached_property
    def _openings(self) -> set[Words]:
        """First words of all runs and of all questions shorter than one."""
        return {run[:_OPENING] for run in (*self._places, *self._short)}

    def find(self, messages: Iterable[dict[str, Any]]) -> set[Hit]:
        """The questions that a conversation's user and assistant turns contain, as (benchmark, index)."""
        places, short, openings, found = self._places, self._short, self._openings, set[Hit]()
        covered: dict[Hit, set[int]] = {}
        for message in messages:
            if message["role"] not in ("user", "assistant"):
                continue
            text = words(message["content"])
            if message["role"] == "user" and len(text) < SHORTEST:
                found |= {hit for _, hit in short.get(tuple(text), ())}
            if openings.isdisjoint(_runs(text, _OPENING)):  # most turns
                continue
            for start, opening in enumerate(_runs(text, _OPENING)):
                if opening not in openings:  # most places: no longer run need be put together there
                    continue
                begun = short.get(tuple(text[start : start + SHORTEST]), ()) if start + SHORTEST <= len(text) else ()
                found |= {hit for asked, hit in begun if text[start : start + len(asked)] == asked}
                for name, number, at in places.get(tuple(text[start : start + RUN]), ()):
                    covered.setdefault((name, number), set()).update(range(at, at + RUN))
        return found | {hit for hit, marked in covered.items() if len(marked) >= COVERED * self._length(hit)}

    def _length(self, hit: Hit) -> int:
        return len(self._texts[hit[0]][hit[1]])

    def describe(self, hits: set[Hit]) -> str:
        """Which questions these are, for a message."""
        name, number = min(hits)
        more = f" and {len(hits) - 1} more" if len(hits) > 1 else ""
        return f"it contains question {number + 1} of {name} ({self.questions[name][number][:60]!r}){more}"

    def account(self, found: Sequence[tuple[str, set[Hit]]]) -> dict[str, Any]:
        """The manifest's `leakage`: by benchmark, questions checked and found, and the training rows they are in.

        found: (id of a training row, hits in it) of every row.
        """
        against = {}
        for name, questions in self.questions.items():
            rows = [row for row, hits in found if any(hit[0] == name for hit in hits)]
            asked = {number for _, hits in found for hit, number in hits if hit == name}
            against[name] = {"checked": len(questions), "hits": len(asked), "rows": len(rows), "ids": rows[:_SHOWN]}
        return {
            "key": self.key,
            "policy": self.policy,
            "run": RUN,
            "against": against,
            "not_checked": self.not_checked,
        }


def leakage_of(name: str, rows: Iterable[tuple[str, list[dict[str, Any]]]], against: Against) -> dict[str, Any]:
    """The manifest's `leakage` of rows (id, messages) that are prepared already.

    Raises DataError if there are hits and the policy is `error`, or `drop`, for which it is too late.
    """
    found = [(row, hits) for row, messages in rows if (hits := against.find(messages))]
    if found and against.policy != "warn":
        row, hits = found[0]
        raise DataError(
            f"{name}: {len(found)} rows contain questions of the benchmarks. Row {row}: {against.describe(hits)}. "
            "Prepare it anew with `eaft prepare ... --against RECIPE --leakage drop`, or set data.leakage=warn"
        )
    return against.account(found)


def summary(account: dict[str, Any]) -> list[str]:
    """Lines for the reader: what leaked, what was clean, what was not checked."""
    lines, clean = [], []
    verb = "left out" if account["policy"] == "drop" else "kept"
    for name, entry in account["against"].items():
        if not entry["hits"]:
            clean.append(f"{name} ({entry['checked']})")
            continue
        ids = ", ".join(entry["ids"][:3]) + (", ..." if entry["rows"] > 3 else "")
        lines.append(
            f"leakage: {entry['hits']} of {entry['checked']} questions of {name} are in {entry['rows']} training rows "
            f"({verb}): {ids}"
        )
    if clean:
        lines.append(f"leakage: no question found of {', '.join(clean)}")
    lines += [f"leakage: {name} not checked: {reason}" for name, reason in account["not_checked"].items()]
    return lines


def _runs(text: list[str], length: int = RUN) -> Iterable[Words]:
    return zip(*(text[start:] for start in range(length)), strict=False)
