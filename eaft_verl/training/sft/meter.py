"""The forgetting meter: drift from the base on fixed texts while an arm trains, and what its alarm does.

What the base says of them is stored once, its K likeliest tokens and the rest as one; the KL over those is at most that
over the whole vocabulary (data processing inequality). A reading is a forward pass and changes nothing of the training.
"""

import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from eaft_verl.data.parquet import Example
from eaft_verl.errors import RunError
from eaft_verl.pages.statistics import clustered_quantiles
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.meter import Meter, meter_of
from eaft_verl.recipe.views import world_size
from eaft_verl.runs import step_name
from eaft_verl.tokens.reference_kl import TopReference, reference_kl
from eaft_verl.training.schedule import Moment
from eaft_verl.training.sft.anchor_cache import EmitTop, ReferenceCache, reference_cache
from eaft_verl.training.sft.batches import make_batch
from eaft_verl.training.sft.loss import ANCHOR_FIELDS, BATCH_FLAGS, LogitsHook, local_shard, shifted
from eaft_verl.training.sft.order import PADDING

K = 256  # likeliest tokens of the base that are stored per token


class EmitDrift(LogitsHook):
    """Stands in for a worker's loss while it reads the meter: KL to the stored base and same likeliest token."""

    def _statistics(self, logits_TV: Tensor, data: TensorDict) -> dict[str, Tensor]:
        top = TopReference(*(local_shard(data[name].values(), data) for name in ANCHOR_FIELDS))
        _, mask_T = (local_shard(part, data) for part in shifted(data))
        kl_T = reference_kl("forward_kl_topk", logits_TV, top, mask_T)
        same_T = (logits_TV.argmax(dim=-1) == top.ids_TK[:, 0]).to(kl_T.dtype)
        return {"kl": kl_T[None], "same": same_T[None]}

    def _loss(self, model_output: dict[str, Tensor], data: TensorDict) -> Tensor:
        return torch.zeros(())


