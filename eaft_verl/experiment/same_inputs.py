"""Whether a run that is made once more starts from what the first one did: model, data, template, evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eaft_verl.data.parquet import Example
from eaft_verl.errors import RunError
from eaft_verl.experiment.derive import Derived
from eaft_verl.models import model_key
from eaft_verl.recipe.config import Config, stored_configuration
from eaft_verl.recipe.datasets import prepared_path
from eaft_verl.runs import Run

_ROWS = 256  # compared at a time
BEHIND = {  # key of run.json -> what it is the hash of
    "model": "the files of model={model}",
    "base": "the files of the base, model={config.model},",
    "data": "the prepared rows of data.train={config.data.train}",
    "template": "the chat template of model={config.model}",
    "start": "the weights of start={config.start}",
    "average": "the weights of average={config.average}",
    "evaluation": "what `evaluate` and data.heldout={config.data.heldout} stand for, or the harness",
}


class Again(NamedTuple):
    """The run to be made once more. force: also from other files, which are named all the same, by `other_inputs`."""

    of: Run
    force: bool = False

    def require(self, keys: dict[str, str], prepared: Path | None = None) -> None:
        """RunError naming each input that is another one; prepared: the training data, to name the first other row."""
        found = other_inputs(self.of, keys, prepared)
        if found and not self.force:
            raise RunError(
                f"{self.of.path} was made from other inputs: {'; '.join(found)}. Give the same files by key=value "
                "(model=FOLDER, data.train=PATH), or --force to see what comes of these"
            )

    def derived(self, config: Config, declared: list[str], keys: dict[str, str], _: Sequence[Example]) -> Derived:
        """In the place of `derive`: the configuration as it is, for what the run took from another one stands in it."""
        self.require(keys, prepared_path(config, "train"))
        return Derived(config, declared, self.of.info.get("derived", {}))


def other_inputs(of: Run, keys: dict[str, str], prepared: Path | None = None) -> list[str]:
    """One line for every key of run.json that is another one now."""
    stored, config = of.info.get("keys", {}), stored_configuration(of.config)
    what = of.info["model"] if of.info["kind"] == "model" else config.model
    found = []
    for name in [name for name in keys if name in stored and stored[name] != keys[name]]:
        what_of = BEHIND.get(name, name).format(config=config, model=what)
        line = f"{name}: {what_of} are others (hash {stored[name][:12]}, now {keys[name][:12]})"
        if name == "data" and prepared and (row := _first_other_row(prepared_path(config, "train"), prepared)):
            line += f"; {row}"
        found.append(line)
    return found


def other_model(of: Run, config: Config) -> list[str]:
    """As `other_inputs`, of the recipe's model alone, which needs no data."""
    return other_inputs(of, {"base" if of.info["kind"] == "model" else "model": model_key(config.model)})


def _first_other_row(before: Path, now: Path) -> str | None:
    """Which prepared example differs first, counted from 0; None where the first run's data are gone."""
    import pyarrow.parquet as pq

    if not before.is_file():
        return None
    with pq.ParquetFile(before) as old, pq.ParquetFile(now) as new:
        counts = [file.metadata.num_rows for file in (old, new)]
        first = min(counts)
        batches = (file.iter_batches(_ROWS) for file in (old, new))
        for number, (one, other) in enumerate(zip(*batches, strict=False)):
            if not one.equals(other):
                rows = enumerate(zip(one.to_pylist(), other.to_pylist(), strict=False))
                first = number * _ROWS + next((row for row, (x, y) in rows if x != y), min(len(one), len(other)))
                break
    return f"the first of {counts[1]} examples (then {counts[0]}) that differs is number {first}, from 0"
