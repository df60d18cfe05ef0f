"""verl's metrics of a GRPO run, followed while it runs: all as they are, and a row under this project's names."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from eaft_verl.errors import Diverged, RunError
from eaft_verl.files import read_jsonl, write_jsonl
from eaft_verl.runs import Run
from eaft_verl.training.schedule import MAX_NONFINITE_STEPS

VERL_FILE = "metrics_verl.jsonl"
NAMES = {  # ours: verl's
    "loss": "actor/pg_loss",
    "policy_entropy": "actor/entropy_loss",  # over the whole vocabulary, of the responses: not an SFT arm's `entropy`
    "kl": "actor/kl_loss",
    "grad_norm": "actor/grad_norm",
    "lr": "actor/lr",
    "clip_fraction": "actor/pg_clipfrac",
    "response_length": "response_length/mean",
    "rollout_prob_diff_max": "training/rollout_probs_diff_max",
    "memory_gib": "actor/perf/max_memory_allocated_gb",
    "generation_s": "timing_s/gen",
    "update_s": "timing_s/update_actor",
    "weight_sync_s": "timing_s/update_weights",
    "old_log_prob_s": "timing_s/old_log_prob",
    "reference_s": "timing_s/ref",
}
COUNTED = (
    *("reward", "reward_std", "groups", "groups_equal", "clip_share", "rollout_memory_gib"),
    *("reward_timeouts", "reward_errors"),
)
FAULTS = ("reward_timeouts", "reward_errors")
MOSTLY_CUT = 0.9  # share of responses at the length limit, by which equal rewards are explained
TOTALS = ("seconds", "tokens", "samples", "generated_tokens")


def contract_row(step: int, values: dict[str, Any], before: dict[str, Any], per_epoch: int) -> dict[str, Any]:
    """A row of metrics.jsonl from verl's metrics of its step `step` (1, 2, ...) and the totals of the row before.

    Seconds are those of verl's step less what it took to save: an SFT arm's export does not count either. Every
    generated token is trained on once per pass over the batch, so `tokens` grows by what was generated.
    """
    seconds = values["timing_s/step"] - values.get("timing_s/save_checkpoint", 0.0)
    generated = values["eaft/generated_tokens"]
    updates = round(values["eaft/updates"])
    row = {
        "split": "train",
        "step": step * updates,
        "epoch": step / per_epoch,
        "time": time.time(),
        "seconds": before["seconds"] + seconds,
        "tokens": before["tokens"] + int(generated),
        "samples": before["samples"] + int(values["eaft/samples"]),
        "generated_tokens": before["generated_tokens"] + int(generated),
        "step_tokens": int(generated),
        "step_s": seconds,
        "tokens_per_s": generated / seconds,
    }
    row |= {name: values[theirs] for name, theirs in NAMES.items() if theirs in values}
    return row | {name: values[f"eaft/{name}"] for name in COUNTED if f"eaft/{name}" in values}


class Follower:
    """Reads the file verl's logger writes and appends to the run's; `poll` as often as rows should appear."""

    def __init__(self, run: Run, source: Path, per_epoch: int) -> None:
        self.run, self.source, self.per_epoch = run, source, per_epoch
        last = run.metrics()[-1:]
        self.totals = last[0] if last else dict.fromkeys(TOTALS, 0)
        self.read = 0

    def poll(self) -> list[dict[str, Any]]:
        """Rows that have come since the last call, logged to the run."""
        if not self.source.exists():
            return []
        with self.source.open("rb") as stream:
            stream.seek(self.read)
            text = stream.read()
        complete = text[: text.rfind(b"\n") + 1]
        self.read += len(complete)
        rows = []
        for line in complete.splitlines():
            entry = json.loads(line)
            if "timing_s/step" not in entry["data"]:
                continue
            with (self.run.path / VERL_FILE).open("a", encoding="utf-8") as stream:
                stream.write(line.decode() + "\n")
            self.totals = contract_row(entry["step"], entry["data"], self.totals, self.per_epoch)
            self.run.log(self.totals)
            rows.append(self.totals)
        return rows


class Watch:
    """What verl's trainer does not stop at. `see` every row as it comes; samples: those of the rows before."""

    def __init__(self, samples: int) -> None:
        self.nonfinite, self.silent, self.samples, self.told = 0, 0, samples, False

    def see(self, row: dict[str, Any]) -> None:
        """Warn of the first step whose rewards teach nothing, or most of whose responses could not be graded.

        Raises RunError when no response of the step could be graded, or the gradient has long not been finite.
        """
        samples, self.samples = row["samples"] - self.samples, row["samples"]
        faults = {name: int(row.get(name, 0)) for name in FAULTS}
        if sum(faults.values()) >= samples:
            raise RunError(
                f"step {row['step']}: none of {samples} responses could be graded: {faults['reward_timeouts']} times "
                f"the grader hung or crashed, {faults['reward_errors']} times it raised; mend reward.grader or raise "
                "reward.seconds"
            )
        if 2 * sum(faults.values()) > samples and not self.told:
            self.told = True
            print(
                f"eaft: warning: step {row['step']}: {sum(faults.values())} of {samples} responses could not be graded "
                f"({faults['reward_timeouts']} times the grader hung or crashed) and count as 0; mend reward.grader or "
                "raise reward.seconds",
                file=sys.stderr,
            )
        self.nonfinite = 0 if math.isfinite(row["grad_norm"]) else self.nonfinite + 1
        if self.nonfinite >= MAX_NONFINITE_STEPS:
            raise Diverged(f"the gradient norm was not finite for {self.nonfinite} steps in a row; lower verl.optim.lr")
        if no_signal(row):
            self.silent += 1
            if self.silent == 1:
                cut = row.get("clip_share", 0.0)
                advice = f"; {cut:.0%} of the responses were cut off: raise verl.data.max_response_length"
                print(
                    f"eaft: warning: step {row['step']}: all rewards of a prompt are equal, for every prompt (mean "
                    f"{row['reward']:.3g}): the policy gradient of such a step is zero{advice * (cut >= MOSTLY_CUT)}",
                    file=sys.stderr,
                )


def no_signal(row: dict[str, Any]) -> bool:
    """Whether every group of the step had equal rewards, so that all advantages were 0."""
    return "groups" in row and row["groups_equal"] == row["groups"]


def rewind(path: Path, step: int) -> None:
    """Drop the rows of a JSON-lines file after `step`."""
    if path.exists():
        write_jsonl(path, [row for row in read_jsonl(path) if row["step"] <= step])
