"""Run directories as evaluation and training would leave them, without either: deterministic and small.

base, sft, eaft = make_runs(folder)              # the three runs of one recipe
make_arm(folder / "sft1", "sft", seed=1)         # another seed
make_arm(folder / "grpo", "grpo")                # an arm that generates: no objective, no weights, rewards instead
make_arm(folder / "slow", "slow", shape="sft", control={"of": "eaft", "by": "nll", ...})
edit(sft / "run.json", lambda info: {**info, "status": "running"})
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eaft_verl.files import read_json, write_json
from eaft_verl.runs import Run

STEPS = (3, 6, 9, 12)
EXAMPLES = 40
TARGET = ("chain_sum", "gsm8k")
GENERAL = ("ifeval", "mmlu")
KEYS = {"model": "m0", "data": "d0", "template": "t0", "evaluation": "e0"}
HOSTILE = "<script>alert('x')</script> | 4 + 3 = 7"
# accuracy at steps 0, 3, 6, 9, 12 in fortieths; NLL and KL in nats
SHAPES: dict[str, dict[str, list[float]]] = {
    "sft": {
        "chain_sum": [16, 22, 26, 28, 28],
        "gsm8k": [2, 4, 6, 6, 7],
        "ifeval": [12, 11, 9, 8, 7],
        "mmlu": [14, 14, 13, 13, 12],
        "heldout": [1.60, 1.00, 0.88, 0.92, 1.05],
        "drift": [0.0, 0.05, 0.10, 0.16, 0.21],
    },
    "eaft": {
        "chain_sum": [16, 20, 25, 28, 29],
        "gsm8k": [2, 3, 5, 7, 7],
        "ifeval": [12, 12, 11, 10, 10],
        "mmlu": [14, 14, 14, 13, 14],
        "heldout": [1.60, 1.06, 0.91, 0.89, 0.93],
        "drift": [0.0, 0.035, 0.075, 0.115, 0.15],
    },
    "grpo": {
        "chain_sum": [16, 18, 21, 24, 27],
        "gsm8k": [2, 3, 4, 6, 8],
        "ifeval": [12, 12, 12, 11, 12],
        "mmlu": [14, 14, 14, 14, 13],
        "heldout": [1.60, 1.58, 1.55, 1.53, 1.50],
        "drift": [0.0, 0.01, 0.02, 0.035, 0.05],
    },
}


def make_runs(folder: Path, arms: tuple[str, ...] = ("sft", "eaft")) -> list[Path]:
    """[base, arm, ...] under `folder`, comparable with each other."""
    return [make_base(folder / "base"), *(make_arm(folder / arm, arm) for arm in arms)]


def make_base(path: Path) -> Path:
    """The evaluated base model: step 0 only."""
    keys = {key: value for key, value in KEYS.items() if key != "data"}
    run = Run.create(path, info=_info("base", "base", 0, keys, 0), config=_config("base", 0, path), env=_env(1))
    _evaluate(run, "sft", 0, 0, 0)
    run.update(status="finished", eval_seconds=31.5, finished=2.0)
    return path


def make_arm(
    path: Path,
    arm: str,
    seed: int = 0,
    shape: str | None = None,
    control: dict[str, Any] | None = None,
    steps: tuple[int, ...] = STEPS,
) -> Path:
    """A finished arm with an evaluation at each of `steps` and every step logged.

    control: what its run.json says was derived from the arm it is a control of.
    """
    run = Run.create(
        path,
        info=_info("arm", arm, seed, KEYS, steps[-1], control),
        config=_config(arm, seed, path, control),
        env=_env(len(arm)),
    )
    for index, step in enumerate(steps, 1):
        _evaluate(run, shape or arm, index, step, seed)
    _log(run, arm, seed, steps)
    run.update(status="finished", train_seconds=10.0 * steps[-1], workers=2, eval_seconds=60.25, finished=3.0)
    return path


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite one JSON file of a run directory."""
    write_json(path, change(read_json(path)))


