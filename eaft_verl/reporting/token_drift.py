"""How the KL to the base is spread over tokens: a mean hides whether few moved far or all a little."""

import zlib
from typing import Any

import numpy as np

from eaft_verl.pages.statistics import LEVEL, Floats, clustered_quantiles
from eaft_verl.reporting.collect import Arm, RunData

Row = dict[str, Any]
POINTS = (0.5, 0.95, 0.99)
TEXTS = {"drift": "general text", "drift_task": "the task's prompts"}
RESAMPLES = 1000


def token_drift(arms: list[Arm], seed: int) -> list[Row]:
    """[{arm, text, tokens, mean, agreement, quantiles: [{point, value, low, high}]}] at the end of every arm.

    text: 'drift' or 'drift_task'. Of several seeds the tokens of all are taken together, those of an example staying
    together in the resamples; the intervals are over examples only.
    """
    found = []
    for arm in arms:
        for name in TEXTS:
            rows = [_tokens(run, name) for run in arm.runs]
            if not rows or any(row is None for row in rows):
                continue
            values, owners = (np.concatenate(part) for part in zip(*(row for row in rows if row), strict=True))
            rng = np.random.default_rng([seed, zlib.crc32(f"{arm.name} {name}".encode())])
            drawn = clustered_quantiles(values, owners, POINTS, RESAMPLES, rng)
            low, high = np.percentile(drawn[1:], [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=0)
            records = [run.evals[run.step][name]["metrics"] for run in arm.runs]
            means = {key: float(np.mean([one[key]["score"] for one in records])) for key in ("kl", "agreement")}
            quantiles = [
                {"point": point, "value": float(value), "low": float(lower), "high": float(upper)}
                for point, value, lower, upper in zip(POINTS, drawn[0], low, high, strict=True)
            ]
            row = {"arm": arm.name, "text": name, "tokens": len(values), "mean": means["kl"]}
            found.append({**row, "agreement": means["agreement"], "quantiles": quantiles})
    return found


def _tokens(run: RunData, name: str) -> tuple[Floats, Any] | None:
    """(KL of every token, number of the example it belongs to) of a run's end; None where it was not kept."""
    if name not in run.evals.get(run.step, {}):
        return None
    samples = run.samples(run.step, name)
    if not samples or any("kl_T" not in sample for sample in samples.values()):
        return None
    parts = [np.asarray(samples[key]["kl_T"], dtype=np.float64) for key in sorted(samples)]
    return np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])
