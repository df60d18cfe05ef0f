"""How much data an arm trains on: from the manifest of prepared data, else from the recipe, the assumption said."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eaft_verl.data.prepare import manifest_path, read_manifest
from eaft_verl.data.sources import count_rows
from eaft_verl.data.spec import Source
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.datasets import prepared_path
from eaft_verl.recipe.views import data_spec, source_of


@dataclass(frozen=True)
class Amount:
    """Sizes of the training data. examples None: unknown. attended: sum(len^2) / sum(len), tokens."""

    examples: int | None
    mean: float
    longest: int
    attended: float
    trained: float | None  # tokens with loss, all examples
    origin: str  # where the numbers come from
    prepared: bool = True  # else every example is taken at its longest


def amount_of(config: Config) -> Amount:
    """The amount of training data of an arm."""
    prepared = prepared_path(config, "train")
    if prepared == Path(str(source_of(config, "train"))).expanduser():
        return _from_manifest(prepared, manifest_path(prepared))
    reason = ""
    if manifest_path(prepared).is_file():
        stated, wanted = read_manifest(prepared)["spec"], asdict(data_spec(config))
        differs = sorted(key for key, value in wanted.items() if stated.get(key) != value)
        if not differs:
            return _from_manifest(prepared, manifest_path(prepared))
        reason = f"{manifest_path(prepared)} was prepared with another {', '.join(differs)} and is not used; "
    return _from_recipe(config, reason)


def _from_manifest(prepared: Path, path: Path) -> Amount:
    manifest = read_manifest(prepared)
    examples, tokens, lengths = manifest["counts"]["examples"], manifest["tokens"], manifest["lengths"]
    mean = tokens["total"] / examples
    return Amount(examples, mean, lengths["max"], _attended(lengths, mean), tokens["trained"], f"{path}")


def _attended(lengths: dict[str, Any], mean: float) -> float:
    """sum(len^2) / sum(len) from a histogram over powers of two, each bucket taken at 1.5 times its lower edge."""
    middles = [min(1.5 * edge, lengths["max"]) for edge in lengths["edges"]]
    pairs = list(zip(middles, lengths["counts"], strict=False))
    total = sum(middle * count for middle, count in pairs)
    return max(mean, sum(middle**2 * count for middle, count in pairs) / total) if total else mean


def _from_recipe(config: Config, reason: str) -> Amount:
    longest = config.data.max_length
    # a recipe without data, such as the shared part of several, can be planned; it cannot be run
    counts = [_rows(source) for source in data_spec(config).sources] if config.data.train else [None]
    rows = None if None in counts else sum(count or 0 for count in counts)
    origin = f"{reason}not prepared yet: every example is taken to have data.max_length={longest} tokens, all trained"
    if rows is None:
        origin += "; the number of examples is unknown (set data.rows, or run `eaft prepare` here)"
        return Amount(None, longest, longest, longest, None, origin, prepared=False)
    return Amount(rows, longest, longest, longest, rows * longest, origin, prepared=False)


def _rows(source: Source) -> int | None:
    """Rows that a source gives at most, if they can be counted without reading a hub."""
    known = [count for count in (count_rows(source.source, source.rows), source.rows, source.cap) if count is not None]
    return min(known, default=None)
