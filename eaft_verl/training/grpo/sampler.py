"""verl's replay buffer with our eyes on it: a step's samples are counted, kept in part, refused when incomplete."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import ray
import transfer_queue as tq
from tensordict import NonTensorData
from transfer_queue import KVBatchMeta
from transformers import AutoTokenizer
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from eaft_verl.errors import RunError
from eaft_verl.training.grpo.states import CAUSE_FILE
from eaft_verl.training.verl_cpu.private import group_of

POLL_S = 0.1  # verl looks every 2 s, which is most of a small model's step
PREFIX = "eaft/"
FIELDS = ("raw_prompt", "responses", "rollout_log_probs", "rm_scores", "extra_fields")
REWARD_FAULTS = ("reward_timeouts", "reward_errors")  # of our reward function; one of the user's own has none
Rollout = dict[str, Any]


class RolloutBuffer(ReplayBuffer):
    """verl's sampler for its mode `sync`; `sampler_kwargs` carries ours and what verl keeps from foreign samplers.

    ours: run, tokenizer (paths), updates (per step), kept (rollouts per step in rollouts.jsonl), stop_ids, longest
    (tokens of a response), most_batches (batches of prompts that a step may take when groups are filtered), servers
    (names of the rollout servers whose memory is asked for).
    """

    def __init__(self, *, sampler_kwargs: Any, refill_fn: Callable[[int], int], **kwargs: Any) -> None:
        super().__init__(
            sampler_kwargs=sampler_kwargs,
            poll_interval=POLL_S,
            refill_fn=self._refill,
            **sampler_kwargs.verl,
            **kwargs,
        )
        self.ours = sampler_kwargs.ours
        self.tokenizer = AutoTokenizer.from_pretrained(self.ours.tokenizer)
        self.submit, self.step, self.asked = refill_fn, 0, 0

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict[str, Any]]:
        """verl's batch in an order that does not depend on arrival, and its metrics with ours.

        Raises RunError when a response of the step could not be made or graded, where verl trains on what is left, and
        when filtering leaves no full batch, where verl goes on for ever.
        """
        self.step, self.asked = global_steps, batch_size
        try:
            batch, metrics = super().sample(global_steps, partition_id, batch_size)
        except RunError:
            raise
        except RuntimeError as error:
            raise RunError(self._cause(global_steps)) from error
        if self.failure_keys[partition_id]:
            raise RunError(self._cause(global_steps))
        rollouts = self._fetch(batch)
        order = sorted(range(len(rollouts)), key=lambda row: (rollouts[row]["order"], rollouts[row]["sample"]))
        batch.keys, batch.tags = ([items[row] for row in order] for items in (batch.keys, batch.tags))
        rollouts = [rollouts[row] for row in order]
        self._write(rollouts, global_steps)
        return batch, {**metrics, **step_metrics(rollouts), **self._memory(), f"{PREFIX}updates": self.ours.updates}

    def _refill(self, prompts: int) -> int:
        """More prompts, for those whose group was filtered out."""
        self.asked += prompts
        if self.asked > self.ours.most_batches * self.train_batch_size:
            raise RunError(
                f"step {self.step}: {self.ours.most_batches} batches of prompts held too few groups that differ in "
                f"{self.filter_groups_metric!r}; take prompts that the model solves sometimes, raise "
                "verl.actor_rollout_ref.rollout.n or temperature, switch verl.algorithm.filter_groups.enable off, or "
                "raise its max_num_gen_batches"
            )
        return self.submit(prompts)

    def _cause(self, step: int) -> str:
        """What the agent loop wrote of its failure."""
        file = Path(self.ours.run) / CAUSE_FILE
        cause = file.read_text(encoding="utf-8").strip() if file.exists() else "see the logs of Ray's workers"
        return f"step {step}: a response could not be sampled or graded: {cause}"

    def _fetch(self, batch: KVBatchMeta) -> list[Rollout]:
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(FIELDS))
        columns = [list(data[name]) for name in FIELDS]
        made = []
        for key, prompt, tokens, log_probs, rewards, extra in zip(batch.keys, *columns, strict=True):
            uid, sample = group_of(key)
            messages = _unwrapped(prompt)
            made.append(
                {
                    "group": uid,
                    "sample": sample,
                    "order": json.dumps(messages, sort_keys=True, default=str),
                    "prompt": messages,
                    "tokens": tokens.tolist(),
                    "log_probs": log_probs.tolist(),
                    "reward": float(rewards.sum()),
                    "faults": _unwrapped(extra)["reward_extra_info"],
                    "finish": finish_of(tokens.tolist(), self.ours.longest, self.ours.stop_ids),
                }
            )
        return made

    def _write(self, rollouts: list[Rollout], step: int) -> None:
        """Keep the first `kept` rollouts, group after group, in RUN/rollouts.jsonl."""
        rows = [
            {
                "step": step * self.ours.updates,
                "response": self.tokenizer.decode(rollout["tokens"], skip_special_tokens=True),
                **{name: rollout[name] for name in ("prompt", "tokens", "log_probs", "reward", "finish")},
            }
            for rollout in rollouts[: self.ours.kept]
        ]
        with (Path(self.ours.run) / "rollouts.jsonl").open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def _memory(self) -> dict[str, float]:
        """Peak resident GiB of the largest rollout server, where servers can be asked."""
        servers = [ray.get_actor(name) for name in self.ours.servers]
        peaks: list[float] = ray.get([server.peak_memory.remote() for server in servers])
        return {f"{PREFIX}rollout_memory_gib": max(peaks)} if peaks else {}


def step_metrics(rollouts: list[Rollout]) -> dict[str, float]:
    """Counts of one step: responses, their tokens, reward mean and deviation, groups, and groups of equal rewards.

    A group whose rewards are all equal has advantage 0 everywhere and trains nothing. clip_share: responses that met
    the length limit; verl's `response_length/clip_ratio` is the share of the longest ones, whatever their length.
    reward_timeouts, reward_errors: responses that could not be graded and got reward 0.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        groups[rollout["group"]].append(rollout["reward"])
    rewards = [rollout["reward"] for rollout in rollouts]
    found = {
        "samples": len(rollouts),
        "generated_tokens": sum(len(rollout["tokens"]) for rollout in rollouts),
        "reward": fmean(rewards),
        "reward_std": pstdev(rewards),
        "groups": len(groups),
        "groups_equal": sum(1 for values in groups.values() if max(values) == min(values)),
        "clip_share": fmean(rollout["finish"] == "length" for rollout in rollouts),
        **{name: sum(rollout["faults"].get(name, 0) for rollout in rollouts) for name in REWARD_FAULTS},
    }
    return {PREFIX + name: float(value) for name, value in found.items()}


def finish_of(tokens: Sequence[int], longest: int, stop_ids: Sequence[int]) -> str:
    """Why a response ended: 'length' only where it has `longest` tokens and the last one would not have ended it."""
    return "length" if len(tokens) >= longest and tokens[-1] not in stop_ids else "stop"


def _unwrapped(value: Any) -> Any:
    """What a tensordict holds of a row that is no tensor; some stores hand it over wrapped."""
    return value.data if isinstance(value, NonTensorData) else value
