"""Sampling from a causal language model with transformers' `generate`, every response from a seed of its own.

The n samples of one prompt share its prefill: keys and values of a prompt are computed once and copied into the batch
for each request. Rows are padded on the left; those that have ended leave the batch when they are half of it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

LARGEST_UNIFORM = 1 - 1e-12  # keeps the inverse of the distribution function off its last, rounded entry


@dataclass(frozen=True)
class Sampling:
    """How the requests of a batch are sampled. temperature 0 is greedy; top_k -1 and top_p 1 exclude no token."""

    max_tokens: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    ignore_eos: bool = False
    stop_ids: frozenset[int] = frozenset()  # besides the model's own


@dataclass(eq=False)
class Request:
    """One prompt and what was sampled for it so far; `finish` is None, 'stop', 'length' or 'aborted'."""

    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish: str | None = None
    uniforms: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.rand(self.sampling.max_tokens, generator=generator, dtype=torch.float64)
        self.uniforms = drawn.clamp(max=LARGEST_UNIFORM)


class Decoder:
    """Responses to batches of requests; a response depends on weights, prompt and seed only, up to rounding.

    Args: model: transformers causal language model in eval mode; its generation config is replaced, whose penalties
    and temperature would act besides the requests'. stop_ids: tokens that end a response. max_tokens: of one prefill.
    """

    def __init__(self, model: Any, stop_ids: Iterable[int], max_tokens: int) -> None:
        self.model, self.stop_ids, self.max_tokens = model, frozenset(stop_ids), max_tokens
        model.generation_config = GenerationConfig(pad_token_id=0)

    @torch.inference_mode()
    def run(self, requests: Sequence[Request]) -> None:
        """Sample every request, all of one Sampling, to its end; setting `finish` from outside ends one early."""
        rows = [request for request in requests if not request.finish]
        if not rows:
            return
        ids, mask = _padded([request.prompt for request in rows])
        cache = self._prefill([request.prompt for request in rows])
        while rows:
            sampler = _Sampler(rows, self.stop_ids)
            ids = self.model.generate(
                ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=rows[0].sampling.max_tokens,
                do_sample=False,
                logits_processor=[sampler],
                stopping_criteria=[sampler.half_ended],
            )
            kept = [number for number, request in enumerate(rows) if not request.finish]
            mask = torch.cat([mask, mask.new_ones(len(rows), ids.shape[1] - mask.shape[1])], dim=1)[kept]
            ids, rows = ids[kept], [rows[number] for number in kept]
            cache.batch_select_indices(torch.tensor(kept, dtype=torch.long))

    def _prefill(self, prompts: list[tuple[int, ...]]) -> DynamicCache:
        """Keys and values of all but the last token of each prompt, equal prompts computed once."""
        width, different = max(map(len, prompts)), list(dict.fromkeys(prompts))
        if width == 1:
            return DynamicCache(config=self.model.config)
        ids, mask = (part[:, :-1] for part in _padded(different))
        parts = []
        for some in torch.arange(len(different)).split(max(1, self.max_tokens // width)):
            parts.append(DynamicCache(config=self.model.config))
            self.model(
                input_ids=ids[some],
                attention_mask=mask[some],
                position_ids=(mask[some].cumsum(dim=1) - 1).clamp(min=0),
                past_key_values=parts[-1],
                use_cache=True,
                logits_to_keep=1,
            )
        for layer, *others in zip(*(part.layers for part in parts), strict=True):
            for name in ("keys", "values") if others else ():
                setattr(layer, name, torch.cat([getattr(one, name) for one in (layer, *others)]))
        number = {prompt: row for row, prompt in enumerate(different)}
        parts[0].batch_select_indices(torch.tensor([number[prompt] for prompt in prompts]))
        return parts[0]


class _Sampler(LogitsProcessor):
    """Draws the next token of every row and leaves only that one possible, so that greedy `generate` follows."""

    def __init__(self, requests: list[Request], stop_ids: frozenset[int]) -> None:
        self.requests, self.stop_ids = requests, stop_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, log_probs = sample(scores, self.requests)
        for request, token, log_prob in zip(self.requests, tokens.tolist(), log_probs.tolist(), strict=True):
            if request.finish:
                continue
            request.tokens.append(token)
            request.log_probs.append(log_prob)
            if token in self.stop_ids | request.sampling.stop_ids and not request.sampling.ignore_eos:
                request.finish = "stop"
            elif len(request.tokens) == request.sampling.max_tokens:
                request.finish = "length"
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    def half_ended(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Stopping criterion of all rows at once: half of them are carried along for nothing."""
        ended = sum(request.finish is not None for request in self.requests)
        return torch.full((len(self.requests),), 2 * ended >= len(self.requests))


def sample(logits: Tensor, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
    """The next token of each request from logits [B, V], and its log-probability; both [B].

    The token comes from softmax(logits / temperature) after top_k and top_p: the inverse of its distribution function
    at the request's own uniform number, so rows do not depend on each other. The log-probability is that of
    softmax(logits / temperature) itself, which is the policy in verl's ratio whatever was excluded from sampling.
    """
    settings = requests[0].sampling
    scores = logits.float() / (settings.temperature or 1.0)
    log_probs = scores.log_softmax(dim=-1)
    none = torch.empty(0, dtype=torch.long)  # these two do not look at the tokens before
    if settings.top_k > 0:
        scores = TopKLogitsWarper(settings.top_k)(none, scores)
    if settings.top_p < 1:
        scores = TopPLogitsWarper(settings.top_p)(none, scores)
    if settings.temperature == 0:
        tokens = scores.argmax(dim=-1)
    else:
        cumulated = scores.double().softmax(dim=-1).cumsum(dim=-1)
        turns = [min(len(request.tokens), settings.max_tokens - 1) for request in requests]  # ended rows go along
        uniform = torch.stack([request.uniforms[turn] for request, turn in zip(requests, turns, strict=True)])[:, None]
        drawn = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)
        tokens = drawn[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0]


def _padded(prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [B, longest] each, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    return ids, torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
