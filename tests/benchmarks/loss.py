"""Head and loss of one micro-batch, forward and backward: time, memory and error, a process for each way.

python tests/benchmarks/loss.py [--vocab 49152] [--hidden 576] [--tokens 512] [--density 1.0] [--dtype float32]
                                [--device cpu] [--repeat 4] [--json OUT]
All ways take the same hidden states, weight and labels, and run in turns, `--repeat` rounds. CPU: a process for each,
time is the least of the rounds, in seconds of one thread's CPU time. GPU: one process, warmed up thrice, the median of
the rounds between events. Memory is the peak beyond the inputs, errors are relative (Frobenius) to float64 from the
same inputs. Ways that need a package which is not installed are left out.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

from eaft_verl.objectives import Eaft, Objective, Sft, weighted_nll
from eaft_verl.tokens.head import Head, head_statistics
from eaft_verl.tokens.logits import logit_stats, row_gradient, row_statistics
from eaft_verl.tokens.row_kernels import CHUNKED, RowKernels, triton_kernels
from eaft_verl.tokens.stats import TokenStats

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # hidden [T, D], weight [V, D], labels [T], mask [T] -> loss


def weights(objective: Objective, made: Any, vocab: int) -> Tensor:
    return objective.weight(TokenStats(-made.nll_T.detach(), made.entropy_T, min(20, vocab), made.sum_p2_T))


def compiled_kernels() -> RowKernels:
    """Chunked torch through torch.compile."""
    return RowKernels("compiled", *(torch.compile(step, dynamic=True) for step in (row_statistics, row_gradient)))


KERNELS = {"chunked": lambda: CHUNKED, "compiled": cache(compiled_kernels), "triton": cache(triton_kernels)}


def ours(objective: Objective, kernels: str = "chunked", speculate: bool = True) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        vocab = len(weight)
        gate = (lambda made, rows: weights(objective, made, vocab)) if speculate else None
        made = head_statistics(hidden, Head(weight), labels, mask, gate=gate, kernels=KERNELS[kernels]())
        return weighted_nll(made.nll_T, weights(objective, made, vocab), mask, float(mask.sum()))

    return loss


def ours_whole(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    made = logit_stats(hidden @ weight.T, labels, mask)
    return weighted_nll(made.nll_T, weights(Eaft(), made, len(weight)), mask, float(mask.sum()))


def eager_ce(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels.where(mask, -100))


def compiled_ce(*given: Tensor) -> Tensor:
    return cache(torch.compile)(eager_ce)(*given)


def llama_factory(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """EAFT as LLaMA-Factory does it, written anew: float32 logits, a copy of the trained rows, its top 20, over 3."""
    logits = (hidden @ weight.T).float()
    nll = F.cross_entropy(logits, labels.where(mask, -100), reduction="none")[mask]
    with torch.no_grad():
        top = logits.detach()[mask].topk(20, dim=-1).values.log_softmax(-1)
        gate = -(top.exp() * top).sum(-1) / 3.0
    return (nll * gate).mean()


def ms_swift(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """EAFT as a fork of ms-swift does it, written anew: cross-entropy of every row, then the top 20 of every row."""
    logits = (hidden @ weight.T).float()
    nll = F.cross_entropy(logits, labels, reduction="none")
    with torch.no_grad():
        top = logits.detach().topk(20, dim=-1).values.softmax(-1)
        gate = torch.special.entr(top).sum(-1) / 3.0
    return ((nll * gate)[mask]).mean()


def verl_fused(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    logprob, _entropy = FusedLinearForPPO()(hidden[None], weight, labels[None], temperature=1.0)
    return -(logprob[0].where(mask, 0.0)).sum() / mask.sum()


def verl_triton(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    logprob, _entropy = linear_cross_entropy(hidden, weight, labels, 1.0, "none")
    return -(logprob.where(mask, 0.0)).sum() / mask.sum()


def torch_linear_ce(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, labels.where(mask, -100))


def liger(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels.where(mask, -100))


def cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels.where(mask, -100))


def products(count: int) -> Loss:
    """The floor: so many matrix products of this size and nothing else."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        rows, head = hidden.detach()[mask], weight.detach()
        logits = rows @ head.T
        if count == 4:
            logits = rows @ head.T
        hidden.grad, weight.grad = logits @ head, logits.T @ rows
        return hidden.sum() * 0.0 + weight[0].sum() * 0.0

    return loss


