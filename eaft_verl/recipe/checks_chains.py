"""What an arm with a start, an average or rows of its own needs, looked at before anything runs."""

from pathlib import Path

from eaft_verl.data.sources import at_hand
from eaft_verl.data.spec import sources_of
from eaft_verl.errors import ConfigError, DataError, require
from eaft_verl.models import check_model
from eaft_verl.recipe.chains import START
from eaft_verl.recipe.config import Config, plain
from eaft_verl.recipe.views import anchor_reference, objective_of


def check_chains(config: Config) -> None:
    """Raise ConfigError for a reference, own rows or a replay that the arm cannot be trained with."""
    if reference := anchor_reference(config):
        check_model(reference)
    anchor = objective_of(config).anchor if config.trainer == "sft" else None
    require(
        anchor is None or anchor.reference != START or config.start,
        "objective.anchor.reference=start is the model that an arm with `start` begins at, and this one begins at "
        "`model`; leave it out",
    )
    if config.replay:
        _check_replay(config, config.replay["data"])


def _check_replay(config: Config, data: str) -> None:
    """Raw rows on both sides, which hold no question of a benchmark."""
    named = [config.self_sft["data"]] if config.self_sft else _names(config)
    for name in (*named, data):
        require(
            not Path(name).expanduser().with_suffix(".manifest.json").is_file(),
            f"replay: {name} is prepared data, and rows are mixed before they are prepared; name the file that it was "
            "made from",
        )
    if not at_hand(data) or config.data.leakage == "drop":
        return  # what cannot be read here is compared when the data is prepared; `drop` leaves out what is found
    from eaft_verl.recipe.datasets import leaked

    try:
        found = leaked(config, data, plain(config.replay["columns"]) if config.replay else None)
    except DataError as error:
        raise ConfigError(f"replay.data={data!r}: {error}") from None
    require(
        not found,
        f"replay.data={data!r} holds what is evaluated: {len(found)} rows, the first of them row "
        f"{found and found[0][0]}: {found and found[0][1]}. Remove these rows, or set data.leakage=drop",
    )


def _names(config: Config) -> list[str]:
    return [one.source for one in sources_of(plain(config.data.train), "data.train")]
