"""`eaft prepare`: rows become NAME.parquet, which a trainer reads, and NAME.manifest.json, which accounts for them.

No row disappears silently. A row that cannot be trained on is rejected with its number and the reason; what a setting
decides (too long, control tokens, a template that changes turns) aborts, unless the setting says otherwise.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eaft_verl.boundary import masked
from eaft_verl.data.accept import Taker
from eaft_verl.data.account import check_rejected, describe, raise_refused
from eaft_verl.data.encode import check_tokenizer, render, special_tokens
from eaft_verl.data.leakage import Against, leakage_of
from eaft_verl.data.parquet import Example, Examples, file_hash, read_examples, write_batches
from eaft_verl.data.sources import source_hash
from eaft_verl.data.spec import DataSpec, RowError
from eaft_verl.data.take import take_all
from eaft_verl.errors import ConfigError, DataError, RunError
from eaft_verl.files import read_json, write_json

__all__ = [
    "Example",
    "Prepared",
    "check_leakage",
    "load_prepared",
    "manifest_path",
    "prepare",
    "source_hashes",
    "template_hash",
]
SCHEMA = 1
_ANEW = "prepare the data under another name, or delete both files, if `eaft prepare` made them, and run it again"
_KEYS: dict[str, type | tuple[type, ...]] = {  # that others read, dotted
    **dict.fromkeys(("spec", "counts", "tokens", "lengths", "counts.rejected"), dict),
    **dict.fromkeys(("counts.read", "counts.kept", "counts.examples", "tokens.total", "tokens.trained"), int),
    **dict.fromkeys(("parquet_sha256", "template_hash", "tokenizer"), str),
    **{"rejected": list, "source_sha256": (str, list), "lengths.max": int, "lengths.edges": list},
}
_PROBES = (
    [{"role": "user", "content": "Wie? 3+4"}, {"role": "assistant", "content": "Sieben, 7."}],
    [{"role": "system", "content": "Kurz."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ja"}],
)


@dataclass
class Prepared:
    """Prepared data: its parquet file, the examples in it and its manifest."""

    path: Path
    examples: Examples
    manifest: dict[str, Any]

    @property
    def key(self) -> str:
        """sha256 of the parquet file: equal keys, equal training data."""
        return self.manifest["parquet_sha256"]


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


def prepare(
    spec: DataSpec, tokenizer: Any, out: Path, against: Against | None = None, max_rejected: float = 1.0
) -> Prepared:
    """Prepared data at `out` (NAME.parquet), made now or found there from the same source, settings and template.

    against: questions that the rows must not contain; the manifest's `leakage` says which do. max_rejected: share of
    the rows of a source that may be faulty and left out.
    Raises DataError if more of them are faulty, if rows are refused (the first five are named) or none is left, or if
    `out` holds something else:
    nothing is ever overwritten, least of all a source. The manifest is written first, so that a file without one is
    somebody else's; a manifest alone is half of an earlier write, which is redone.
    """
    out = Path(out)
    _require_free(spec, out)
    identity = _identity(spec, tokenizer, against)
    if manifest_path(out).exists() and out.exists():
        if differs := _differences(read_manifest(out), identity):
            raise DataError(
                f"{out} was prepared with another {', '.join(differs)} and is never overwritten; choose another "
                "output, or delete it and its manifest"
            )
        known = load_prepared(out, tokenizer)
        check_rejected(known.manifest, max_rejected)
        prepared = check_leakage(known, against)
        if prepared is not known:
            write_json(manifest_path(out), prepared.manifest)
        return prepared
    with take_all(Taker(spec, tokenizer, against), out) as outcome:
        raise_refused(spec, outcome)
        manifest = {**identity, **describe(tokenizer, outcome)}
        check_rejected(manifest, max_rejected)
        if against:
            manifest["leakage"] = against.account(outcome.leaks)

        def account(key: str) -> None:
            write_json(manifest_path(out), {**manifest, "parquet_sha256": key})

        key = write_batches(out, outcome.batches, account)
    return Prepared(out, read_examples(out, key), read_manifest(out))


def _require_free(spec: DataSpec, out: Path) -> None:
    """DataError unless `out` and its manifest are free or ours, and `out` is no part of what is read."""
    if out.suffix != ".parquet":
        raise ConfigError(f"prepared data is written as NAME.parquet, got {out.name!r}")
    manifest = manifest_path(out)
    if os.path.lexists(out) and not manifest.exists():
        raise DataError(
            f"{out} exists and was not made by `eaft prepare` (there is no {manifest.name}); nothing is overwritten: "
            "choose another output"
        )
    if os.path.lexists(manifest):
        read_manifest(out)
    for source in spec.sources:
        folder = Path(source.source).expanduser()
        if folder.is_dir() and folder.resolve() in out.resolve().parents:
            raise DataError(
                f"{out} lies in its own source {folder}, of which it would be a part; choose another output"
            )


def read_manifest(path: Path, *needed: str) -> dict[str, Any]:
    """The manifest beside NAME.parquet; DataError if it is missing, somebody else's, of another version or damaged.

    needed: keys that must be there, dotted; all by default.
    """
    file = manifest_path(path)
    if not file.exists():
        raise DataError(f"{path} is not prepared data: {file} does not exist; run `eaft prepare`")
    try:
        manifest = read_json(file)
    except RunError as error:
        raise DataError(f"{str(error).partition(';')[0]}; {_ANEW}") from None
    if not isinstance(manifest, dict) or "schema" not in manifest:
        raise DataError(f"{file} is no manifest of `eaft prepare`; {_ANEW}")
    if manifest["schema"] != SCHEMA:
        raise DataError(f"{path} has manifest schema {manifest['schema']!r}, this version reads {SCHEMA}; {_ANEW}")
    if lacking := [key for key in needed or _KEYS if not isinstance(_inside(manifest, key), _KEYS[key])]:
        raise DataError(f"{file} is damaged or of another kind: {lacking[0]} is missing or wrong; {_ANEW}")
    return manifest


def _inside(manifest: dict[str, Any], dotted: str) -> Any:
    outer, _, key = dotted.rpartition(".")
    found = manifest.get(outer) if outer else manifest
    return found.get(key) if isinstance(found, dict) else None


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
    return Prepared(path, read_examples(path, manifest["parquet_sha256"]), manifest)


def check_leakage(prepared: Prepared, against: Against | None) -> Prepared:
    """The same data with the manifest's `leakage` up to date; DataError if `against` refuses what is in it."""
    if against is None:
        return prepared
    known = prepared.manifest.get("leakage", {})
    if (known.get("key"), known.get("policy")) == (against.key, against.policy):
        return prepared
    account = leakage_of(str(prepared.path), prepared.examples.conversations(), against)
    return Prepared(prepared.path, prepared.examples, {**prepared.manifest, "leakage": account})


def source_hashes(spec: DataSpec) -> str | list[str]:
    """The content of the source, or of each source of a mixture; see sources.source_hash."""
    hashes = [source_hash(source.source) for source in spec.sources]
    return hashes[0] if len(hashes) == 1 else hashes


def _identity(spec: DataSpec, tokenizer: Any, against: Against | None) -> dict[str, Any]:
    """The manifest's keys that decide whether prepared data is the same."""
    return {
        "schema": SCHEMA,
        "source_sha256": source_hashes(spec),
        "mixture": [{**asdict(source), "source": None} for source in spec.sources] if spec.sources[0].name else None,
        "template_hash": template_hash(tokenizer),
        "spec": asdict(spec),
        "leakage_dropped": against.key if against and against.policy == "drop" else None,
    }


def _differences(manifest: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """Keys in which two preparations differ; equal content read from elsewhere is the same source.

    A manifest has no secrets in it, so both are compared without.
    """
    old, new = (masked({**known, **known["spec"]}) for known in (manifest, identity))
    return sorted(key for key, value in new.items() if key not in ("spec", "source") and old.get(key) != value)
