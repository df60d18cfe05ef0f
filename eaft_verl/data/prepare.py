"""`eaft prepare`: rows become NAME.parquet, which a trainer reads, and NAME.manifest.json, which accounts for them.

No row disappears silently. A row that cannot be trained on is rejected with its number and the reason; what a setting
decides (too long, control tokens, a template that changes turns) aborts, unless the setting says otherwise.
"""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eaft_verl.data.encode import check_tokenizer, encode, render, special_tokens
from eaft_verl.data.formats import to_messages
from eaft_verl.data.leakage import Against, Hit, leakage_of
from eaft_verl.data.parquet import Example, file_hash, read_examples, write_examples
from eaft_verl.data.sources import read_rows, source_hash
from eaft_verl.data.spec import DataSpec, RowError
from eaft_verl.data.validate import check_row
from eaft_verl.errors import ConfigError, DataError, RunError
from eaft_verl.files import read_json, write_json

SCHEMA = 1
_SHOWN = 5  # rows named in an error; the manifest lists all
_PROBES = (
    [{"role": "user", "content": "Wie? 3+4"}, {"role": "assistant", "content": "Sieben, 7."}],
    [{"role": "system", "content": "Kurz."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ja"}],
)


@dataclass
class Prepared:
    """Prepared data: its parquet file, the examples in it and its manifest."""

    path: Path
    examples: list[Example]
    manifest: dict[str, Any]

    @property
    def key(self) -> str:
        """sha256 of the parquet file: equal keys, equal training data."""
        return self.manifest["parquet_sha256"]


@dataclass
class _Outcome:
    """What became of the rows read so far."""

    examples: list[Example] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    first_row: dict[str, int] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    leaks: list[tuple[str, set[Hit]]] = field(default_factory=list)


def template_hash(tokenizer: Any) -> str:
    """sha256 of what decides an encoding: chat template, special tokens, and text and ids of two conversations."""
    check_tokenizer(tokenizer)
    parts: list[Any] = [tokenizer.chat_template, special_tokens(tokenizer)]
    for probe in _PROBES:
        try:
            text = render(tokenizer, probe) + render(tokenizer, probe[:-1], generate=True)
            parts.append([text, tokenizer(text, add_special_tokens=False)["input_ids"]])
        except RowError as error:  # a template without system turns
            parts.append(str(error))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def manifest_path(path: Path) -> Path:
    """NAME.parquet -> NAME.manifest.json."""
    return path.with_suffix(".manifest.json")


def prepare(spec: DataSpec, tokenizer: Any, out: Path, against: Against | None = None) -> Prepared:
    """Prepared data at `out` (NAME.parquet), made now or found there from the same source, settings and template.

    against: questions that the rows must not contain; the manifest's `leakage` says which do.
    Raises DataError if rows are refused (the first five are named) or none is left, or if `out` holds something else:
    prepared data is never overwritten. Half of an earlier write (no manifest) is no prepared data and is redone.
    """
    out = Path(out)
    if out.suffix != ".parquet":
        raise ConfigError(f"prepared data is written as NAME.parquet, got {out.name!r}")
    identity = _identity(spec, tokenizer, against)
    if manifest_path(out).exists() and out.exists():
        if differs := _differences(read_manifest(out), identity):
            raise DataError(
                f"{out} was prepared with another {', '.join(differs)} and is never overwritten; choose another "
                "output, or delete it and its manifest"
            )
        known = load_prepared(out, tokenizer)
        prepared = check_leakage(known, against)
        if prepared is not known:
            write_json(manifest_path(out), prepared.manifest)
        return prepared
    rows = read_rows(spec.source)[: spec.rows]
    outcome = _take_all(spec, tokenizer, rows, against)
    _raise_refused(spec, outcome)
    if not outcome.examples:
        raise DataError(f"{spec.source}: none of {len(rows)} rows is left. {_name_rows(outcome.rejected)}")
    write_examples(out, outcome.examples)
    manifest = {**identity, **_describe(spec, tokenizer, outcome, len(rows)), "parquet_sha256": file_hash(out)}
    if against:
        manifest["leakage"] = against.account(outcome.leaks)
    write_json(manifest_path(out), manifest)
    return Prepared(out, outcome.examples, read_manifest(out))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest beside NAME.parquet; DataError if it is missing, broken or of another version."""
    try:
        manifest = read_json(manifest_path(path))
    except RunError as error:
        raise DataError(f"{path} is not prepared data: {error}; run `eaft prepare`") from None
    if manifest.get("schema") != SCHEMA:
        raise DataError(
            f"{path} has manifest schema {manifest.get('schema')!r}, this version reads {SCHEMA}; delete both files "
            "and run `eaft prepare` again"
        )
    return manifest


def load_prepared(path: Path, tokenizer: Any | None = None) -> Prepared:
    """Prepared data as it was written; DataError if the file has changed or the tokenizer is not the one it is for."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist; run `eaft prepare`")
    manifest = read_manifest(path)
    if file_hash(path) != manifest["parquet_sha256"]:
        raise DataError(f"{path} is not the file its manifest describes; delete both and run `eaft prepare` again")
    if tokenizer is not None and template_hash(tokenizer) != manifest["template_hash"]:
        raise DataError(
            f"{path} is stale: it was encoded for {manifest['tokenizer']!r} with another chat template or vocabulary "
            f"than {tokenizer.name_or_path!r} has; prepare the data for this model under another name"
        )
    return Prepared(path, read_examples(path), manifest)


def check_leakage(prepared: Prepared, against: Against | None) -> Prepared:
    """The same data with the manifest's `leakage` up to date; DataError if `against` refuses what is in it."""
    if against is None:
        return prepared
    known = prepared.manifest.get("leakage", {})
    if (known.get("key"), known.get("policy")) == (against.key, against.policy):
        return prepared
    account = leakage_of(str(prepared.path), [(one.id, one.messages) for one in prepared.examples], against)
    return Prepared(prepared.path, prepared.examples, {**prepared.manifest, "leakage": account})


def _identity(spec: DataSpec, tokenizer: Any, against: Against | None) -> dict[str, Any]:
    """The manifest's keys that decide whether prepared data is the same."""
    return {
        "schema": SCHEMA,
        "source_sha256": source_hash(spec.source),
        "template_hash": template_hash(tokenizer),
        "spec": asdict(spec),
        "leakage_dropped": against.key if against and against.policy == "drop" else None,
    }


def _differences(manifest: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """Keys in which two preparations differ; equal content read from elsewhere is the same source."""
    old, new = ({**known, **known["spec"]} for known in (manifest, identity))
    return sorted(key for key, value in new.items() if key not in ("spec", "source") and old.get(key) != value)


def _take_all(spec: DataSpec, tokenizer: Any, rows: list[dict[str, Any]], against: Against | None) -> _Outcome:
    outcome, controls = _Outcome(), special_tokens(tokenizer)
    aborting = {"template"} | {
        kind
        for kind, policy in (
            ("over_long", spec.over_long),
            ("control_token", spec.control_tokens),
            ("leakage", against and against.policy),
        )
        if policy == "error"
    }
    for number, row in enumerate(rows, 1):
        try:
            _take(spec, tokenizer, controls, row, number, outcome, against)
        except RowError as error:
            entry = {"row": number, "kind": error.kind, "reason": str(error)}
            (outcome.refused if error.kind in aborting else outcome.rejected).append(entry)
    return outcome


def _take(
    spec: DataSpec,
    tokenizer: Any,
    controls: tuple[str, ...],
    row: dict[str, Any],
    number: int,
    outcome: _Outcome,
    against: Against | None,
) -> None:
    """Add the examples of one row to `outcome`; RowError says why there are none."""
    messages, extra = to_messages(row)
    messages, escaped = check_row(messages, controls, spec.control_tokens)
    tools = extra.get("tools")
    digest = hashlib.sha256(json.dumps([messages, tools], sort_keys=True).encode()).hexdigest()
    first = outcome.first_row.setdefault(digest, number)
    if first != number:
        raise RowError("duplicate", f"duplicate of row {first}")
    encoded = encode(tokenizer, messages, spec.max_length, spec.over_long, spec.turns, tools)
    name = extra.get("id", digest[:16])
    # An id must name one example: samples of two runs are matched by it.
    name = digest[:16] if name in outcome.ids else name
    if against and (hits := against.find(messages)):
        outcome.leaks.append((name, hits))
        if against.policy != "warn":
            raise RowError("leakage", against.describe(hits))
    outcome.ids.add(name)
    for ordinal, one in enumerate(encoded):
        outcome.examples.append(
            Example(
                id=f"{name}#{ordinal}" if len(encoded) > 1 else name,
                messages=messages[: one.turn + 1],
                input_ids=one.input_ids,
                loss_mask=one.loss_mask,
                answer=extra.get("answer"),
                tools=tools,
            )
        )
        outcome.counts.update(truncated=one.truncated, open_turns=one.open_turns)
    outcome.counts.update(kept=1, escaped_rows=escaped > 0, escaped_tokens=escaped)


def _raise_refused(spec: DataSpec, outcome: _Outcome) -> None:
    if not outcome.refused:
        return
    remedies = {
        "over_long": "set data.over_long=drop or truncate, or raise data.max_length",
        "control_token": "set data.control_tokens=escape or allow",
        "leakage": "remove these rows, or set data.leakage=drop to leave them out, warn to keep them",
    }
    kinds = sorted({entry["kind"] for entry in outcome.refused})
    remedy = "".join(f"; {remedies[kind]}" for kind in kinds if kind in remedies)
    raise DataError(f"{spec.source}: {len(outcome.refused)} rows are refused{remedy}. {_name_rows(outcome.refused)}")


def _name_rows(entries: list[dict[str, Any]]) -> str:
    shown = "".join(f"\n  row {entry['row']}: {entry['reason']}" for entry in entries[:_SHOWN])
    more = len(entries) - _SHOWN
    return f"Rows at fault:{shown}" + (f"\n  and {more} more" if more > 0 else "")


def _describe(spec: DataSpec, tokenizer: Any, outcome: _Outcome, read: int) -> dict[str, Any]:
    """The manifest's account of what was read and what came out."""
    lengths = sorted(len(example.input_ids) for example in outcome.examples)
    counts = {
        "read": read,
        "kept": outcome.counts["kept"],
        "rejected": dict(Counter(entry["kind"] for entry in outcome.rejected)),
        "truncated": outcome.counts["truncated"],
        "escaped": outcome.counts["escaped_rows"],
        "escaped_tokens": outcome.counts["escaped_tokens"],
        "open_turns": outcome.counts["open_turns"],
        "examples": len(outcome.examples),
    }
    edges = [2**power for power in range(lengths[-1].bit_length() + 1)]
    buckets = Counter(length.bit_length() - 1 for length in lengths)
    return {
        "tokenizer": tokenizer.name_or_path,
        "counts": counts,
        "tokens": {
            "total": sum(lengths),
            "trained": sum(sum(example.loss_mask) for example in outcome.examples),
        },
        "lengths": {
            "edges": edges,
            "counts": [buckets[power] for power in range(len(edges) - 1)],
            "p50": lengths[(len(lengths) + 1) // 2 - 1],
            "p95": lengths[-(-len(lengths) * 95 // 100) - 1],
            "max": lengths[-1],
        },
        "rejected": outcome.rejected,
    }
