"""`eaft analyze STORE --gates ...`: objectives on stored statistics, without a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eaft_verl.analysis.figures import gate_pictures
from eaft_verl.analysis.gates import sweep
from eaft_verl.analysis.store import FILE, TokenStore
from eaft_verl.files import write_bytes, write_json
from eaft_verl.pages.numbers import share, short

_HEADING = ("gate", "weight", "ess", "gradient on conflicts", "on branching", "loss on conflicts")
Row = dict[str, Any]


def is_store(what: str) -> bool:
    """Whether the first word is a folder of token statistics."""
    return (Path(what) / FILE).is_file()


def gate_lab(path: Path, words: Sequence[str], out: Path | None) -> None:
    """Print the table of a sweep; write OUT/gates.json, gates.png and overlap.png (OUT: `gates` in the store)."""
    found, folder = sweep(TokenStore(path), words), out or path / "gates"
    for name, image in gate_pictures(found).items():
        write_bytes(folder / f"{name}.png", image)
    write_json(folder / "gates.json", found)
    print("\n".join(table(found)))
    print(f"wrote {folder / 'gates.json'}")


def table(found: Row) -> list[str]:
    """Lines of `Gates.result`, its numbers in columns."""
    rows = [_HEADING]
    for row in found["gates"]:
        gradient, loss = row["gradient_share"], row["loss_share"]["conflict"]
        shares = (row["ess"], gradient["conflict"], gradient["branching"], loss)
        rows.append((row["gate"], short(row["weight_mean"]), *map(share, shares)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [f"{row[0]:{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    tokens = found["token_share"]
    about = f"{found['tokens']:,} tokens: {share(tokens['conflict'])} conflicts, {share(tokens['branching'])} branching"
    return [about, *lines]
