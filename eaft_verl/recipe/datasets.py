"""The data sets of an experiment, prepared once in its folder and shared by every stage and arm."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from eaft_verl.data.account import check_rejected, rows_used
from eaft_verl.data.formats import to_messages
from eaft_verl.data.leakage import Against, summary
from eaft_verl.data.prepare import (
    Prepared,
    check_leakage,
    load_prepared,
    manifest_path,
    prepare,
    read_manifest,
    source_hashes,
)
from eaft_verl.data.sources import at_hand, iter_rows
from eaft_verl.data.spec import Columns, RowError, Source, sources_of
from eaft_verl.errors import DataError
from eaft_verl.evaluation.questions import QUESTION_FIELDS, benchmark_questions
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.views import data_spec, evaluate_settings, own_rows, source_of


def prepare_data(config: Config, tokenizer: Any, which: str) -> Prepared:
    """The recipe's 'train' or 'heldout' data, prepared in OUTPUT/data unless the source is prepared already.

    Training data is compared with the recipe's benchmarks and held-out data: what is found is printed to stderr and
    stands in the manifest's `leakage`, or is refused or left out, as `data.leakage` says. How many rows are used is
    printed there too; DataError if more than `data.max_rejected` of them are faulty.
    """
    against = recipe_questions(config) if which == "train" else None
    out, limit = prepared_path(config, which), config.data.max_rejected
    if out == Path(str(source_of(config, which))).expanduser():
        prepared = check_leakage(load_prepared(out, tokenizer), against)
        check_rejected(prepared.manifest, limit)
    else:
        prepared = prepare(data_spec(config, which), tokenizer, out, against, limit)
    print(f"data.{which}: {rows_used(prepared.manifest)}", file=sys.stderr, flush=True)
    if against and any(entry["hits"] for entry in prepared.manifest["leakage"]["against"].values()):
        print("\n".join(summary(prepared.manifest["leakage"])), file=sys.stderr)
    return prepared


def recipe_questions(config: Config, policy: str | None = None) -> Against:
    """What a recipe's training data must not contain: its benchmarks' questions and its held-out rows' user turns."""
    known, unknown = benchmark_questions(evaluate_settings(config))
    if config.data.heldout:
        known["heldout"] = _questions(data_spec(config, "heldout").sources)
    return Against(known, unknown, policy or config.data.leakage)


def leaked(config: Config, source: str, columns: Columns | None) -> list[tuple[int, str]]:
    """(number from 1, what it holds) of the rows of a source that contain questions of benchmarks or held-out data."""
    against, found = recipe_questions(config), []
    for number, row in enumerate(iter_rows(source), 1):
        try:
            messages, _ = to_messages(row, columns)
        except RowError:
            continue  # a faulty row is left out when the data is prepared, or stops that
        if hits := against.find(messages):
            found.append((number, against.describe(hits)))
    return found


def file_questions(source: str, policy: str) -> Against:
    """The questions of any data source, one per row; DataError if no row has one."""
    questions = _questions(sources_of(source))
    if not questions:
        raise DataError(f"{source} has no questions; rows need messages, or one of {', '.join(QUESTION_FIELDS)}")
    return Against({source: questions}, {}, policy)


def _questions(sources: Iterable[Source]) -> list[str]:
    rows = ((row, one.columns) for one in sources for row in islice(iter_rows(one.source), one.rows))
    return [question for row, columns in rows if (question := question_of(row, columns))]


def question_of(row: dict[str, Any], columns: Columns | None = None) -> str:
    """What a row asks: its last user turn, or its question field where it is no training row; '' if it asks nothing."""
    try:
        messages, _ = to_messages(row, columns)
    except RowError:
        keys = [columns["prompt"]] if columns and columns.get("prompt") else QUESTION_FIELDS
        return next((row[key] for key in keys if isinstance(row.get(key), str)), "")
    return next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")


def prepared_path(config: Config, which: str) -> Path:
    """Where a data set is once it is prepared: its source, where that is prepared data, else in OUTPUT/data."""
    source = Path(str(source_of(config, which))).expanduser()
    if source.suffix == ".parquet" and manifest_path(source).exists():
        return source
    own = own_rows(config) if which == "train" else ""
    return Path(config.output) / "data" / f"{which}{own}.parquet"


def prepared_otherwise(config: Config, which: str) -> list[str]:
    """'data.key=asked (prepared with stated)' for what prepared data named as a source decides otherwise."""
    if not source_of(config, which) or prepared_path(config, which) != Path(str(source_of(config, which))).expanduser():
        return []
    stated, asked = read_manifest(prepared_path(config, which), "spec")["spec"], asdict(data_spec(config, which))
    name = {"rows": "heldout_rows"} if which == "heldout" else {}
    return [
        f"data.{name.get(key, key)}={value} (prepared with {stated.get(key)})"
        for key, value in asked.items()
        if key not in ("source", "sources") and value != stated.get(key)
    ]


def changed_content(config: Config, which: str, keys: Mapping[str, str]) -> list[str]:
    """What is no longer in a data set as it was prepared here; nothing where it was not, or lies on a hub."""
    spec, prepared = data_spec(config, which), prepared_path(config, which)
    if not manifest_path(prepared).exists():
        return []
    sources = [one.source for one in spec.sources]
    if sources == [str(source_of(config, which))] and prepared == Path(sources[0]).expanduser():
        same = which != "train" or read_manifest(prepared, "parquet_sha256")["parquet_sha256"] == keys["data"]
    else:
        readable = all(map(at_hand, sources))
        same = not readable or read_manifest(prepared, "source_sha256")["source_sha256"] == source_hashes(spec)
    return [] if same else [f"data.{which}: {', '.join(sources)} holds other rows"]
