"""All ways of tests/benchmarks/loss.py at the paper's shapes, and the ratios that are claimed."""

import argparse
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eaft_verl.planning.formulas import chunk_bytes, logits_bytes
from tests.plan_setups import QWEN_32B, paper_setup

_spec = importlib.util.spec_from_file_location(
    "benchmark_of_the_loss", Path(__file__).parents[1] / "benchmarks/loss.py"
)
assert _spec and _spec.loader
loss = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(loss)

SHAPES = {  # (tokens, hidden) at Qwen's vocabulary
    "0.6-1.7B": (8192, 2048),
    "4B": (8192, 2560),
    "8-9B": (8192, 4096),
    "32B": (16_384, 5120),
}
VOCAB = 151_936


def measure(dry_run: bool, _work: Path) -> dict[str, Any]:
    """Ratios of each shape, and every way in `ways`."""
    found: dict[str, Any] = {"ways": []}
    for name, (tokens, hidden) in {"toy": (64, 32)}.items() if dry_run else SHAPES.items():
        options = argparse.Namespace(
            tokens=tokens,
            hidden=hidden,
            vocab=500 if dry_run else VOCAB,
            density=1.0,
            dtype="float32" if dry_run else "bfloat16",
            device="cpu" if dry_run else "cuda",
            repeat=1 if dry_run else 8,
        )
        names = [way for way in loss.present(options.device) if not (dry_run and "compiled" in way)]
        rows = [loss.one(way, options) for way in names] if dry_run else loss.on_gpu(options, names)
        loss.show(options, rows)
        found["ways"].append({"shape": name, "tokens": tokens, "hidden": hidden, "vocab": options.vocab, "rows": rows})
        found |= {f"{name}: {key}": value for key, value in ratios(rows, options).items()}
        torch.cuda.empty_cache() if not dry_run else None
    return found


def ratios(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, float]:
    """Of time and peak memory; planned / measured for the peak of the fused head."""
    ours = " Triton" if options.device == "cuda" else ""
    by = {row["way"]: row for row in rows if "failed" not in row}
    pairs = {
        "EAFT / CE": (f"EAFT, ours{ours}", f"CE, ours{ours}"),
        "EAFT / 3 products": (f"EAFT, ours{ours}", "3 products"),
        "EAFT / eager CE": (f"EAFT, ours{ours}", "CE, eager"),
        "EAFT / eager CE compiled": (f"EAFT, ours{ours}", "CE, eager compiled"),
        "EAFT / LLaMA-Factory's": (f"EAFT, ours{ours}", "EAFT, as LLaMA-Factory"),
        "EAFT / verl's fused CE": (f"EAFT, ours{ours}", "CE, verl fused"),
        "EAFT / verl's Triton CE": (f"EAFT, ours{ours}", "CE, verl Triton"),
        "Triton / chunked torch": (f"EAFT, ours{ours}", "EAFT, ours"),
    }
    found = {}
    for name, (one, other) in pairs.items():
        if one in by and other in by:
            found[f"{name}, time"] = round(by[one]["seconds"] / by[other]["seconds"], 3)
            found[f"{name}, memory"] = round(by[one]["bytes"] / max(by[other]["bytes"], 1), 3)
    if f"EAFT, ours{ours}" in by and options.device == "cuda":
        found["planned / measured memory"] = round(planned(options) / by[f"EAFT, ours{ours}"]["bytes"], 3)
    return found


def planned(options: argparse.Namespace) -> float:
    """Bytes that `eaft plan` counts for the loss, without the copy of dX that untrained tokens would need."""
    model = replace(QWEN_32B, vocab=options.vocab, hidden=options.hidden)
    setup = paper_setup(model=model, tokens=options.tokens, fused=True)
    return logits_bytes(setup) / 2 + chunk_bytes(setup)
