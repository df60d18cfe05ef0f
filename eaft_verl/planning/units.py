"""Whether FSDP2 takes a model as one unit: a small one waits for the Python around each, not for the device."""

from eaft_verl.errors import ConfigError
from eaft_verl.planning.architectures import architecture_of
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.views import layers_wrapped

# parameters; at the end of backward each takes up to 24 bytes in place of 16: 17 GiB, which a card of 24 still has
SMALL = 750_000_000


def one_unit(config: Config, model: str) -> bool:
    """Whether the layers of the arm's model are one unit. model: as `architecture_of` takes it.

    As `verl.engine.wrap_policy.disable` says, and where that is null: on one GPU, for a model of at most SMALL
    parameters whose sizes are known, unless something needs the layers. Of 0.5 B on an H100 a step took 0.63 to 0.85
    times as long, without a gain in one of six tries (recipes/results/gpu_h100.json); on a CPU nothing is gained.
    """
    if (said := config.verl.engine.wrap_policy["disable"]) is not None:
        return said
    if config.device != "cuda" or layers_wrapped(config):
        return False
    try:
        return architecture_of(model).parameters <= SMALL
    except ConfigError:
        return False