def edit_samples(path: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Rewrite one samples file of a run directory."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)), encoding="utf-8")


def _info(
    kind: str, arm: str, seed: int, keys: dict[str, str], steps: int, control: dict[str, Any] | None = None
) -> dict[str, Any]:
    declared = ["trainer"] if arm == "grpo" else ["control.by", "control.of"] if control else ["objective.name"]
    return {
        "kind": kind,
        "recipe": "quickstart",
        "arm": arm,
        "seed": seed,
        "model": "SmolLM2-135M-Instruct",
        "total_steps": steps,
        "keys": keys,
        "declared": declared,
        "derived": {"control": control} if control else {},
    }


def _config(arm: str, seed: int, path: Path, control: dict[str, Any] | None = None) -> str:
    own = f"arm: {arm}\nseed: {seed}\noutput: {path}\ncompare: {{match: updates, to: sft}}\n"
    if arm == "grpo":
        own += "trainer: grpo\nobjective: null\nverl:\n  rollout:\n    n: 4\n    name: hf\n"
    else:
        name = "sft" if control else arm
        own += f"trainer: sft\nobjective:\n  name: {name}\n  top_k: 20\nverl:\n"
    own += f"control: {json.dumps(control and {key: control[key] for key in ('of', 'by')})}\n"
    return own.replace("verl:\n", "verl:\n  optim:\n    lr: 1.0e-5\n")


def _env(number: int) -> dict[str, Any]:
    return {"python": "3.11.9", "commit": "0123abc", "packages": {"verl": "0.9.1"}, "hostname": f"node{number}"}


def _evaluate(run: Run, shape: str, index: int, step: int, seed: int) -> None:
    for side, names in (("target", TARGET), ("general", GENERAL)):
        for name in names:
            _accuracy(run, name, side, round(SHAPES[shape][name][index]) + seed, step)
    _losses(run, "heldout", "target", {"nll": (SHAPES[shape]["heldout"][index] + 0.01 * seed, False)}, step)
    kl = SHAPES[shape]["drift"][index] * (1 + 0.1 * seed)
    metrics = {"kl": (kl, False), "agreement": (1 - 0.5 * kl, True), "nll": (1.70 + 0.4 * kl, False)}
    _losses(run, "drift", "drift", metrics, step)


def _accuracy(run: Run, name: str, side: str, right: int, step: int) -> None:
    """`right` of the examples are right, the same ones first in a fixed shuffled order."""
    order = np.random.default_rng(len(name)).permutation(EXAMPLES)
    rows = []
    for place, example in enumerate(order):
        correct = float((place - step) % EXAMPLES < right)
        said = f"4 + 3 = {7 if correct else 8}, so after {step} steps the answer is {example}. " * (1 + 5 * (place % 2))
        rows.append(
            {
                "id": f"{name}-{example:03d}",
                "scores": {"exact_match": correct},
                "prompt": f"Question {example}: what is 4 + 3?",
                "response": HOSTILE if example == 0 else said,
                "target": "7",
            }
        )
    score = right / EXAMPLES
    metrics = {
        "exact_match": {"score": score, "stderr": math.sqrt(score * (1 - score) / EXAMPLES), "higher_is_better": True}
    }
    run.write_eval(step, name, _record(name, side, "exact_match", metrics, step, EXAMPLES), rows)


def _losses(run: Run, name: str, side: str, means: dict[str, tuple[float, bool]], step: int) -> None:
    """Teacher-forced metrics: per-example values around the mean, recorded as their mean over tokens."""
    rng = np.random.default_rng(len(name))
    number = 24
    tokens = rng.integers(20, 120, number).astype(float)
    noise = rng.normal(1.0, 0.35, number)
    noise /= np.average(noise, weights=tokens)
    rows: list[dict[str, Any]] = [
        {"id": f"{name}-{i:02d}", "scores": {}, "tokens": int(tokens[i])} for i in range(number)
    ]
    for metric, (mean, higher) in means.items():
        values = 1 - (1 - mean) * noise if higher else mean * noise
        for row, value in zip(rows, values, strict=True):
            row["scores"][metric] = float(value)
    metrics = {
        metric: {"score": mean, "stderr": None, "higher_is_better": higher} for metric, (mean, higher) in means.items()
    }
    run.write_eval(step, name, _record(name, side, next(iter(means)), metrics, step, number), rows)


def _record(name: str, side: str, metric: str, metrics: dict[str, Any], step: int, n: int) -> dict[str, Any]:
    hashes = {"task_version": "1", "prompt_hash": f"p-{name}", "data_hash": f"d-{name}"}
    base = {"benchmark": name, "side": side, "metric": metric, "step": step, "metrics": metrics, "n": n, **hashes}
    return {**base, "backend": "hf", "harness": "lm_eval 0.4.13", "seconds": 1.5}


def _log(run: Run, arm: str, seed: int, steps: tuple[int, ...]) -> None:
    if arm == "grpo":
        return _log_grpo(run, steps)
    weight = 0.35 if arm == "eaft" else 1.0
    for step in range(1, steps[-1] + 1):
        fade, wave = math.exp(-step / 5), 0.03 * math.sin(step + seed)
        nll = 0.35 + 1.2 * fade + wave + (0.06 if arm == "eaft" else 0)
        row: dict[str, Any] = {
            "split": "train",
            "step": step,
            "epoch": step / 6,
            "time": 1e9 + step,
            "seconds": 10.0 * step,
            "tokens": 600 * step,
            "samples": 8 * step,
            "loss": nll * weight,
            "nll": nll,
            "token_accuracy": (0.88 if arm == "eaft" else 0.9) - 0.3 * fade,
            "entropy": (0.45 if arm == "eaft" else 0.4) + 0.8 * fade,
            "weight_mean": weight * (0.5 + 0.5 * fade) if arm == "eaft" else 1.0,
            "weight_p10": 0.02 if arm == "eaft" else 1.0,
            "weight_p50": 0.3 if arm == "eaft" else 1.0,
            "weight_p90": 0.5 + 0.3 * fade if arm == "eaft" else 1.0,
            "ess": 0.45 + 0.1 * fade if arm == "eaft" else 1.0,
            "conflict_share": (0.02 if arm == "eaft" else 0.017) * fade,
            "nll_low_entropy": (0.16 if arm == "eaft" else 0.1) + 0.9 * fade,
            "nll_high_entropy": (1.05 if arm == "eaft" else 1.1) + 0.8 * fade,
            "grad_norm": 4.0 * fade * weight + 0.3,
            "lr": 1e-5 * 0.5 * (1 + math.cos(math.pi * step / 12)),
            "step_tokens": 600,
            "tokens_per_s": 60.0,
            "memory_gib": 4.5 + 0.01 * step,
        }
        if step == 4:
            del row["entropy"]
        if step == 5 and arm == "sft":
            row["loss"] = math.nan
        run.log(row)
        if step in steps:
            run.log({"split": "val", "step": step, "nll": nll + 0.1, "token_accuracy": 0.6, "entropy": None})
    return None


def _log_grpo(run: Run, steps: tuple[int, ...]) -> None:
    """Rows without weights and NLL, with what only generation has: of 10 s a step, 7 s are generation."""
    for step in range(1, steps[-1] + 1):
        row = {"split": "train", "step": step, "epoch": step / 6, "time": 1e9 + step, "seconds": 10.0 * step}
        row |= {"tokens": 500 * step, "generated_tokens": 500 * step, "samples": 16 * step, "loss": 0.01 * step}
        row |= {"reward": 0.3 + 0.02 * step, "reward_std": 0.4, "groups": 4, "groups_equal": step % 3}
        row |= {"response_length": 31.0, "clip_share": 0.0, "generation_s": 7.0, "update_s": 2.0, "step_s": 10.0}
        run.log(row | {"entropy": 0.5, "grad_norm": 0.2, "lr": 1e-6, "step_tokens": 500, "memory_gib": 6.0})
