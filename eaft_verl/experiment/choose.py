"""`eaft choose`: the checkpoint that the recipe's rule chose, as OUTPUT/chosen, ready to load."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from eaft_verl.errors import ConfigError, RunError
from eaft_verl.evaluation.model_files import check_checksums
from eaft_verl.files import locked, read_json, write_json
from eaft_verl.recipe.resolve import load_recipe, resolve

LINK = "chosen"


def choose_command(what: str, overrides: list[str], *, copy: bool) -> str:
    """Make OUTPUT/chosen of the report in OUTPUT/report; returns what to print. RunError where nothing is chosen.

    what: a recipe, or the output folder of one. copy: the files themselves instead of a link to the checkpoint.
    """
    output = _output(what, overrides)
    found = _report(output)
    try:
        first, *more = found["answer"]
        if (chosen := found["choice"]["chosen"]) is None:
            raise RunError(f"{first} {LINK}/ is left as it is")
        checkpoint = _checkpoint(output, found, chosen)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{output / 'report' / 'report.json'} is damaged ({error}); run `eaft report` again") from None
    check_checksums(checkpoint)
    busy = f"another process makes {output / LINK}"
    with locked(output / f".{LINK}.lock", busy=busy, wait=True):
        _require_ours(output)
        (_copy if copy else _link)(checkpoint, output / LINK)
        kept = {key: chosen[key] for key in ("arm", "seed", "run", "checkpoint", "gain", "cost", "score")}
        write_json(output / f"{LINK}.json", {**kept, "rule": found["choice"]["rule"], "answer": found["answer"]})
    how = "a copy of" if copy else "->"
    return "\n".join([first, *more, f"{output / LINK} {how} {checkpoint}"])


def _output(what: str, overrides: list[str]) -> Path:
    folder = Path(what)
    if folder.is_dir():
        if overrides:
            raise ConfigError(
                f"{overrides[0]}: {what} is the output folder itself, where this has no effect; leave it out"
            )
        return folder.resolve()
    recipe = load_recipe(what)
    return Path(resolve(recipe, next(iter(recipe.arms)), overrides).output)


def _report(output: Path) -> dict[str, Any]:
    file = output / "report" / "report.json"
    if not file.is_file():
        raise RunError(f"{file} does not exist: run `eaft compare`, or `eaft report` with --out {output / 'report'}")
    found = read_json(file)
    if not isinstance(found, dict) or not {"choice", "answer"} <= found.keys():
        raise RunError(f"{file} was not written by this version; run `eaft report` again")
    return found


def _checkpoint(output: Path, found: dict[str, Any], chosen: dict[str, Any]) -> Path:
    """The export that was chosen; it may lie outside of the output folder, where the report was given such a run."""
    label = f"{chosen['arm']} seed {chosen['seed']}"
    run = (output / "report" / found["environment"]["runs"][label]).resolve()
    folder = run / chosen["checkpoint"]
    if not (folder / "config.json").is_file():
        raise RunError(f"{folder} is no model any more: its export was removed; train {label} again, or restore it")
    return folder


def _require_ours(output: Path) -> None:
    """RunError where `chosen` is something that this command did not make."""
    place = output / LINK
    if place.exists() and not place.is_symlink() and not (output / f"{LINK}.json").is_file():
        raise RunError(f"{place} is there and was not made by `eaft choose`; move it away first")


def _link(checkpoint: Path, place: Path) -> None:
    """A relative link, so that the output folder can be moved; the old one is replaced in one move."""
    target = os.path.relpath(checkpoint, place.parent)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as folder:
        made = Path(folder) / place.name
        made.symlink_to(target, target_is_directory=True)
        _replace(made, place, Path(folder) / "old")


def _copy(checkpoint: Path, place: Path) -> None:
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as folder:
        made = Path(folder) / place.name
        shutil.copytree(checkpoint, made)
        _replace(made, place, Path(folder) / "old")


def _replace(made: Path, place: Path, old: Path) -> None:
    """Whole or not at all; a link over a link in one move, a folder by two with the old one put aside."""
    if place.is_symlink() and made.is_symlink():
        os.replace(made, place)
        return
    if place.is_symlink() or place.exists():
        os.replace(place, old)
    os.replace(made, place)
