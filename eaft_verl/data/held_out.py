"""A data file in two: rows to train on, and rows held out of other questions."""

import hashlib
import json
import re
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaft_verl.data.formats import to_messages
from eaft_verl.data.profile import Profile
from eaft_verl.data.sources import iter_rows
from eaft_verl.data.spec import Columns, RowError
from eaft_verl.errors import DataError
from eaft_verl.files import new_file

ENCODED = ("input_ids", "loss_mask")  # of prepared data; they are made again
HELD_OUT, FEWEST_ROWS = 128, 10
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Split:
    """Two files made of one: rows to train on, rows held out; no prompt is in both.

    held: rows of the second, beside `copies` of them. unused: rows of the first that are faulty or copies, of those
    looked at. usable: the others, as far as that tells.
    """

    train: Path
    heldout: Path
    trained: int
    held: int
    copies: int
    unused: int
    usable: int


def held_out(found: Profile, train: Path, heldout: Path) -> Split:
    """Write the rows of the source to two files. Rows of one first question go to one side, copies among them; faulty
    rows stay where they are trained, or rather counted. DataError where there are too few of them."""
    unused = {entry["row"]: entry["kind"] for entry in found.manifest["rejected"]}
    groups: dict[str, list[int]] = {}
    number = 0
    for number, row in enumerate(iter_rows(found.source), 1):
        if unused.get(number, "duplicate") == "duplicate" and (key := _question(row, found.asked)):
            groups.setdefault(key, []).append(number)
    if number < FEWEST_ROWS:
        raise DataError(f"{found.source}: rows: {number}; {FEWEST_ROWS} are the least of which some can be held out")
    chosen = _chosen([groups[key] for key in sorted(groups)], unused.keys())  # hashes: an order of their own
    if not chosen:
        raise DataError(f"{found.source}: its rows ask so few different questions that none can be held out")
    for path, held in ((train, False), (heldout, True)):
        with new_file(path) as stream:
            stream.writelines(_lines(found.source, chosen, held=held))
    trained, copies, left = number - len(chosen), len(chosen & unused.keys()), len(unused.keys() - chosen)
    share = left / max(found.manifest["counts"]["read"] - len(chosen), 1)
    usable = max(1, round(trained * (1 - share)))
    return Split(train, heldout, trained, len(chosen) - copies, copies, left, usable)


def _chosen(groups: list[list[int]], unused: Set[int]) -> set[int]:
    """Rows that are held out: whole groups up to a tenth of what can be used, and never all of them."""
    sizes = [len(set(group) - unused) for group in groups]
    wanted = min(HELD_OUT, max(1, sum(sizes) // 10), sum(sizes) - 1)
    chosen: set[int] = set()
    held = 0
    for group, size in zip(groups, sizes, strict=True):
        if 0 < size <= wanted - held:
            chosen.update(group)
            held += size
    return chosen


def _question(row: dict[str, Any], columns: Columns | None) -> str:
    """Hash of the first user turn; '' for a row that is no conversation."""
    try:
        messages, _ = to_messages({key: value for key, value in row.items() if key not in ENCODED}, columns)
    except RowError:
        return ""
    asked = next((turn["content"] for turn in messages if turn["role"] == "user"), "")
    return hashlib.sha256(asked.encode()).hexdigest()[:16] if asked else ""


def _lines(source: str, chosen: set[int], *, held: bool) -> Iterator[bytes]:
    """The rows of one side as they are, a line each."""
    for number, row in enumerate(iter_rows(source), 1):
        if (number in chosen) == held:
            kept = {key: value for key, value in row.items() if key not in ENCODED and value is not None}
            line = json.dumps(kept, ensure_ascii=False, default=str)
            if _SURROGATE.search(line):  # which UTF-8 has no bytes for; `prepare` counts such a row as faulty
                line = json.dumps(kept, default=str)
            yield f"{line}\n".encode()
