"""Where conflicts are and of what kind: by source, role and place, by label, and by (label, what was expected).

Kinds of a confident conflict, the first that holds:
template  inserted by the chat template (role `template`), or a special token
noise     in a sample most of whose tokens the model finds implausible (`Survey.implausible_S`)
habit     a label that is a conflict in many samples and is no number, or the first token of a turn where the model
          expects the same opening in many: format, style. A first token where it expects another one each time is none:
          an answer of one word
content   the rest: single tokens the model is sure of otherwise, in text that it finds plausible: facts, names, numbers
"""

import math
from typing import Any

import numpy as np

from eaft_verl.analysis.blocks import BRANCHING, CONFLICT, REGIMES, SETTLED, Array, Block
from eaft_verl.analysis.survey import Survey

KINDS = ("template", "noise", "habit", "content")
PLACES = ("1st", "2nd", "3rd-4th", "5th-8th", "9th-16th", "17th-32nd", "33rd-64th", "65th-128th", "later")
_PLACE = np.ceil(np.log2(np.arange(1, 130))).astype(np.intp)  # index into PLACES, of tokens before it in its turn
CLOUDS = (BRANCHING, SETTLED, CONFLICT)  # Fig. 7 a, b, c
TEXTS = ("source", "role")
_WAITING, _KEPT = 1 << 20, 1 << 20  # conflicts counted at once; pairs kept, the rarest forgotten
Row = dict[str, Any]


