"""`eaft plan --probe`: the longest micro-batch of an arm run for real on one device here, with its plan beside it."""

import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from eaft_verl.boundary import python_command
from eaft_verl.errors import ConfigError, RunError
from eaft_verl.files import read_json, write_json
from eaft_verl.models import resolve_model
from eaft_verl.planning.formulas import Setup, training_phases
from eaft_verl.planning.setup import arm_of
from eaft_verl.planning.speed import update_flops
from eaft_verl.recipe.config import Config, as_yaml, changed
from eaft_verl.recipe.matching import GRPO
from eaft_verl.recipe.views import anchor_reference, objective_of

TIMEOUT_S = 1800
# resident memory of a CPU process is its live tensors only where glibc gives every large block back
RESIDENT_IS_LIVE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}


def probe(config: Config) -> dict[str, Any]:
    """{peak, planned: bytes; step_s; tokens; flops: FLOP/s} of one device that holds the whole model.

    ConfigError for an arm without a step of ours (GRPO); RunError with the child's last words when it fails.
    """
    if config.trainer == GRPO:
        raise ConfigError(f"--probe runs a training step of this package; arm {config.arm} has trainer=grpo: use --arm")
    arm = arm_of(config)
    setup, lengths = alone(arm.setup, arm.amount.longest)
    phases = training_phases(setup)
    planned = max(sum(parts.values()) for parts in phases.values())
    measured = _run(config, lengths, setup)
    return {**measured, "planned": planned, "flops": update_flops(setup) / measured["step_s"]}


def alone(setup: Setup, longest: int) -> tuple[Setup, list[int]]:
    """The setup of one device that does one micro-batch of the same tokens, and the lengths of its sequences."""
    full = min(longest, setup.tokens)
    rest = setup.tokens % full
    lengths = [full] * (setup.tokens // full) + ([rest] if rest > 1 else [])
    attended = sum(length**2 for length in lengths) / sum(lengths)
    single: dict[str, Any] = dict.fromkeys(("devices", "nodes", "shards", "sequence_parallel", "micro_batches"), 1)
    single |= {"tokens": sum(lengths), "update_tokens": sum(lengths), "attended": attended}
    return replace(setup, **single, packed=len(lengths) > 1, extra_forwards=0.0), lengths


def _run(config: Config, lengths: list[int], setup: Setup) -> dict[str, Any]:
    """Start the child on a configuration of one device and read what it wrote."""
    alone_here = {
        **{"verl.trainer.nnodes": 1, "verl.trainer.n_gpus_per_node": 1, "verl.engine.fsdp_size": -1},
        **{"verl.engine.ulysses_sequence_parallel_size": 1, "verl.data.train_batch_size": len(lengths)},
        **{"verl.data.use_dynamic_bsz": True, "verl.data.max_token_len_per_gpu": sum(lengths)},
        "verl.engine.wrap_policy.disable": setup.one_unit,  # as on all of the arm's devices
    }
    with tempfile.TemporaryDirectory(prefix="eaft-probe-") as folder:
        place = Path(folder)
        (place / "config.yaml").write_text(as_yaml(changed(config, alone_here)), encoding="utf-8")
        job = {"folder": folder, "config": str(place / "config.yaml"), "out": str(place / "out.json")}
        model = {"model": str(resolve_model(config.model)), "reference": _reference(config), "vocab": setup.model.vocab}
        write_json(place / "job.json", {**job, **model, "lengths": lengths})
        command = python_command("eaft_verl.training.sft.step_probe", str(place / "job.json"))
        done = subprocess.run(
            command, env=_environment(config.device), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        if done.returncode:
            words = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
            raise RunError(
                f"probe of arm {config.arm}, {sum(lengths)} tokens on one device, ended with {done.returncode}: "
                f"{' | '.join(words)}. One device must hold the whole model: "
                "probe a smaller one, or shorter micro-batches"
            )
        return read_json(place / "out.json")


def _reference(config: Config) -> str | None:
    """The model that the workers of this arm load beside the trained one."""
    anchor = objective_of(config).anchor
    if anchor is None or not anchor.full or (anchor.reference is None and config.verl.model.lora_rank):
        return None
    return str(resolve_model(anchor_reference(config) or config.model))


def _environment(device: str) -> dict[str, str]:
    """The child's: on a CPU one that lets resident memory be read as live tensors."""
    wanted = {"VERL_LOGGING_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        wanted |= {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", **RESIDENT_IS_LIVE}
    return {**wanted, **os.environ, **(RESIDENT_IS_LIVE if device == "cpu" else {})}
