"""The store of token statistics of an experiment's training data: made by whoever needs it first, then kept.

`eaft analyze` and arms that take thresholds or sample weights from the base model find it under the same name and keys,
so the pass over the data runs once.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from eaft_verl.analysis.store import COLUMNS, TokenStore, stored_once
from eaft_verl.data.parquet import Example, trained_of
from eaft_verl.data.roles import ROLES, inspect
from eaft_verl.models import load_config, resolve_model
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.views import objective_of, own_rows
from eaft_verl.tokens.stats import BaseStats
from eaft_verl.training.progress import Progress
from eaft_verl.training.sft.order import PADDING, sequential_batches

KEYS = ("model", "data", "template")
PART_TOKENS = 1 << 15  # trained tokens after which a part is whole: what a kill costs


def store_path(config: Config, k: int) -> Path:
    """Where the statistics of the experiment's training data are."""
    return Path(config.output) / "data" / f"token_stats_k{k}{own_rows(config)}"


def vocabulary_size(model: Path | str) -> int:
    """Logits per token of a resolved model."""
    return int(load_config(model).get_text_config().vocab_size)


def identity(config: Config, keys: dict[str, str], k: int, examples: Sequence[Example]) -> dict[str, Any]:
    """The store's metadata for the training data."""
    vocab = vocabulary_size(resolve_model(config.model))
    chosen = {name: keys[name] for name in KEYS}
    known = {"model": config.model, "keys": chosen, "k": min(k, vocab), "vocab": vocab}
    return {**known, "origin": "data", "sampling": None, "samples": len(examples)}


def base_of(
    config: Config, keys: dict[str, str], examples: Sequence[Example], tokenizer: Any, infer: Callable[..., Any]
) -> tuple[BaseStats, float]:
    """What the base model says of the training data, stored or from a pass of `infer`, and the seconds of that pass."""
    from eaft_verl.analysis.base import base_stats  # torch

    k = objective_of(config).k
    meta = identity(config, keys, k, examples)
    store = fill(store_path(config, k), meta, examples, tokenizer, config.verl.data.train_batch_size, infer)
    return base_stats(store), float(store.meta["seconds"])


def store_base(config: Config, keys: dict[str, str], examples: Sequence[Example], tokenizer: Any, model: str) -> None:
    """Make the store from the base model itself, for an arm whose workers hold another one."""
    from eaft_verl.training.sft.inference import token_statistics

    k = objective_of(config).k
    if not (store_path(config, k)).exists():
        with token_statistics(config, model, k) as infer:
            base_of(config, keys, examples, tokenizer, partial(infer, examples))


def fill(
    path: Path, meta: dict[str, Any], examples: Sequence[Example], tokenizer: Any, size: int, infer: Callable[..., Any]
) -> TokenStore:
    """The store at `path`, its missing parts from `infer` over batches of `size` rows."""
    parts = _parts(examples, size)
    label, total = f"statistics of {path.name}", sum(map(len, parts))
    progress: list[Progress] = []

    def make(part: int) -> pa.Table:
        begin = sum(map(len, parts[:part]))
        if not progress:
            progress.append(Progress(label, total, begin))
        tables = []
        for number, indices in enumerate(parts[part], begin + 1):
            started = time.monotonic()
            tables.append(_table(examples, indices, tokenizer, infer))
            progress[0].update(number, {"tokens_per_s": len(tables[-1]) / (time.monotonic() - started)})
        return pa.concat_tables(tables)

    try:
        return stored_once(path, meta, len(parts), make, plan=[len(part) for part in parts] + [size])
    finally:
        for shown in progress:
            shown.close()


def _parts(examples: Sequence[Example], size: int) -> list[list[list[int]]]:
    """Batches of rows, in parts of about PART_TOKENS trained tokens."""
    parts: list[list[list[int]]] = []
    trained, tokens = trained_of(examples), PART_TOKENS
    for indices in sequential_batches(len(examples), size):
        if tokens >= PART_TOKENS:
            parts.append([])
            tokens = 0
        parts[-1].append(indices)
        tokens += int(trained[[index for index in indices if index != PADDING]].sum())
    return parts


def _table(examples: Sequence[Example], indices: list[int], tokenizer: Any, infer: Callable[..., Any]) -> pa.Table:
    """The store's rows of one batch."""
    chosen = [examples[index] for index in indices if index != PADDING]
    with ThreadPoolExecutor(1) as beside:  # texts are cut while the model computes
        waiting = beside.submit(lambda: [inspect(tokenizer, example).roles for example in chosen])
        output = infer(indices)
    from eaft_verl.training.sft.token_pass import statistics_of  # the engine chooses verl's platform first

    columns: dict[str, Any] = dict(statistics_of(examples, indices, output))
    masks = [np.asarray(example.loss_mask, bool) for example in chosen]
    for mask in masks:
        mask[:1] = False
    roles = [found[mask] for found, mask in zip(waiting.result(), masks, strict=True)]
    columns["role"] = _named(np.concatenate(roles), list(ROLES))
    names = list(dict.fromkeys(example.source or "" for example in chosen))
    of = np.repeat([names.index(example.source or "") for example in chosen], [int(mask.sum()) for mask in masks])
    columns["source"] = _named(of, names)
    return pa.table({name: columns[name] for name in COLUMNS.names}, schema=COLUMNS)


def _named(codes: Any, names: list[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), names)