class Breakdown:
    """Sums over blocks; `numeric_V`: labels whose text is a number; `special_V`: control tokens of the tokenizer."""

    def __init__(self, survey: Survey, numeric_V: Array, special_V: Array) -> None:
        self._survey, self._special_V = survey, special_V
        self._habit_V = survey.repeated_V & ~numeric_V
        self.texts: dict[str, dict[str, int]] = {name: {} for name in TEXTS}
        self._tally = np.zeros((3, 0, 0, len(PLACES), len(REGIMES)))  # tokens, nll, error by source, role, place
        self._kinds = np.zeros((3, len(KINDS)))
        self._content_S = np.zeros(len(survey.tokens_S))
        self._first = [np.zeros((4, 0))]  # sample, expected token, error, max_prob of conflicts that open a turn
        self._labels_CV = np.zeros((3, len(CLOUDS) * survey.vocab))
        self._places = np.full(len(REGIMES), -1)
        self._places[list(CLOUDS)] = range(len(CLOUDS))
        self._pairs, self._waiting = (np.zeros(0, np.int64), np.zeros(0, np.int64)), [np.zeros(0, np.int64)]

    def add(self, block: Block) -> None:
        """Count a block."""
        place_T = _PLACE[np.minimum(block.place_T, len(_PLACE) - 1)]
        codes = (*map(block.codes, TEXTS), place_T, block.regime_T)
        shape = (*(len(self.texts[name]) for name in TEXTS), len(PLACES), len(REGIMES))
        cell_T, cells = np.ravel_multi_index(codes, shape), math.prod(shape)
        columns = (None, -block["logprob"], block.error_T)
        found = [np.bincount(cell_T, weight_T, minlength=cells) for weight_T in columns]
        self._tally = _sum(self._tally, np.reshape(found, (len(found), *shape)))
        self._add_labels(block)
        self._add_conflicts(block)

    def _add_labels(self, block: Block) -> None:
        place_T = self._places[block.regime_T]
        chosen = np.flatnonzero(place_T >= 0)
        index = place_T[chosen] * self._survey.vocab + block["token"][chosen]
        for sums, weight in zip(self._labels_CV, (None, block["entropy"], block.prob_T), strict=True):
            sums += np.bincount(index, weight if weight is None else weight[chosen], minlength=len(sums))

    def _add_conflicts(self, block: Block) -> None:
        rows = block.conflicts
        sample, token = block["sample"][rows], block["token"][rows]
        template = self._special_V[token]
        if "template" in self.texts["role"]:
            template = template | (block.codes("role")[rows] == self.texts["role"]["template"])
        rules = (template, self._survey.implausible_S[sample], self._habit_V[token])
        kind = np.select(rules, range(len(rules)), len(rules))
        columns_4C = np.array([sample, block["argmax"][rows], block.error_T[rows], block["max_prob"][rows]], np.float64)
        opening = (kind == KINDS.index("content")) & (block.place_T[rows] == 0)
        self._first.append(columns_4C[:, opening])
        kind, columns_4C = kind[~opening], columns_4C[:, ~opening]
        for sums, weight in zip(self._kinds, (None, *columns_4C[2:]), strict=True):
            sums += np.bincount(kind, weight, minlength=len(KINDS))
        content = columns_4C[0, kind == KINDS.index("content")].astype(np.int64)
        self._content_S += np.bincount(content, minlength=len(self._content_S))
        self._waiting.append(token.astype(np.int64) * self._survey.vocab + block["argmax"][rows])
        if sum(map(len, self._waiting)) > _WAITING:
            self._merge()

    def _merge(self) -> None:
        keys, counts = np.unique(np.concatenate(self._waiting), return_counts=True)
        both, index = np.unique(np.concatenate([self._pairs[0], keys]), return_inverse=True)
        total = np.bincount(index, np.concatenate([self._pairs[1], counts])).astype(np.int64)
        kept = np.argsort(-total, kind="stable")[:_KEPT]
        self._pairs, self._waiting = (both[kept], total[kept]), [np.zeros(0, np.int64)]

    def clouds(self) -> dict[str, dict[str, Array]]:
        """{regime: {count, mean_entropy, mean_prob: [V]}}."""
        found = self._labels_CV.reshape(3, len(CLOUDS), self._survey.vocab)
        return {
            REGIMES[regime]: {
                "count": found[0, i].astype(np.int64),
                "mean_entropy": found[1, i] / np.maximum(found[0, i], 1),
                "mean_prob": found[2, i] / np.maximum(found[0, i], 1),
            }
            for i, regime in enumerate(CLOUDS)
        }

    def pairs(self, count: int) -> list[tuple[int, int, int]]:
        """The most frequent conflicts: (label, the token expected instead, how often)."""
        self._merge()
        keys, counts = (part[:count].tolist() for part in self._pairs)
        return [(*divmod(key, self._survey.vocab), times) for key, times in zip(keys, counts, strict=True)]

    def result(self) -> Row:
        """Tables by source, role and place; of every kind its share of the conflicts and of their gradient."""
        survey, (kinds, content_S) = self._survey, self._with_openings()
        conflicts = kinds[0].sum()
        repeated = np.sort(self.clouds()[REGIMES[CONFLICT]]["count"])[::-1]
        return {
            **{f"by_{name}": self._table(name) for name in (*TEXTS, "place")},
            "kinds": {
                kind: {
                    "tokens": int(kinds[0, i]),
                    "share": float(kinds[0, i] / max(conflicts, 1)),
                    "error": float(kinds[1, i]),
                    "mean_max_prob": float(kinds[2, i] / max(kinds[0, i], 1)),
                }
                for i, kind in enumerate(KINDS)
            },
            "samples": survey.samples,
            "samples_with_conflict": int((survey.conflicts_S > 0).sum()),
            "samples_with_content": int((content_S > 0).sum()),
            "samples_implausible": int(survey.implausible_S.sum()),
            "tokens_implausible": int(survey.tokens_S[survey.implausible_S].sum()),
            "conflicts_implausible": int(survey.conflicts_S[survey.implausible_S].sum()),
            "labels_in_conflict": int((repeated > 0).sum()),
            "top10_labels_share": float(repeated[:10].sum() / max(conflicts, 1)),
        }

    def _with_openings(self) -> tuple[Array, Array]:
        """(sums by kind, conflicts of content by sample), the conflicts that open a turn among them."""
        first_4F = np.concatenate(self._first, axis=1)
        sample_F, expected_F = first_4F[:2].astype(np.int64)
        habit_F = np.bincount(expected_F, minlength=self._survey.vocab)[expected_F] >= self._survey.often
        kinds = self._kinds.copy()
        for kind, chosen_F in (("habit", habit_F), ("content", ~habit_F)):
            kinds[:, KINDS.index(kind)] += [chosen_F.sum(), *first_4F[2:, chosen_F].sum(axis=1)]
        content_S = np.bincount(sample_F[~habit_F], minlength=len(self._content_S))
        return kinds, self._content_S + content_S

    def _table(self, name: str) -> list[Row]:
        words = PLACES if name == "place" else tuple(self.texts[name])
        axes = [1 + i for i, other in enumerate((*TEXTS, "place")) if other != name]
        by_3CR = self._tally.sum(axis=tuple(axes))
        rows = []
        for word, (tokens, nll, error), conflicts in zip(
            words, by_3CR.sum(axis=-1).T.tolist(), by_3CR[0, :, CONFLICT].tolist(), strict=True
        ):
            if tokens:
                means = {"nll": nll / tokens, "error": error / tokens}
                rows.append({name: word, "tokens": int(tokens), "conflicts": int(conflicts), **means})
        return rows


def _sum(left: Array, right: Array) -> Array:
    """Sum of two tables, each axis as long as the longer one's."""
    total = np.zeros(np.maximum(left.shape, right.shape))
    for part in (left, right):
        total[tuple(map(slice, part.shape))] += part
    return total
