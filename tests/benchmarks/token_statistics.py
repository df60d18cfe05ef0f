"""Loss of one micro-batch on a GPU: time and memory of EAFT's one pass against plain cross-entropy, in one run.

`python tests/benchmarks/token_statistics.py [--tokens 8192] [--vocab 151936]`. Prints the minimum of 20 passes, forward
and backward to the logits, and the peak of allocated memory beyond the logits.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from eaft_verl.objectives import Eaft, weighted_nll
from eaft_verl.tokens.logits import logit_stats
from eaft_verl.tokens.stats import TokenStats


def eaft(logits_TV: torch.Tensor, labels_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    made = logit_stats(logits_TV, labels_T, mask_T)
    weight_T = Eaft().weight(TokenStats(-made.nll_T.detach(), made.entropy_T, 20))
    return weighted_nll(made.nll_T, weight_T, mask_T, float(len(labels_T)))


def plain(logits_TV: torch.Tensor, labels_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits_TV.float(), labels_T)


def eaft_eager(logits_TV: torch.Tensor, labels_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    """EAFT as other trainers write it: cross-entropy, then a top-20 entropy under no_grad."""
    nll_T = torch.nn.functional.cross_entropy(logits_TV.float(), labels_T, reduction="none")
    with torch.no_grad():
        q_TK = logits_TV.float().topk(20, dim=-1).values.softmax(-1)
        weight_T = torch.special.entr(q_TK).sum(-1) / 2.995732
    return (nll_T * weight_T).mean()


def measure(loss: Callable[..., torch.Tensor], logits_TV: torch.Tensor, *rest: torch.Tensor) -> tuple[float, float]:
    """(seconds, GiB beyond the logits), minimum of 20 and maximum."""
    seconds = []
    for _ in range(20):
        logits_TV.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        loss(logits_TV, *rest).backward()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return min(seconds), (torch.cuda.max_memory_allocated() - before) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=151_936)
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), f"{options.tokens} tokens, vocabulary {options.vocab}")
    for dtype in (torch.bfloat16, torch.float32):
        logits_TV = torch.randn(options.tokens, options.vocab, device="cuda", dtype=dtype).requires_grad_()
        labels_T = torch.randint(options.vocab, (options.tokens,), device="cuda")
        mask_T = torch.ones(options.tokens, dtype=torch.bool, device="cuda")
        base, _ = measure(plain, logits_TV, labels_T, mask_T)
        for name, loss in (("cross-entropy", plain), ("eaft, eager", eaft_eager), ("eaft, one pass", eaft)):
            took, memory = measure(loss, logits_TV, labels_T, mask_T)
            print(f"{dtype!s:15} {name:15} {took * 1e3:8.2f} ms  {took / base:5.2f} x  {memory:6.2f} GiB")


if __name__ == "__main__":
    main()
