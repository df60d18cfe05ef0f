"""Which tokens of a rendered conversation are trained."""

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Span:
    """A trained turn, in characters: [prompt, start) is inserted, [start, body) content, [body, end) end of turn."""

    prompt: int
    start: int
    body: int
    end: int


def loss_mask(text: str, offsets: Any, spans: list[Span]) -> "array[int]":
    """1 for each token whose characters lie inside one of the spans (in order); a token across a border is not trained.

    Two borders are soft, because only the model can have written such a token: white space that the template puts
    between the generation prompt and the content may be merged into the content's first token (" The"), and an
    end-of-turn token may swallow the white space after it (Phi-3's <|end|>).
    """
    mask = np.zeros(len(offsets), np.int8)
    lefts, rights = np.asarray(offsets, np.int64).reshape(-1, 2).T
    empty = np.flatnonzero(lefts >= rights).tolist()
    for span in spans:
        # Offsets grow: only the first token can begin before the span, and only the last ones can end behind it.
        first, whole = np.searchsorted(rights, (span.start, span.end), side="right").tolist()
        past = int(np.searchsorted(lefts, span.end))
        whole = min(whole, max(first, past))
        mask[first:whole] = 1
        for index in {first, *range(whole, past), *empty}:
            if first <= index < past:
                mask[index] = _inside(text, lefts, rights, index, span)
    mask[:1] = 0
    return array("b", mask.tobytes())


def _inside(text: str, lefts: Any, rights: Any, index: int, span: Span) -> bool:
    """Whether a token that may lie across a border of the span belongs to it."""
    left, right = int(lefts[index]), int(rights[index])
    before = max(rights[max(index - 4, 0) : index].tolist(), default=0)
    # A byte-level tokenizer may report the offsets of " a" without the space, which the token nevertheless holds.
    if before < left and text[before:left].isspace():
        left = before
    if right <= left or right <= span.start or left >= span.end:
        return False
    starts = left >= span.start or (left >= span.prompt and text[left : span.start].isspace())
    closes = left >= span.body and span.body < span.end and not text[span.end : right].strip()
    return starts and (right <= span.end or closes)
