"""Values of one key that cannot be meant: numbers that are none, and what verl's optimizers would be built with."""

import importlib.util
import math
import shutil
from collections.abc import Iterator
from typing import Any

from eaft_verl.errors import ConfigError, require
from eaft_verl.models import check_model
from eaft_verl.objectives import L2_KIND, Anchor
from eaft_verl.recipe.config import Config, plain

# of torch.optim, those that take the arguments which verl gives: lr, weight_decay and, to the Adams, betas
OPTIMIZERS = ("AdamW", "Adam", "Adamax", "NAdam", "RAdam", "SGD", "RMSprop", "Adagrad", "Adadelta", "ASGD", "Adafactor")
SCHEDULES = ("constant", "cosine")
RESUME = ("fallback", "strict", "changed", "restart")
PACKAGES = ("torch.optim", "torchao.optim", "bitsandbytes.optim")  # verl imports what is named


def check_every_value(config: Config) -> None:
    """ConfigError for the first number that is infinite or none and for trust in a model's code, wherever it stands."""
    for key, value in _leaves(plain(config)):
        require(not isinstance(value, float) or math.isfinite(value), f"{key}={value} must be a finite number")
        trusts = key.rpartition(".")[2] == "trust_remote_code" and value
        require(not trusts, f"{key}: code that comes with a model is never run; use an architecture transformers knows")


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for name, item in tree.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for number, item in enumerate(tree):
            yield from _leaves(item, f"{key}[{number}]")
    else:
        yield key, tree


def check_anchor(config: Config, anchor: Anchor) -> None:
    """ConfigError for a reference that is no model, or a pull on the weights that cannot be what is meant."""
    if anchor.reference:
        check_model(anchor.reference)
    if anchor.kind != L2_KIND:
        return
    rate, rank = config.verl.optim.lr, config.verl.model.lora_rank
    require(
        rate * anchor.coef <= 1,
        f"objective.anchor.coef={anchor.coef:g} times verl.optim.lr={rate:g} is above 1: a step would overshoot the "
        f"starting weights; at most {1 / rate:g}",
    )
    require(
        not rank,
        f"objective.anchor.kind=l2 with verl.model.lora_rank={rank}: the distance is that of the product of two "
        "matrices, which a pull on each does not shrink in proportion; verl.optim.weight_decay draws an adapter to its "
        "start, or choose a kind that compares outputs",
    )


def check_optimizer(config: Config) -> None:
    """ConfigError for an optimizer that does not exist, or settings outside of what they can be."""
    optim = plain(config.verl.optim)
    name, package = optim["optimizer"], optim["optimizer_impl"]
    allowed = ", ".join(PACKAGES)
    require(package in PACKAGES, f"verl.optim.optimizer_impl={package!r} is not one of {allowed}")
    here = config.device != "cuda" or shutil.which("nvidia-smi")  # else it is planned for a machine that may have it
    require(
        not here or importlib.util.find_spec(package.partition(".")[0]),
        f"verl.optim.optimizer_impl={package!r} is not installed",
    )
    require(
        package != PACKAGES[0] or name in OPTIMIZERS,
        f"verl.optim.optimizer={name!r} is not one of {', '.join(OPTIMIZERS)}",
    )
    require(optim["weight_decay"] >= 0, f"verl.optim.weight_decay={optim['weight_decay']} must be 0 or more")
    betas = optim["betas"]
    require(
        len(betas) == 2 and all(_is_number(beta) and 0 <= beta < 1 for beta in betas),
        f"verl.optim.betas={betas} must be two numbers from 0 to below 1, such as [0.9, 0.95]",
    )
    for key in ("lr_warmup_steps_ratio", "min_lr_ratio"):
        share = optim.get(key)
        require(share is None or 0 <= share <= 1, f"verl.optim.{key}={share} must be from 0 to 1")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_schedule(config: Config) -> None:
    """Learning rate, its schedule, and when is saved and tested."""
    trainer, optim = config.verl.trainer, config.verl.optim
    choice("verl.optim.lr_scheduler_type", optim.lr_scheduler_type, SCHEDULES)
    require(optim.lr > 0, f"verl.optim.lr={optim.lr} must be above 0")
    check_optimizer(config)
    require(
        optim.clip_grad is not None and optim.clip_grad > 0,
        f"verl.optim.clip_grad={optim.clip_grad} must be above 0 (verl always clips; a large value switches it off)",
    )
    for key, value in (("save_freq", trainer.save_freq), ("test_freq", trainer.test_freq)):
        good = value == "after_each_epoch" or (type(value) is int and (value == -1 or value > 0))
        require(good, f"verl.trainer.{key}={value!r} must be a number of steps, after_each_epoch, or -1 for never")
    require(
        trainer.test_freq == -1 or config.data.heldout or config.trainer != "sft",
        f"verl.trainer.test_freq={trainer.test_freq} has no effect without data.heldout; set one or remove the other",
    )
    require(trainer.total_epochs >= 1, f"verl.trainer.total_epochs={trainer.total_epochs} must be at least 1")
    steps = trainer.total_training_steps
    require(
        steps is None or (type(steps) is int and steps >= 1),
        f"verl.trainer.total_training_steps={steps!r} must be null or a whole number of at least 1",
    )
    minutes = config.save_minutes
    require(
        isinstance(minutes, int | float) and 0 < minutes < math.inf,
        f"save_minutes={minutes!r} must be a number of minutes above 0",
    )
    choice("resume", config.resume, RESUME)
    keep = trainer.max_ckpt_to_keep
    require(
        keep is None or (type(keep) is int and keep >= 2),
        f"verl.trainer.max_ckpt_to_keep={keep!r} must be null or at least 2: the newest may be half written",
    )


def choice(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    """ConfigError unless the key has one of the allowed values."""
    if value not in allowed:
        raise ConfigError(f"{key}={value!r} is not one of {', '.join(allowed)}")
