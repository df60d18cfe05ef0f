"""Samples for people to look at: which ones, and their tokens with what the model says of each."""

from typing import Any

import numpy as np

from eaft_verl.analysis.blocks import candidates
from eaft_verl.analysis.store import TokenStore
from eaft_verl.analysis.survey import LEAST, Survey
from eaft_verl.data.parquet import Example
from eaft_verl.data.roles import inspect
from eaft_verl.data.show import visible
from eaft_verl.objectives import Eaft, normalized_entropy
from eaft_verl.tokens.stats import CONFLICT_PROB, LOW_ENTROPY, TokenStats

SHOWN = 320  # tokens of a sample
Row = dict[str, Any]


class Words:
    """What tokens look like on their own: text with marks for line breaks, so that nothing is invisible."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self._known, self.size = tokenizer, dict[int, str](), len(tokenizer)
        special = set(tokenizer.all_special_ids)
        self.special = special | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}

    def __call__(self, token: int) -> str:
        """The token's text."""
        if token not in self._known:
            text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False, skip_special_tokens=False)
            self._known[token] = visible(text)
        return self._known[token]

    def mask(self, vocab: int, which: str) -> Any:
        """[V] bool: `special`: control tokens. `numeric`: tokens that are digits."""
        found = np.zeros(vocab, bool)
        if which == "special":
            found[[token for token in self.special if token < vocab]] = True
            return found
        size = min(vocab, self.size)
        for token, text in enumerate(self.tokenizer.convert_ids_to_tokens(list(range(size)))):
            found[token] = text is not None and text.strip("\u0120\u2581 ").isdigit()
        return found


def worst(survey: Survey, count: int) -> dict[str, list[int]]:
    """{by: numbers of samples}: the highest mean loss, and the highest share of conflicts among other samples."""
    known = survey.numbers
    by_loss = known[np.argsort(-survey.mean_nll_S[known], kind="stable")][:count].tolist()
    rest = np.setdiff1d(known[survey.tokens_S[known] >= LEAST], by_loss)
    share = survey.conflicts_S[rest] / survey.tokens_S[rest]
    by_conflict = rest[np.argsort(-share, kind="stable")][: min(count, int((share > 0).sum()))].tolist()
    return {"loss": by_loss, "conflicts": by_conflict}


def sample(store: TokenStore, survey: Survey, number: int, words: Words, example: Example | None = None) -> Row:
    """A sample's tokens [{text, position, trained, role, prob, entropy, normalized, weight, expected, conflict}].

    weight: EAFT's; flags: what is odd about how the sample is trained. Without the prepared `example` there are none,
    and only the trained tokens are known. The first SHOWN tokens are given,
    from the first trained one on where the prompt is longer than that.
    """
    table = store.sample(number)
    columns = {name: table.column(name).to_numpy() for name in ("position", "token", "argmax")}
    prob, entropy, weight, normalized = _numbers(table, candidates(store))
    low = table.column("entropy").to_numpy() <= LOW_ENTROPY
    trained: list[Row] = [
        {
            "text": words(int(columns["token"][i])),
            "position": int(columns["position"][i]),
            "role": role or "",
            "prob": float(prob[i]),
            "entropy": float(entropy[i]),
            "normalized": float(normalized[i]),
            "weight": float(weight[i]),
            "expected": words(int(columns["argmax"][i])),
            "conflict": bool(low[i] and prob[i] < CONFLICT_PROB),
        }
        for i, role in enumerate(table.column("role").to_pylist())
    ]
    tokens = trained if example is None else _whole(example, {row["position"]: row for row in trained}, words)
    return {
        "sample": number,
        "id": example.id if example else str(number),
        "tokens": tokens[:SHOWN],
        "left_out": max(0, len(tokens) - SHOWN),
        "trained": len(trained),
        "nll": float(survey.mean_nll_S[number]),
        "conflicts": int(survey.conflicts_S[number]),
        "implausible": bool(survey.implausible_S[number]),
        "flags": list(inspect(words.tokenizer, example).flags) if example else [],
    }


def _numbers(table: Any, k: int) -> tuple[Any, Any, Any, Any]:
    import torch

    logprob, entropy = (torch.from_numpy(table.column(name).to_numpy().copy()) for name in ("logprob", "entropy"))
    stats = TokenStats(logprob, entropy, k)
    weight = Eaft(k=max(k, 2)).weight(stats)
    return logprob.exp().numpy(), entropy.numpy(), weight.numpy(), normalized_entropy(stats).numpy()


def _whole(example: Example, trained: dict[int, Row], words: Words) -> list[Row]:
    """All tokens of the example, the untrained ones with their text only."""
    found = [
        trained.get(place) or {"text": words(int(token)), "position": place}
        for place, token in enumerate(example.input_ids)
    ]
    first = min(trained, default=0)
    return found if first < SHOWN // 2 else found[first - SHOWN // 4 :]
