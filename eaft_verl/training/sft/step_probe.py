"""The longest micro-batch for real, in a process of its own: forward, backward, optimizer step; what it took.

`python -m eaft_verl.training.sft.step_probe JOB.json` is what `eaft plan --probe` starts. The job holds a
configuration, a model folder and the lengths of the sequences; {"peak", "step_s", "tokens"} goes to the job's `out`.
Resident memory of a CPU process is its live tensors only where glibc gives every large block back: the caller sets the
variables for it (planning/probe.py).
"""

import ctypes
import gc
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eaft_verl.files import read_json, write_json
from eaft_verl.training.sft.inference import rendezvous

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_CLEAR_PEAK = "5"  # proc(5): resets VmHWM of the process to its current resident size


def main(job_path: str) -> None:
    """Run the job of a file and write its result."""
    job = read_json(Path(job_path))
    os.environ.update(rendezvous(job["folder"]))
    import verl  # noqa: F401 - first of all: its entry points must bring the platform
    from omegaconf import OmegaConf

    from eaft_verl.objectives import L2_KIND, Objective, Sft
    from eaft_verl.recipe.config import configuration
    from eaft_verl.recipe.views import objective_of
    from eaft_verl.training.sft.loss import TokenLoss
    from eaft_verl.training.sft.worker import EaftWorker
    from eaft_verl.training.sft.workers import worker_config

    config = configuration(OmegaConf.load(job["config"]))
    objective: Objective = objective_of(config)
    worker = EaftWorker(worker_config(config, job["model"], total_steps=4, reference=job["reference"]))
    worker.reset()
    # a threshold or an example weight from the base model changes no tensor's size
    plain = Sft(k=objective.k, anchor=objective.anchor)
    worker.set_loss_fn(TokenLoss(plain if objective.needs_base else objective))
    if objective.anchor is not None and objective.anchor.full:
        worker.open_reference()
    if objective.anchor is not None and objective.anchor.kind == L2_KIND:
        worker.hold_weights(objective.anchor.coef)

    def step() -> None:
        _step(worker, objective, job)

    step()  # creates the optimizer's state and loads what is loaded lazily
    peak = _peak(config.device, worker, step)
    if config.device == "cpu":
        _keep_freed_blocks()
        step()
    started = time.monotonic()
    step()
    _synchronize(config.device)
    write_json(Path(job["out"]), {"peak": peak, "step_s": time.monotonic() - started, "tokens": sum(job["lengths"])})


class _Stored:
    """Values of the right shapes for what a run has stored per token: a reference's best tokens, the old policy."""

    def __init__(self, objective: Any, lengths: list[int]) -> None:
        self.objective, self.lengths = objective, lengths

    def tokens(self, index: int) -> dict[str, Any]:
        """Tensors [length, ...] of an example, by name."""
        import torch

        from eaft_verl.objectives import TOPK_KIND

        length, anchor, found = self.lengths[index], self.objective.anchor, {}
        if anchor is not None and anchor.kind == TOPK_KIND:
            shape = (length, anchor.k)
            found["anchor_ids"] = torch.arange(anchor.k, dtype=torch.int32).expand(shape).contiguous()
            found["anchor_logprob"] = torch.full(shape, -math.log(2 * anchor.k))
            found["anchor_tail"] = torch.full((length,), 0.5)
        if "old_logprob" in self.objective.needs:
            found["old_logprob"] = torch.full((length,), -1.0)
        return found


def _peak(device: str, worker: Any, step: Callable[[], None]) -> int:
    """Bytes at the peak of a step: allocated on a GPU, resident above the process without its model on a CPU."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    empty = _status("VmRSS") - _held(worker)
    Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK, encoding="ascii")
    step()
    return _status("VmHWM") - empty


def _held(worker: Any) -> int:
    """Bytes of parameters, gradients, buffers and optimizer state between two steps, the reference's too."""
    import torch

    engines = [worker.engine, *([worker.reference.engine] if worker.reference is not None else [])]
    tensors: list[torch.Tensor] = []
    for engine in engines:
        tensors += [*engine.module.parameters(), *engine.module.buffers()]
        tensors += [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        state = engine.optimizer.state.values() if engine.optimizer is not None else ()
        tensors += [item for values in state for item in values.values() if torch.is_tensor(item)]
    storages = [plain.untyped_storage() for tensor in tensors for plain in _plain(tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _plain(tensor: Any) -> list[Any]:
    """The tensors that hold the values of a sharded or quantised one."""
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    parts = [getattr(tensor, name) for name in names]
    return [plain for part in parts if torch.is_tensor(part) for plain in _plain(part)]


def _keep_freed_blocks() -> None:
    """Let glibc reuse large blocks as it does in training: giving each back costs more time than the arithmetic."""
    libc = ctypes.CDLL(None)
    for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        libc.mallopt(parameter, 1 << 30)


def _synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _step(worker: Any, objective: Any, job: dict[str, Any]) -> None:
    """One optimizer step on random tokens; every token but the first of a sequence is trained."""
    import torch
    from verl.utils import tensordict_utils as tu

    from eaft_verl.data.parquet import Example
    from eaft_verl.training.sft.batches import make_batch
    from eaft_verl.training.sft.loss import ANY_STATE, BATCH_FLAGS

    draw = torch.Generator().manual_seed(0)
    examples = []
    for number, length in enumerate(job["lengths"]):
        ids = torch.randint(job["vocab"], (length,), generator=draw).tolist()
        examples.append(Example(id=str(number), messages=[], input_ids=ids, loss_mask=[0] + [1] * (length - 1)))
    flags = {**BATCH_FLAGS, "objective_state": ANY_STATE, "update_lr_scheduler": True}
    batch = make_batch(examples, list(range(len(examples))), flags, None, [_Stored(objective, job["lengths"])])
    tu.assign_non_tensor(batch, global_token_num=None)
    worker.train_batch(batch)


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: the probe needs Linux")


if __name__ == "__main__":
    main(sys.argv[1])
