"""The rollout samples from the model that the trainer trains, and both are the model that transformers computes.

Before the first step every rollout server answers a few prompts with a few tokens. Their log-probabilities are computed
again by the trainer's engine, packed as its batches are, and by a plain forward pass. Importance ratios, the KL penalty
and the clip are differences of the first two: where they differ for another reason than an update, a run teaches noise,
and no metric says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import ray
import torch
from torch import Tensor
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.utils.device import get_device_id, get_torch_device

from eaft_verl.data.parquet import Example
from eaft_verl.errors import RunError
from eaft_verl.training.sft.batches import make_batch
from eaft_verl.training.sft.self_check import (
    LENGTH,
    ROWS,
    SHARE,
    apart,
    known,
    mean_of,
    plain_nll,
    plain_said,
    tolerance,
)

SAMPLED = 16  # tokens of a response


@dataclass(frozen=True)
class RolloutCheck:
    """Mean NLL of the sampled tokens, nats, three ways; the largest mean difference of a row; what is allowed.

    difference: of rollout and trainer over the sampled tokens; plain_difference: of trainer and transformers over all.
    """

    rows: int
    tokens: int
    rollout: float
    trainer: float
    plain: float | None
    difference: float
    plain_difference: float | None
    tolerance: float
    skipped: str

    @property
    def line(self) -> str:
        """For the terminal."""
        part = f" of the first {ROWS}" if self.plain is not None and self.rows > ROWS else ""  # several servers
        plain = plain_said(self.plain, self.skipped) + part
        return (
            f"self-check: {self.rows} rows, {self.tokens} sampled tokens: NLL rollout {self.rollout:.5f}, trainer "
            f"{self.trainer:.5f}, {plain}; a row differs by {max(self.difference, self.plain_difference or 0):.2g} "
            f"({self.tolerance:.2g} allowed)"
        )


def self_check(trainer: Any) -> dict[str, Any]:
    """What verl's trainer, its weights sent to a rollout that is awake, finds; RunError for a mismatch.

    The rollout sleeps afterwards, as it does between sampling and an update.
    """
    settings = trainer.config.actor_rollout_ref
    sampled = sample(trainer.llm_server_manager.server_handles, prompts(trainer), settings.rollout.response_length)
    trainer.checkpoint_manager.sleep_replicas()
    rows = [prompt + answer for prompt, answer, _ in sampled]
    engine = engine_nll(trainer.actor_rollout_wg, rows)
    plain, skipped = _plain(trainer, rows[:ROWS])
    found = compare(sampled, engine, plain, skipped, tolerance(str(settings.rollout.dtype)))
    require_equal(found)
    return {"line": found.line, **known(found)}


Sampled = tuple[list[int], list[int], list[float]]  # prompt, response, log-probability of each token of it


def prompts(trainer: Any) -> list[list[int]]:
    """The first tokens of ROWS prompts, evenly spaced in the data."""
    data, count = trainer.train_dataset, len(trainer.train_dataset)
    messages = [data[place]["raw_prompt"] for place in sorted({number * count // ROWS for number in range(ROWS)})]
    ids = [
        trainer.tokenizer.apply_chat_template(list(m), add_generation_prompt=True, return_dict=False) for m in messages
    ]
    return [one[: LENGTH - SAMPLED] for one in ids]


def sample(servers: Sequence[Any], prompts: Sequence[list[int]], longest: int) -> list[Sampled]:
    """An answer of each server to each prompt, with the log-probabilities that it sampled from."""
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
    settings |= {"ignore_eos": True, "max_tokens": min(SAMPLED, longest)}
    asked = [(server, prompt) for server in servers for prompt in prompts]
    answers = ray.get(
        [
            server.generate.remote(
                prompt_ids=prompt, sampling_params={**settings, "seed": seed}, request_id=uuid4().hex
            )
            for seed, (server, prompt) in enumerate(asked)
        ]
    )
    return [
        (prompt, list(answer.token_ids), list(answer.log_probs))
        for (_, prompt), answer in zip(asked, answers, strict=True)
    ]


def engine_nll(group: Any, rows: Sequence[list[int]]) -> list[Tensor]:
    """NLL [L - 1] of every row by every data-parallel rank of the trainer, ROWS rows in a micro-batch."""
    examples = [Example("", [], ids, [0] + [1] * (len(ids) - 1)) for ids in rows]
    flags = {"temperature": 1.0, "pad_mode": DatasetPadMode.NO_PADDING, "compute_loss": False}
    flags |= {"calculate_entropy": False, "use_dynamic_bsz": False, "micro_batch_size_per_gpu": ROWS}
    batch = make_batch(examples, list(range(len(rows))) * group.world_size, flags)
    return [-one[:-1].double() for one in group.compute_log_prob(batch)["log_probs"].unbind()]


def compare(
    sampled: Sequence[Sampled], engine: Sequence[Tensor], plain: Sequence[Tensor], skipped: str, allowed: float
) -> RolloutCheck:
    """engine: NLL of all rows, as often as there are ranks; plain: of the first rows."""
    rollout = [-torch.tensor(log_probs, dtype=torch.float64) for _, _, log_probs in sampled]
    copies = len(engine) // len(rollout)
    answers = [one[-len(log_probs) :] for one, log_probs in zip(engine, rollout * copies, strict=True)]
    ends = [one[-len(log_probs) :] for one, log_probs in zip(plain, rollout, strict=False)]
    return RolloutCheck(
        rows=len(rollout),
        tokens=sum(map(len, rollout)),
        rollout=mean_of(rollout),
        trainer=mean_of(answers),
        plain=mean_of(ends) if ends else None,
        difference=apart(answers, rollout * copies),
        plain_difference=apart(engine[: len(plain)], plain) if plain else None,
        tolerance=allowed,
        skipped=skipped,
    )


def require_equal(found: RolloutCheck) -> None:
    """RunError for the first comparison that is not within tolerance."""
    if found.plain_difference is not None and not found.plain_difference <= found.tolerance:
        raise RunError(
            f"self-check: the trainer computes another model than transformers does: NLL {found.trainer:.5f} and "
            f"{found.plain:.5f} of {found.tokens} sampled tokens, a row differs by {found.plain_difference:.2g} "
            f"(allowed {found.tolerance:.2g}): set verl.model.use_remove_padding=false or "
            "verl.model.override_config.attn_implementation=eager, or leave out external_lib"
        )
    if not found.difference <= found.tolerance:
        raise RunError(
            f"self-check: the rollout samples from another model than the trainer trains: NLL {found.rollout:.5f} and "
            f"{found.trainer:.5f} of {found.tokens} sampled tokens, a row differs by {found.difference:.2g} (allowed "
            f"{found.tolerance:.2g}): leave out what changes one of the two: external_lib, "
            "verl.actor_rollout_ref.rollout.engine_kwargs and quantization"
        )


def _plain(trainer: Any, rows: Sequence[list[int]]) -> tuple[list[Tensor], str]:
    """NLL [L - 1] of the rows by transformers alone, beside the trainer's first worker, or none and why."""
    if trainer.global_steps:
        return [], f"the weights are those of step {trainer.global_steps}"
    model: Any = omega_conf_to_dataclass(trainer.config.actor_rollout_ref.model)
    given = (model.path, model.hf_config, model.lora_adapter_path, rows)
    return ray.get(trainer.actor_rollout_wg.workers[0].__ray_call__.remote(_plain_there, *given))


def _plain_there(worker: Any, model: str, config: Any, adapter: str | None, rows: Any) -> tuple[list[Tensor], str]:
    free = get_torch_device().mem_get_info()[0]
    return plain_nll(model, config, adapter, rows, get_device_id(), SHARE * free)
