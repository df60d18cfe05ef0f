"""The data sets of an experiment, prepared once in its folder and shared by every stage and arm."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from eaft_verl.checks import data_spec
from eaft_verl.data.prepare import Prepared, load_prepared, manifest_path, prepare
from eaft_verl.models import hub_arguments


def load_tokenizer(model: Path | str) -> Any:
    """The tokenizer of a resolved model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(**hub_arguments(model))


def prepare_data(config: DictConfig, tokenizer: Any, which: str) -> Prepared:
    """The recipe's 'train' or 'heldout' data, prepared in OUTPUT/data unless the source is prepared already."""
    source = Path(str(config.data[which])).expanduser()
    if source.suffix == ".parquet" and manifest_path(source).exists():
        return load_prepared(source, tokenizer)
    return prepare(data_spec(config, which), tokenizer, Path(config.output) / "data" / f"{which}.parquet")