LINEAR_CE = "torch" if hasattr(F, "linear_cross_entropy") else "none"
COMPILER = "triton" if torch.cuda.is_available() else "torch"  # torch.compile's on a GPU
WAYS: dict[str, tuple[Loss, str | None, str]] = {  # name: (loss, package it needs, which truth it has)
    "3 products": (products(3), None, ""),
    "4 products": (products(4), None, ""),
    "CE, eager": (eager_ce, None, "ce"),
    "CE, eager compiled": (compiled_ce, COMPILER, "ce"),
    "CE, ours": (ours(Sft()), None, "ce"),
    "EAFT, ours": (ours(Eaft()), None, "eaft"),
    "EAFT, ours, recomputed": (ours(Eaft(), speculate=False), None, "eaft"),
    "CE, ours compiled": (ours(Sft(), "compiled"), COMPILER, "ce"),
    "EAFT, ours compiled": (ours(Eaft(), "compiled"), COMPILER, "eaft"),
    "CE, ours Triton": (ours(Sft(), "triton"), "triton", "ce"),
    "EAFT, ours Triton": (ours(Eaft(), "triton"), "triton", "eaft"),
    "EAFT, ours Triton, recomputed": (ours(Eaft(), "triton", speculate=False), "triton", "eaft"),
    "EAFT, ours, whole logits": (ours_whole, None, "eaft"),
    "EAFT, as LLaMA-Factory": (llama_factory, None, "eaft 3.0"),
    "EAFT, as ms-swift": (ms_swift, None, "eaft 3.0"),
    "CE, verl fused": (verl_fused, "verl", "ce"),
    "CE, verl Triton": (verl_triton, "verl", "ce"),
    "CE, torch linear_cross_entropy": (torch_linear_ce, LINEAR_CE, "ce"),
    "CE, Liger": (liger, "liger_kernel", "ce"),
    "CE, cut-cross-entropy": (cut_cross_entropy, "cut_cross_entropy", "ce"),
}
GPU_ONLY = ("EAFT, ours Triton", "CE, ours Triton", "EAFT, ours Triton, recomputed", "CE, verl Triton")


def present(device: str) -> list[str]:
    """The ways that can run here."""
    found = [name for name, (_, package, _) in WAYS.items() if package is None or importlib.util.find_spec(package)]
    return [name for name in found if device == "cuda" or name not in GPU_ONLY]


def inputs(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states whose labels are likely for half of the tokens, so that entropies spread from 0 to ln 20."""
    draw = torch.Generator(options.device).manual_seed(0)
    given: dict[str, Any] = {"generator": draw, "device": options.device}
    weight = torch.randn(options.vocab, options.hidden, **given) * 0.05
    labels = torch.randint(options.vocab, (options.tokens,), **given)
    sure = torch.rand(options.tokens, 1, **given) * 14  # more: subnormal numbers, slow on a CPU
    hidden = torch.randn(options.tokens, options.hidden, **given) + sure * weight[labels]
    mask = torch.rand(options.tokens, **given) < options.density
    moved = [part.to(getattr(torch, options.dtype)).requires_grad_() for part in (hidden, weight)]
    return moved[0], moved[1], labels, mask


def truth(kind: str, hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """d hidden and d weight in float64, in blocks of rows."""
    rows, head = hidden.detach().double()[mask], weight.detach().double()
    d_hidden, d_weight = torch.zeros_like(hidden, dtype=torch.float64), torch.zeros_like(head)
    at = mask.nonzero().squeeze(-1)
    for part, block in zip(at.split(128), rows.split(128), strict=True):
        logits = block @ head.T
        error = logits.softmax(-1)
        error[torch.arange(len(part)), labels[part]] -= 1.0
        if kind != "ce":
            top = logits.topk(20, dim=-1).values.log_softmax(-1)
            scale = 3.0 if kind == "eaft 3.0" else torch.tensor(20.0, dtype=torch.float64).log()
            error *= (-(top.exp() * top).sum(-1) / scale)[:, None]
        error /= len(at)
        d_hidden[part] = error @ head
        d_weight += error.T @ block
    return d_hidden, d_weight


def peak_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def one(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A forward and backward pass on the CPU in this process, warmed up once."""
    given = inputs(options)
    seconds, memory = 0.0, 0
    for _ in range(2):
        given[0].grad = given[1].grad = None
        Path("/proc/self/clear_refs").write_text("5")
        before, started = peak_memory(), time.process_time()
        WAYS[name][0](*given).backward()
        seconds, memory = time.process_time() - started, peak_memory() - before
    return {"way": name, "seconds": seconds, "bytes": memory} | errors(WAYS[name][2], given)


def errors(kind: str, given: tuple[Tensor, Tensor, Tensor, Tensor], exact: Any = None) -> dict[str, float]:
    """Of the two gradients that are there; none for the floors."""
    if not kind:
        return {}
    found = {}
    for label, ours_, right in zip(("dX", "dW"), given[:2], exact or truth(kind, *given), strict=True):
        assert ours_.grad is not None
        found[label] = float((ours_.grad.double() - right).norm() / right.norm())
    return found


def on_gpu(options: argparse.Namespace, names: list[str]) -> list[dict[str, Any]]:
    """All ways in this process, in turns: three to warm up, then the median of the rounds; errors from the last.

    Every second round runs backwards: how fast a clock the card keeps depends on what ran just before.
    """
    given, found = inputs(options), {name: {"way": name, "rounds": []} for name in names}
    for number in range(3 + options.repeat):
        for name in names[:: 1 if number % 2 else -1]:
            if "failed" not in (row := found[name]):
                try:
                    row["rounds"].append(timed(WAYS[name][0], given))
                except Exception as error:
                    row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:90]
    for kind in {"ce", "eaft", "eaft 3.0"}:
        exact = truth(kind, *given)
        for name, row in found.items():
            if WAYS[name][2] == kind and "failed" not in row:
                timed(WAYS[name][0], given)
                row |= errors(kind, given, exact)
    for row in found.values():
        rounds_ = row.pop("rounds")[3:]
        if "failed" not in row:
            row |= {
                "seconds": statistics.median(took for took, _ in rounds_),
                "bytes": max(peak for _, peak in rounds_),
            }
    return list(found.values())


