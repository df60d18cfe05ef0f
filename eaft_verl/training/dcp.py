"""A training state on disk: torch's distributed checkpoints (DCP) in safetensors, which any number of ranks can read.

Nothing is pickled: DCP's usual index is a pickle, which runs whatever was put into it, so its Hugging Face storage is
used, where the index is the JSON header of every file. What is no tensor goes to a JSON file per rank.
"""

import json
import math
import os
import random
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from eaft_verl.training.states import SHARDS, describe

MODEL, OPTIMIZER = "model.", "optimizer."
FILE_BYTES = 2**28  # of a rank in one file; DCP holds a file twice in memory while it writes it, and new memory is slow


class DcpCheckpoints:
    """What verl's FSDP2 engine saves and loads with: its attribute `checkpoint_manager`.

    Saved are the trained weights, the optimizer's tensors, the place in the learning rate schedule and the random
    states. Frozen weights are those of the base model, and hyperparameters those of the configuration. On a load with
    another number of ranks each takes a random state that was saved, rank modulo their number.

    background: a save copies this rank's part into host memory and returns; the copy is written while training goes on.
    """

    def __init__(self, model: torch.nn.Module, optimizer: Any, lr_scheduler: Any, *, background: bool = False) -> None:
        self.model, self.optimizer, self.lr_scheduler = model, optimizer, lr_scheduler
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # a group of its own: what is written meets the other ranks in between the collectives of training
        self.group = dist.new_group(backend="gloo") if background else None
        self.writer = ThreadPoolExecutor(1, "state") if background else None
        self.writing: Future[None] | None = None

    def save_checkpoint(
        self, local_path: str, hdfs_path: None = None, global_step: int = 0, max_ckpt_to_keep: int | None = None
    ) -> None:
        """Write the state into the folder, every file flushed to disk, and SHARDS last; collective.

        Where a tensor is not finite nothing but SHARDS is written, which names it. In the background: `finished` tells,
        and must have been asked before the next one.
        """
        folder, state = Path(local_path), self._tensors(updated=bool(self.optimizer.state))
        bad = next((name for name, value in state.items() if not finite(value)), None)
        found = [name for name in self._from_all(bad) if name]
        if found:
            return self._describe(folder, found[0])
        writer = dcp.HuggingFaceStorageWriter(str(folder), _file_indices(state, self.world_size), save_distributed=True)
        if self.writer is None:
            dcp.save(state, storage_writer=writer)
            return self._complete(folder, self._values())
        upload: Any = dcp.async_save(state, storage_writer=writer, process_group=self.group)
        self.writing = self.writer.submit(self._complete, folder, self._values(), upload)

    def finished(self, *, wait: bool) -> bool:
        """Whether the last save is on the disk; what went wrong with it in the background is raised."""
        if self.writing is not None and (wait or self.writing.done()):
            writing, self.writing = self.writing, None
            writing.result()
        return self.writing is None

    def _complete(self, folder: Path, values: dict[str, Any], upload: "Future[Any] | None" = None) -> None:
        """Once the tensors are written: what is no tensor, and the description of every file."""
        if upload is not None:
            upload.result()
        _write_flushed(folder / _rank_file(self.rank), values)
        self._describe(folder, None)

    def _describe(self, folder: Path, nonfinite: str | None) -> None:
        mine = [*folder.glob(f"shard-{self.rank + 1:05d}-*"), *folder.glob(_rank_file(self.rank))]
        files = self._from_all({file.name: describe(file) for file in mine})
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            merged = {name: entry for part in files for name, entry in part.items()}
            _write_flushed(folder / SHARDS, {"files": merged, "nonfinite": nonfinite})
        dist.barrier(self.group)

    def load_checkpoint(self, local_path: str, hdfs_path: None = None, del_local_after_load: bool = False) -> None:
        """Restore the state in place; collective. The caller has checked the files."""
        folder = Path(local_path)
        reader = dcp.HuggingFaceStorageReader(str(folder))
        updated = any(name.startswith(OPTIMIZER) for name in reader.read_metadata().state_dict_metadata)
        dcp.load(self._tensors(updated=updated), storage_reader=reader)
        saved = len(list(folder.glob(_rank_file("*"))))
        values = json.loads((folder / _rank_file(self.rank % saved)).read_text(encoding="utf-8"))
        _set_random_states(values["random"])
        scheduler = self.lr_scheduler.state_dict() | values["schedule"]  # the rates themselves are the configuration's
        pairs = zip(self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas, strict=True)
        scheduler["_last_lr"] = [base * factor(scheduler["last_epoch"]) for base, factor in pairs]
        self.lr_scheduler.load_state_dict(scheduler)
        for group, rate in zip(self.optimizer.param_groups, scheduler["_last_lr"], strict=True):
            group["lr"] = rate
        dist.barrier()

    def _tensors(self, *, updated: bool) -> dict[str, Tensor]:
        """Views of every tensor of the state, by name; a scalar as a vector of one element, for safetensors' sake.

        updated: whether the optimizer has made a step; torch would make one to have something to return.
        """
        options = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True)
        once = {name for name, _ in self.model.named_parameters()}
        tied = {name for name, _ in self.model.named_parameters(remove_duplicate=False)} - once
        weights = get_model_state_dict(self.model, options=options)
        model = {name: value for name, value in weights.items() if name not in tied}
        state = get_optimizer_state_dict(self.model, self.optimizer, options=options) if updated else {}
        moments = {name.removeprefix("state."): value for name, value in state.items() if name.startswith("state.")}
        named: list[tuple[str, dict[str, Any]]] = [(MODEL, model), (OPTIMIZER, moments)]
        return {
            prefix + name: value if value.dim() else value.view(1)
            for prefix, part in named
            for name, value in part.items()
        }

    def _values(self) -> dict[str, Any]:
        schedule = {name: self.lr_scheduler.state_dict()[name] for name in ("last_epoch", "_step_count")}
        return {"random": _random_states(), "schedule": schedule}

    def _from_all(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, self.group)
        return gathered


