"""What an anchored objective needs before its first step: the reference beside the model, or its stored values."""

from pathlib import Path
from typing import Any

from eaft_verl.models import model_key, resolve_model
from eaft_verl.objectives import L2_KIND, Anchor, Objective
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.views import own_rows
from eaft_verl.training.sft.anchor_cache import EmitTop, ReferenceCache, reference_cache


def reference_model(objective: Objective) -> str | None:
    """Folder or hub id of a reference other than the recipe's model; None where there is none."""
    anchor = objective.anchor
    return None if anchor is None or anchor.reference is None else str(resolve_model(anchor.reference))


def needs_second_model(config: Config, objective: Objective) -> bool:
    """Whether workers load a frozen model: not for stored values of the start, nor under LoRA (adapter off)."""
    anchor = objective.anchor
    if anchor is None:
        return False
    return anchor.reference is not None or (anchor.full and config.verl.model.lora_rank == 0)


def anchor_sources(config: Config, trainer: Any, objective: Objective, keys: dict[str, str]) -> list[ReferenceCache]:
    """Open the workers' reference, or return the stored one, made now where there is none."""
    anchor = objective.anchor
    if anchor is None:
        return []
    if anchor.full:
        trainer.group.open_reference()
        return []
    if anchor.kind == L2_KIND:
        trainer.group.hold_weights(anchor.coef)  # before a saved state is loaded
        return []
    cache = _cache(config, trainer, anchor, keys)
    trainer.state["seconds"] += cache.seconds
    trainer.run.update(reference_cache={"bytes": cache.bytes, "seconds": cache.seconds})
    return [cache]


def _cache(config: Config, trainer: Any, anchor: Anchor, keys: dict[str, str]) -> ReferenceCache:
    """Made before the first step, when the model still is the reference: then no second one is loaded at all."""
    start = keys.get("start", keys["model"])
    model = start if anchor.reference is None else model_key(anchor.reference)
    name = f"reference_k{anchor.k}{own_rows(config)}" + ("" if model == keys["model"] else f"_{model[:8]}")
    key = "/".join((model, keys["data"], keys["template"]))
    flags = {"no_lora_adapter": anchor.reference is None and config.verl.model.lora_rank > 0}
    opened = False

    def infer(rows: list[int]) -> Any:
        nonlocal opened
        if not opened:
            if anchor.reference is not None:
                trainer.group.open_reference()
            trainer.group.set_loss_fn(EmitTop(anchor.k))
            opened = True
        return trainer.infer(trainer.examples, rows, **flags)

    size = config.verl.data.train_batch_size
    cache = reference_cache(Path(config.output) / "data" / name, key, trainer.examples, anchor.k, infer, size)
    if opened:
        trainer.group.close_reference()
    return cache
