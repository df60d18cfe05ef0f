"""The recipes that travel with the package, by name: from a checkout's recipes/, or from where a wheel put them."""

import functools
import importlib.metadata
from pathlib import Path

DISTRIBUTION = "eaft-verl"
SUFFIX = ".yaml"


@functools.cache
def shipped() -> dict[str, Path]:
    """{name: file}, in order of name; empty where neither a checkout nor an installed wheel holds any."""
    checkout = Path(__file__).parents[2] / "recipes"
    files = list(checkout.glob(f"*{SUFFIX}")) or _installed()
    return {file.stem: file for file in sorted(files)}


def _installed() -> list[Path]:
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return []
    found = (file for file in distribution.files or () if file.parent.name == "recipes" and file.suffix == SUFFIX)
    return [Path(str(distribution.locate_file(file))).resolve() for file in found]


def find_recipe(name: Path) -> Path:
    """The file itself where there is one; else, for a bare name, with or without .yaml, the shipped recipe."""
    if name.exists() or name.parent != Path():
        return name
    found = shipped().get(name.stem if name.suffix in ("", SUFFIX) else name.name, name)
    # below the current folder it stays relative: what is launched elsewhere finds it in the folder that travels
    return found.relative_to(Path.cwd()) if found.is_absolute() and found.is_relative_to(Path.cwd()) else found


def about(file: Path) -> str:
    """What a recipe's first line says of it, on one line."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip().partition(". ")[0].rstrip(".") if first.startswith("#") else ""