def read_model(folder: Path) -> dict[str, Tensor]:
    """The trained weights of a saved state by name, whole and on the CPU, in one process."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    known: Any = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in known.items()
        if name.startswith(MODEL)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what is asked for
        dcp.load(state, storage_reader=reader, no_dist=True)
    return {name.removeprefix(MODEL): value for name, value in state.items()}


def finite(value: Tensor) -> bool:
    """Whether this rank's part of it holds no NaN and no infinity."""
    local = value.to_local() if isinstance(value, DTensor) else value
    if not local.is_floating_point() or not local.numel():
        return True
    return all(
        map(math.isfinite, torch.stack(local.aminmax()).tolist())
    )  # NaN wins both; nothing is written in between


def _file_indices(state: dict[str, Tensor], ranks: int) -> dict[str, int]:
    """{name: number of its file, from 1}: consecutive tensors share one of about FILE_BYTES on each rank."""
    filled, indices = 0, {}
    for name, value in state.items():
        indices[name] = filled // (FILE_BYTES * ranks) + 1
        filled += value.numel() * value.element_size()
    return indices


def _rank_file(rank: int | str) -> str:
    return f"rank-{rank:05d}.json" if isinstance(rank, int) else f"rank-{rank}.json"


def _write_flushed(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as stream:
        json.dump(value, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _random_states() -> dict[str, Any]:
    """Python's, numpy's, torch's and this device's, as JSON holds them."""
    name, keys, *rest = np.random.get_state()
    device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": device if device is None else device.tolist(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    version, keys, cached = states["python"]
    random.setstate((version, tuple(keys), cached))
    name, words, *rest = states["numpy"]
    np.random.set_state((name, np.array(words, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))
