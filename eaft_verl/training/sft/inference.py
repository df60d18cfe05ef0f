"""The engine that trains, opened for forward passes alone: in this process for one device, else on Ray's workers."""

import contextlib
import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from eaft_verl.cluster.session import ray_session, verl_variables
from eaft_verl.data.parquet import Example
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.views import world_size
from eaft_verl.training.verl_cpu.private import require_version

InferOver = Callable[[Sequence[Example], list[int]], Any]


@contextlib.contextmanager
def token_statistics(config: Config, model: str, k: int) -> Iterator[InferOver]:
    """A function (examples, rows) -> token_pass.FIELDS of their tokens; the model is freed when the block ends."""
    require_version()
    alone = world_size(config) == 1 and not os.environ.get("RAY_ADDRESS")
    with _here(config, model, k) if alone else _on_workers(config, model, k) as infer:
        yield infer


@contextlib.contextmanager
def _here(config: Config, model: str, k: int) -> Iterator[InferOver]:
    with tempfile.TemporaryDirectory() as folder, verl_variables(config.device, 1, rendezvous(folder)):
        logging.getLogger("torch.fx").setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # verl's chatter
            worker = _worker(config, model, k)
        from torch.distributed import destroy_process_group
        from verl.utils import tensordict_utils as tu

        from eaft_verl.training.sft.batches import make_batch
        from eaft_verl.training.sft.loss import BATCH_FLAGS
        from eaft_verl.training.sft.order import PADDING

        def infer(examples: Sequence[Example], rows: list[int]) -> Any:
            if config.verl.data.use_dynamic_bsz:  # micro-batches of tokens, whatever the rows
                rows = [row for row in rows if row != PADDING]
            batch = make_batch(examples, rows, BATCH_FLAGS)
            tu.assign_non_tensor(batch, global_token_num=None)
            return worker.infer_batch(batch)

        try:
            yield infer
        finally:
            destroy_process_group()


def _worker(config: Config, model: str, k: int) -> Any:
    """A worker of a world of its own, in this process."""
    import verl  # noqa: F401 - first of all: its entry points must bring the platform

    from eaft_verl.training.sft.token_pass import EmitDistribution
    from eaft_verl.training.sft.worker import EaftWorker
    from eaft_verl.training.sft.workers import worker_config

    worker = EaftWorker(worker_config(config, model, total_steps=1))
    worker.reset()
    worker.set_loss_fn(EmitDistribution(k))
    return worker


@contextlib.contextmanager
def _on_workers(config: Config, model: str, k: int) -> Iterator[InferOver]:
    from eaft_verl.cluster.preflight import require_cluster

    with ray_session(config.device, world_size(config)):
        require_cluster(config)
        from eaft_verl.training.sft.batches import make_batch
        from eaft_verl.training.sft.loss import BATCH_FLAGS
        from eaft_verl.training.sft.token_pass import EmitDistribution
        from eaft_verl.training.sft.workers import start_workers, stop_workers

        group = start_workers(config, model, 1, EmitDistribution(k), None)
        try:
            yield lambda examples, rows: group.infer_batch(make_batch(examples, rows, BATCH_FLAGS)).get()
        finally:
            stop_workers(group)


def rendezvous(folder: str) -> dict[str, str]:
    """Variables of a world of one process that needs no port."""
    world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    return {**world, "DIST_INIT_METHOD": f"file://{folder}/rendezvous"}