def timed(loss: Loss, given: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[float, int]:
    """(seconds, bytes beyond what was there) of one forward and backward pass on the GPU."""
    given[0].grad = given[1].grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    loss(*given).backward()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000, torch.cuda.max_memory_allocated() - before


def rounds(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way once a round, each in a process of its own; the fastest of the rounds is kept."""
    names = [name for name in present(options.device) if options.only in name]
    if options.device == "cuda":
        return on_gpu(options, names)
    best: dict[str, dict[str, Any]] = {}
    words = [f"--{key}={vars(options)[key]}" for key in ("vocab", "hidden", "tokens", "density", "dtype", "device")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "VERL_PLATFORM": "cpu"}
    for _ in range(options.repeat):
        for name in names:
            done = subprocess.run(
                [sys.executable, __file__, "--one", name, *words], capture_output=True, text=True, env=environment
            )
            if done.returncode:
                best[name] = {"way": name, "failed": done.stderr.strip().splitlines()[-1][:90]}
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            if name not in best or found["seconds"] < best[name]["seconds"]:
                best[name] = found
    return list(best.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    for key, default in {"vocab": 49_152, "hidden": 576, "tokens": 512, "repeat": 4}.items():
        parser.add_argument(f"--{key}", type=int, default=default)
    parser.add_argument("--density", type=float, default=1.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="ways with this in their names")
    parser.add_argument("--one", choices=WAYS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options)))
        return
    found = rounds(options)
    show(options, found)
    if options.json:
        options.json.write_text(json.dumps({"settings": vars(options) | {"json": None}, "ways": found}, indent=1))


def show(options: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    """The table."""
    base = next((row["seconds"] for row in found if row["way"] == "CE, eager" and "seconds" in row), float("nan"))
    print(f"V={options.vocab} D={options.hidden} T={options.tokens} trained {options.density:.0%} {options.dtype}")
    print("| way | ms | x eager CE | MB beyond inputs | dX error | dW error |\n|---|---|---|---|---|---|")
    for row in found:
        if "failed" in row:
            print(f"| {row['way']} | failed: {row['failed']} | | | | |")
            continue
        shown = " | ".join(f"{row[name]:.1e}" if name in row else "" for name in ("dX", "dW"))
        took = f"{row['seconds'] * 1e3:.1f} | {row['seconds'] / base:.3f} | {row['bytes'] / 1e6:.0f}"
        print(f"| {row['way']} | {took} | {shown} |")


if __name__ == "__main__":
    main()
