"""Stores made on the fly: from logits with float64 formulas of their own, or from given numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eaft_verl.analysis.store import COLUMNS, META, WRITTEN, TokenStore

FLOATS = ("logprob", "entropy", "full_entropy", "max_prob", "sum_p2", "top_k_mass")


def write_store(path: Path, *, vocab: int = 384, k: int = 20, origin: str = "data", keys: Any = None, **columns: Any):
    """A store of the given columns; those not given are plausible constants."""
    size = len(columns["token"])
    sample = np.asarray(columns.get("sample", np.zeros(size)), int)
    counts = np.arange(size) - np.searchsorted(sample, sample)
    given = {"sample": sample, "position": counts + 10, "argmax": np.zeros(size), "sum_p2": np.full(size, 0.5)}
    given |= {"max_prob": np.full(size, 0.9), "top_k_mass": np.ones(size)}
    given |= {"full_entropy": columns["entropy"], "role": ["assistant"] * size, "source": ["one"] * size}
    given |= columns
    arrays = [
        pa.array(np.asarray(given[f.name]) if f.type != COLUMNS.field("role").type else given[f.name]) for f in COLUMNS
    ]
    table = pa.table(dict(zip(COLUMNS.names, arrays, strict=True))).cast(COLUMNS)
    meta = {"schema": 1, "model": "org/<model>", "keys": keys or {"model": "m", "data": "d", "template": "t"}, "k": k}
    meta |= {"vocab": vocab, "origin": origin, "sampling": None, "samples": int(sample.max()) + 1, "tokens": size}
    path.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({META: json.dumps(meta)}), path / "tokens.parquet", **WRITTEN)
    return TokenStore(path)


def statistics(logits: np.ndarray, labels: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """Every column that a distribution decides, in float64 by the definitions; logits [T, V]."""
    prob = np.exp(logits - logits.max(axis=1, keepdims=True))
    prob /= prob.sum(axis=1, keepdims=True)
    top = np.sort(prob, axis=1)[:, ::-1][:, :k]
    share = top / top.sum(axis=1, keepdims=True)
    return {
        "token": labels,
        "logprob": np.log(prob[np.arange(len(labels)), labels]),
        "entropy": -(share * np.log(share)).sum(axis=1),
        "full_entropy": -(prob * np.log(prob)).sum(axis=1),
        "max_prob": prob.max(axis=1),
        "argmax": prob.argmax(axis=1),
        "sum_p2": (prob**2).sum(axis=1),
        "top_k_mass": top.sum(axis=1),
    }


def random_columns(samples: int, length: int, *, vocab: int = 384, k: int = 20, seed: int = 0) -> dict[str, np.ndarray]:
    """Tokens of a spread of sharpness; a third of the labels is drawn evenly, so that conflicts are among them."""
    rng = np.random.default_rng(seed)
    size = samples * length
    logits = rng.normal(size=(size, vocab)) * rng.uniform(0.1, 9, size=(size, 1))
    best = logits.argmax(axis=1)
    labels = np.where(rng.random(size) < 0.33, rng.integers(0, vocab, size), best)
    return statistics(logits, labels, k) | {"sample": np.repeat(np.arange(samples), length)}