class DriftMeter:
    """Reads the drift every `meter.every` updates. `readings`: {step: KL} of this run so far."""

    def __init__(
        self, meter: Meter, probe: Sequence[Example], cache: ReferenceCache, trainer: Any, rows: list[int]
    ) -> None:
        self.meter, self.probe, self.cache, self.trainer, self.rows = meter, probe, cache, trainer, rows
        self.masks = [np.asarray(example.loss_mask, bool)[1:] for example in probe]
        self.readings: dict[int, float] = {}
        self.seconds = 0.0

    def recall(self) -> None:
        """What an earlier attempt read, once the run's metrics are rewound to where this one begins."""
        for row in self.trainer.run.metrics("meter"):
            self.readings[row["step"]], self.seconds = float(row["kl"]), row["total_s"]

    def after(self, step: int, moment: Moment) -> Moment:
        """What happens after this update: as planned, but as the alarm says where it goes off."""
        if step % self.meter.every == 0 and step not in self.readings:
            self._read(step)
            if self.meter.limit is not None:
                self._act(step, moment)
        return self.recalled(step, moment)

    def recalled(self, step: int, moment: Moment) -> Moment:
        """The same for an update whose reading is known already."""
        stops = self.meter.limit is not None and self.meter.then == "stop"
        return Moment(True, True) if stops and self._exceeds(self.readings.get(step)) else moment

    def outcome(self) -> dict[str, Any]:
        """What run.json says in the end."""
        alarm = next((step for step, kl in sorted(self.readings.items()) if self._exceeds(kl)), None)
        found = {"readings": len(self.readings), "seconds": self.seconds, "alarm": alarm, "then": self.meter.then}
        stopped = alarm is not None and self.meter.then == "stop"
        return {**found, "stopped": stopped, "kept": self.trainer.state.get("kept")}

    def _exceeds(self, kl: float | None) -> bool:
        return kl is not None and self.meter.limit is not None and not kl <= self.meter.limit

    def _read(self, step: int) -> None:
        """One row in metrics.jsonl, its cost among the numbers."""
        started = time.monotonic()
        batch = make_batch(self.probe, self.rows, BATCH_FLAGS, None, [self.cache])
        output = self.trainer.group.drift_batch(batch).get()
        self.trainer.beat()
        values = {
            name: [row.numpy()[: len(mask)][mask] for row, mask in zip(output[name].unbind(), self.masks, strict=False)]
            for name in ("kl", "same")
        }
        kl = np.concatenate(values["kl"]).astype(np.float64)
        owners = np.repeat(np.arange(len(self.masks)), [len(part) for part in values["kl"]])
        if not np.isfinite(kl).all():
            raise RunError(
                f"meter: the KL to the base is not finite after update {step}: the model's weights are broken"
            )
        quantiles = clustered_quantiles(kl, owners, (0.5, 0.95, 0.99), 0, np.random.default_rng(0))[0]
        self.readings[step] = float(kl.mean())
        spent = time.monotonic() - started
        self.seconds += spent
        row = {"split": "meter", "step": step, "time": time.time(), "kl": self.readings[step], "tokens": len(kl)}
        row |= dict(zip(("kl_p50", "kl_p95", "kl_p99"), map(float, quantiles), strict=True))
        row |= {"agreement": float(np.concatenate(values["same"]).mean()), "read_s": spent, "total_s": self.seconds}
        self.trainer.log(row)

    def _act(self, step: int, moment: Moment) -> None:
        """Say it once when the limit is passed; below it keep the best export, where that is asked for."""
        if not self._exceeds(self.readings[step]):
            if self.meter.then == "keep_best":
                self._keep(step, moment)
            return
        if any(self._exceeds(kl) for earlier, kl in self.readings.items() if earlier < step):
            return
        then = {"warn": "training goes on", "stop": "training ends here", "keep_best": self._kept()}[self.meter.then]
        print(
            f"eaft: warning: after update {step} the KL to the base is {self.readings[step]:.4g} nats per token on the "
            f"meter's texts, above meter.alarm.kl={self.meter.limit:g}; {then}",
            file=sys.stderr,
            flush=True,
        )

    def _kept(self) -> str:
        kept = self.trainer.state.get("kept")
        if kept is None:
            return "no earlier reading was below it, so nothing is kept but the planned evaluations"
        return f"training goes on, and update {kept['step']} (held-out NLL {kept['nll']:.4f}) is kept"

    def _keep(self, step: int, moment: Moment) -> None:
        """Export this update if none has a lower held-out NLL; the one kept before goes, if it was not planned."""
        trainer, kept = self.trainer, self.trainer.state.get("kept")
        nll = trainer.validate(step)
        if kept is not None and not nll < kept["nll"]:
            return
        trainer.export(step)
        trainer.state["kept"] = {"step": step, "nll": nll, "planned": moment.evaluate}
        if kept is not None and not kept["planned"] and math.isfinite(kept["nll"]):
            shutil.rmtree(trainer.run.path / "checkpoints" / step_name(kept["step"]), ignore_errors=True)


def drift_meter(config: Config, trainer: Any, probe: Sequence[Example], keys: dict[str, str]) -> DriftMeter | None:
    """The arm's meter, what the base says of its texts computed now if it is not stored; None where there is none.

    Called before anything is learned or restored, when the workers still hold the base.
    """
    meter = meter_of(config)
    if meter is None:
        return None
    unit = world_size(config) // config.verl.engine.ulysses_sequence_parallel_size
    unit *= 1 if config.verl.data.use_dynamic_bsz else config.verl.data.micro_batch_size_per_gpu
    rows = [*range(len(probe)), *[PADDING] * (-len(probe) % unit)]
    flags = {"no_lora_adapter": config.verl.model.lora_rank > 0}

    def infer(indices: list[int]) -> Any:
        trainer.group.set_loss_fn(EmitTop(K))
        return trainer.infer(probe, indices, **flags)

    folder = Path(config.output) / "data" / f"meter_{_texts_key(probe)}_k{K}"
    if keys.get("start", keys["model"]) != keys["model"] and not (folder / "meta.json").exists():
        raise RunError(
            "meter: this arm does not start at the base, and what the base says of the meter's texts is not stored: "
            "first train an arm with trainer sft that starts at the base, with the same meter and output"
        )
    cache = reference_cache(folder, "/".join((keys["model"], keys["template"])), probe, K, infer, len(rows))
    trainer.run.update(meter_cache={"bytes": cache.bytes, "seconds": cache.seconds})
    return DriftMeter(meter, probe, cache, trainer, rows)


def _texts_key(probe: Sequence[Example]) -> str:
    """Sixteen hex digits of the token ids and masks."""
    from eaft_verl.evaluation.records import digest

    return digest([list(map(int, part)) for example in probe for part in (example.input_ids, example.loss_mask)])[:16]
