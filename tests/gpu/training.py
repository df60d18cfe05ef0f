"""Arms trained for real on the GPU, each by `eaft train` in a process of its own, on models and rows made here."""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from eaft_verl.planning.arm_plan import plan_arm
from eaft_verl.planning.machine import machine_of
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.resolve import load_recipe, resolve
from tests.tiny import sums, tiny_model, tiny_tokenizer

CLOSE = 2e-3  # of a step's loss in float32, between the devices; the steps before it have parted by rounding
ARMS = {
    "sft": {"objective": {"name": "sft"}},
    "eaft": {"objective": {"name": "eaft"}},
    "sft_kl": {"objective": {"name": "sft", "anchor": {"kind": "forward_kl", "coef": 0.5}}},
}
GRPO = {"trainer": "grpo", "verl": {"actor_rollout_ref": {"rollout": {"n": 4}}, "data": {"max_response_length": 16}}}


def engine_parity(dry_run: bool, work: Path) -> dict[str, Any]:
    """The trainer with verl's engine on the GPU against the same on the CPU: loss of every step, float32."""
    work = work / "parity"
    path = recipe(work, tiny_model(work / "model", hidden=128), rows=64, batch=16, sums_each=1, pack=1024, dtype="fp32")
    if dry_run:
        return {"arms that resolve": resolved(path)}
    asked = [(arm, device) for arm in ARMS for device in ("cuda", "cpu")]
    with ThreadPoolExecutor(len(asked)) as pool:
        steps = dict(zip(asked, pool.map(lambda one: trained(path, *one), asked), strict=True))
    found: dict[str, Any] = {}
    for arm in ARMS:
        here, there = ([row["loss"] for row in steps[arm, device]] for device in ("cuda", "cpu"))
        worst = max(abs(one / other - 1) for one, other in zip(here, there, strict=True))
        found[f"{arm}: worst step, GPU / CPU - 1"] = float(f"{worst:.1e}")
        if worst > CLOSE:
            found["failed"] = f"{arm} differs by {worst:.2g} between GPU and CPU, {CLOSE} allowed"
    return found


def compared(dry_run: bool, work: Path) -> dict[str, Any]:
    """SFT and EAFT on a random model of 0.5 B, one after the other: tokens/s, and peak memory against `eaft plan`."""
    work = work / "half_billion"
    model = tiny_model(work / "model") if dry_run else half_billion(work / "model")
    path = recipe(work, model, rows=64, batch=16, sums_each=1 if dry_run else 30, pack=8192, dtype="bf16")
    if dry_run:
        return {"arms that resolve": resolved(path)}
    found: dict[str, Any] = {}
    for arm in ("sft", "eaft"):
        steps = trained(path, arm, "cuda")
        found[f"{arm}: tokens/s"] = round(statistics.median(row["tokens_per_s"] for row in steps[2:]))
        found[f"{arm}: s/step"] = round(statistics.median(row["step_s"] for row in steps[2:]), 3)
        found[f"{arm}: NLL first, last"] = f"{steps[0]['nll']:.3f}, {steps[-1]['nll']:.3f}"
        found[f"{arm}: GiB measured"] = round(max(row["memory_gib"] for row in steps), 2)
        found[f"{arm}: GiB planned"] = round(planned(path, arm), 2)
    found["EAFT / SFT, s/step"] = round(found["eaft: s/step"] / found["sft: s/step"], 3)
    return found


def grpo(work: Path) -> dict[str, Any]:
    """GRPO on the rows of `compared`, its rollouts by vLLM."""
    steps = trained(work / "half_billion" / "recipe.yaml", "grpo", "cuda")
    return {"grpo: steps": len(steps), "grpo: s/step": round(statistics.median(row["step_s"] for row in steps[1:]), 2)}


def recipe(folder: Path, model: Path, *, rows: int, batch: int, sums_each: int, pack: int, dtype: str) -> Path:
    """A recipe over made rows of `sums_each` sums; attention that needs no package."""
    made = sums(rows * sums_each, seed=1)
    joined = [
        {"prompt": part[0]["prompt"], "response": "\n".join(row["response"] for row in part), "answer": "1"}
        for part in (made[start : start + sums_each] for start in range(0, len(made), sums_each))
    ]
    for name, part in (("train", joined), ("heldout", joined[:4])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    tree = {
        "model": str(model),
        "output": str(folder / "runs"),
        "data": {
            "train": str(folder / "train.jsonl"),
            "heldout": str(folder / "heldout.jsonl"),
            "max_length": min(pack, 2048),
        },
        "evaluate": {"points": 1},
        "verl": {
            "optim": {"lr": 1e-3 if pack < 8192 else 1e-5},
            "model": {"override_config": {"attn_implementation": attention()}},
            "engine": {"mixed_precision": {"param_dtype": dtype, "reduce_dtype": "fp32"}},
            "data": {"train_batch_size": batch, "max_token_len_per_gpu": pack},
            "trainer": {"total_epochs": 2},
        },
        "arms": {**ARMS, "grpo": GRPO},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def attention() -> str:
    """flash-attn where it is installed."""
    import importlib.util

    return "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"


def half_billion(folder: Path) -> Path:
    """A random model of Qwen2.5-0.5B's shape and vocabulary, in bfloat16, with a tiny tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151_936}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(Qwen2Config(**shape, **heads, **ids)).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def resolved(path: Path) -> str:
    """The arms that resolve on both devices and can be planned."""
    loaded = load_recipe(str(path))
    for arm in loaded.arms:
        for device in ("cpu", "cuda"):
            check(resolve(loaded, arm, [f"device={device}"]), dry_run=device == "cuda")
        planned(path, arm)
    return ", ".join(loaded.arms)


def planned(path: Path, arm: str) -> float:
    """GiB of tensors that `eaft plan` expects on one device: without context and fragmentation, as torch counts."""
    config = resolve(load_recipe(str(path)), arm, ["device=cuda", "verl.trainer.n_gpus_per_node=1"])
    parts = plan_arm(config, machine_of(config, "1x80", None)).device
    return sum(size for name, size in parts.items() if name not in ("context", "fragmentation")) / 2**30


def trained(path: Path, arm: str, device: str) -> list[dict[str, Any]]:
    """Rows of the arm's training steps; RuntimeError with the end of what it said where it failed."""
    output = path.parent / f"runs_{device}"
    command = [sys.executable, "-m", "eaft_verl.cli", "train", str(path), "--arm", arm]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [*command, f"device={device}", f"output={output}"], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{arm} on {device}: {(done.stdout + done.stderr).strip()[-400:]}")
    rows = map(json.loads, (output / f"{arm}-seed0" / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["split"] == "train"]
