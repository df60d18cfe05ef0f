"""Where an SFT arm starts: nothing of verl is imported before Ray's session has chosen its platform."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from eaft_verl.data.parquet import Example, lengths_of
from eaft_verl.data.prepare import Prepared
from eaft_verl.errors import ConfigError
from eaft_verl.objectives import Psft
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.views import objective_of, world_size
from eaft_verl.runs import Run
from eaft_verl.training.quiet import kept_in
from eaft_verl.training.resume import starting_point

if TYPE_CHECKING:
    from eaft_verl.training.sft.arm import BaseOf


def check_lengths(config: Config, examples: Sequence[Example]) -> None:
    """A packed micro-batch must hold the longest example: verl would fail at the step that meets it."""
    batch = config.verl.data
    limit = batch.max_token_len_per_gpu * config.verl.engine.ulysses_sequence_parallel_size
    longest = int(lengths_of(examples).max())
    if batch.use_dynamic_bsz and longest > limit:
        raise ConfigError(
            f"the longest example has {longest} tokens and verl.data.max_token_len_per_gpu allows {limit}"
        )


def check_weights(config: Config, data: Prepared) -> None:
    """Weights of rows must have something to multiply."""
    if data.examples.weights is not None and isinstance(objective_of(config), Psft):
        raise ConfigError(
            "data.train has rows of other weights than 1, and the ratio of objective psft is no weight; choose another "
            "objective, or leave the weights out (data.columns={weight: null})"
        )


def train_sft(
    config: Config,
    run: Run,
    data: Prepared,
    heldout: Sequence[Example],
    model: str,
    keys: dict[str, str],
    base_of: "BaseOf",
    probe: Sequence[Example] = (),
) -> None:
    """Train the arm in its open, locked run directory and mark it finished; what stopped it is raised.

    base_of: from a forward pass over the training data's rows to what the base model says of it.
    probe: the meter's texts.
    """
    from eaft_verl.cluster.preflight import require_cluster
    from eaft_verl.cluster.ray_logs import logs_folder
    from eaft_verl.cluster.session import ray_session
    from eaft_verl.training.interruption import stop_request
    from eaft_verl.training.verl_cpu.private import require_version

    require_version()
    saved = starting_point(run, config.resume)
    with kept_in(run.path), ray_session(config.device, world_size(config)), stop_request() as stop:
        run.update(ray_logs=logs_folder())
        require_cluster(config)
        from eaft_verl.training.sft.arm import train_arm

        train_arm(config, run, data.examples, heldout, model, keys, base_of, probe, stop, saved)
