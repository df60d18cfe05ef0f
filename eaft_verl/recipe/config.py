"""The resolved configuration as this project reads it: names and types for the checker and the reader.

At run time it is OmegaConf's read-only tree of the same shape, which also holds what only verl reads; a test holds the
two together. `defaults.yaml` says what each key of ours means; sizes are in tokens, examples or devices.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eaft_verl.boundary import masked, secrets_in_clear
from eaft_verl.errors import ConfigError

MAX_REFERENCES = 24


OF_SFT = ("objective", "fused_head", "async_save", "meter")  # what trainer: grpo has no use for, null in its arms


@dataclass(frozen=True)
class Data:
    """`data`: what is trained on and what is held out."""

    train: Any
    heldout: Any
    columns: Mapping[str, Any] | None
    chat_template_kwargs: Mapping[str, Any] | None
    max_length: int
    over_long: str
    control_tokens: str
    turns: str
    leakage: str
    max_rejected: float
    rows: int | None
    heldout_rows: int | None


@dataclass(frozen=True)
class Compare:
    """`compare`: what arms get equal amounts of, and whose spend is the budget."""

    match: str
    to: str | None


@dataclass(frozen=True)
class Budget:
    """Whose finished run gives this arm its length; unit and amount once that run is read."""

    of: str
    unit: str
    amount: float


@dataclass(frozen=True)
class Control:
    """Plain SFT stopped at the training NLL of another arm; level (nats) and window (steps) once that is read."""

    of: str
    by: str
    level: float
    window: int


@dataclass(frozen=True)
class Start:
    """The arm whose export this one begins at, and its step: last, chosen or a number."""

    arm: str
    step: str | int


@dataclass(frozen=True)
class Reward:
    """`reward` of responses, in arms with trainer: grpo."""

    grader: str
    format_bonus: float
    seconds: float


@dataclass(frozen=True)
class Evaluate:
    """`evaluate`: benchmarks, drift, how often."""

    target: list[Any]
    general: list[Any]
    drift: Mapping[str, Any] | None
    points: int
    limit: int | None
    backend: str
    backend_args: Mapping[str, Any] | None


@dataclass(frozen=True)
class VerlModel:
    """`verl.model`."""

    override_config: Mapping[str, Any]
    enable_gradient_checkpointing: bool
    enable_activation_offload: bool
    use_remove_padding: bool
    lora_rank: int
    lora_alpha: int
    target_modules: Any
    lora_adapter_path: str | None
    use_liger: bool
    use_fused_kernels: bool
    mtp: Switch
    external_lib: Any


@dataclass(frozen=True)
class Switch:
    """A part of verl that is on or off."""

    enable: bool


@dataclass(frozen=True)
class VerlEngine:
    """`verl.engine`."""

    strategy: str
    wrap_policy: Mapping[str, bool | None]
    param_offload: bool
    optimizer_offload: bool
    offload_policy: bool
    reshard_after_forward: Any
    fsdp_size: int
    model_dtype: str
    mixed_precision: Mapping[str, str] | None
    ulysses_sequence_parallel_size: int
    pad_to_length: bool
    forward_only: bool
    use_no_sync_for_gradient_accumulation: bool
    qat: Switch


@dataclass(frozen=True)
class VerlOptim:
    """`verl.optim`."""

    optimizer: str
    optimizer_impl: str
    override_optimizer_config: Any
    lr: float
    lr_scheduler_type: str
    lr_warmup_steps_ratio: float
    clip_grad: float | None


@dataclass(frozen=True)
class VerlData:
    """`verl.data`; the last two in arms with trainer: grpo."""

    train_batch_size: int
    micro_batch_size_per_gpu: int
    max_token_len_per_gpu: int
    use_dynamic_bsz: bool
    max_prompt_length: int | None
    max_response_length: int


@dataclass(frozen=True)
class VerlTrainer:
    """`verl.trainer`."""

    total_epochs: int
    total_training_steps: int | None
    save_freq: int | str
    test_freq: int | str
    max_ckpt_to_keep: int | None
    balance_batch: bool
    nnodes: int
    n_gpus_per_node: int


@dataclass(frozen=True)
class Verl:
    """`verl`: its own keys, verbatim; the last three in arms with trainer: grpo, see `verl_keys.py`."""

    model: VerlModel
    engine: VerlEngine
    optim: VerlOptim
    data: VerlData
    trainer: VerlTrainer
    actor_rollout_ref: Any
    algorithm: Any
    reward: Any


@dataclass(frozen=True)
class Config:
    """One arm of a recipe, every key decided."""

    name: str
    arm: str
    recipe: str
    model: str
    device: str
    seed: int
    output: str
    save_minutes: float
    async_save: bool | None
    resume: str
    trainer: str
    fused_head: bool | None
    objective: Any
    control: Control | None
    start: Start | None
    average: Any
    replay: Mapping[str, Any] | None
    self_sft: Mapping[str, Any] | None
    compare: Compare
    budget: Budget | None
    data: Data
    reward: Reward
    evaluate: Evaluate
    choose: Any
    meter: Any
    trackers: list[str]
    verl: Verl


def configuration(tree: Any, *, resolved: bool = False) -> Config:
    """The read-only tree of a whole configuration, references resolved, under its typed face.

    Raises ConfigError for a reference to nothing and, unless the tree is `resolved` already, for a secret in clear.
    """
    tree = plain(tree)
    if (references := _references(tree)) > MAX_REFERENCES:
        raise ConfigError(f"{references} references ${{...}} to other keys; at most {MAX_REFERENCES} are allowed")
    if not resolved and (found := secrets_in_clear(tree)):
        raise ConfigError(
            f"{found[0]} holds a secret in clear, which every run would keep and show: export it in a variable and "
            "write ${oc.env:NAME} in its place"
        )
    try:
        config = OmegaConf.create(plain(OmegaConf.create(tree), resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"a ${{...}} reference cannot be resolved: {str(error).splitlines()[0]}") from None
    OmegaConf.set_readonly(config, True)
    return cast(Config, config)


def _references(tree: Any) -> int:
    """How often the texts of a tree refer to another key. Each may double what the last one stands for."""
    if isinstance(tree, dict | list):
        return sum(map(_references, tree.values() if isinstance(tree, dict) else tree))
    return tree.count("${") - tree.count("${oc.env:") if isinstance(tree, str) else 0


def own_defaults() -> dict[str, Any]:
    """`defaults.yaml`, less its arms; the caller's own."""
    return {key: value for key, value in copy.deepcopy(_defaults()).items() if key != "arms"}


@functools.cache
def _defaults() -> Any:
    return plain(OmegaConf.load(Path(__file__).with_name("defaults.yaml")))


def stored_configuration(tree: Mapping[str, Any]) -> Config:
    """The configuration of a run, also of an earlier version's: keys that it does not have hold their defaults."""
    return configuration(OmegaConf.merge(own_defaults(), tree))


def plain(node: Any, *, resolve: bool = False) -> Any:
    """A node of a configuration as Python's own lists and dictionaries; anything else as it is."""
    return OmegaConf.to_container(node, resolve=resolve) if isinstance(node, DictConfig | ListConfig) else node


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with values of dotted keys replaced, or added where there is no such key."""
    tree = OmegaConf.create(plain(config))
    for key, value in changes.items():
        OmegaConf.update(tree, key, value, merge=False, force_add=True)
    return configuration(tree, resolved=True)


def value_of(config: Config, dotted: str) -> Any:
    """The value of a dotted key; None where there is none."""
    return plain(OmegaConf.select(cast(DictConfig, config), dotted))


def as_yaml(config: Config) -> str:
    """The text of config.yaml, with references in place of secrets; `configuration` follows them."""
    return OmegaConf.to_yaml(OmegaConf.create(masked(plain(config))))
