"""An arm trained by one worker in this process: everything of `eaft train` but Ray."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock


class Group:
    """The calls of a worker group of one, answered here."""

    world_size = 1

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._worker, name)
        if name not in ("train_batch", "infer_batch"):
            return lambda *args, **kwargs: [method(*args, **kwargs)]

        def call(batch: Any) -> Any:
            from verl.utils import tensordict_utils as tu

            tu.assign_non_tensor(batch, global_token_num=None)
            found = method(batch)
            return SimpleNamespace(get=lambda: found)

        return call


def start_worker(config: Any, model: str, steps: int, loss: Any, reference: str | None, _: Any = None) -> Group:
    """In place of `start_workers`."""
    from eaft_verl.training.sft.worker import EaftWorker
    from eaft_verl.training.sft.workers import worker_config

    worker = EaftWorker(worker_config(config, model, steps, reference))
    worker.set_loss_fn(loss)
    worker.reset()
    return Group(worker)


@contextlib.contextmanager
def without_ray(folder: Path) -> Iterator[None]:
    """Within the block `train` needs no Ray; one process group for all of its arms."""
    from eaft_verl.cluster.session import verl_variables
    from eaft_verl.training.sft.inference import rendezvous

    before = dict(os.environ)
    session, here = "eaft_verl.cluster.session.ray_session", contextlib.nullcontext()
    with verl_variables("cpu", 1, rendezvous(str(folder))):
        import verl  # noqa: F401 - first of all: its entry points must bring the platform
        from torch.distributed import destroy_process_group

        with (
            mock.patch(session, return_value=here),
            mock.patch("eaft_verl.cluster.preflight.require_cluster", return_value=None),
            mock.patch("eaft_verl.cluster.ray_logs.logs_folder", return_value=""),
            mock.patch("eaft_verl.training.sft.arm.start_workers", start_worker),
            mock.patch("eaft_verl.training.sft.arm.stop_workers", return_value=None),
        ):
            try:
                yield
            finally:
                destroy_process_group()
    os.environ.clear()
    os.environ.update(before)
