"""Sampling from a causal language model on one device: requests join and leave a running batch at any step.

The n samples of one prompt share its prefill: keys and values of a prompt are computed once per version of the weights
and copied into the batch for each request. Rows are padded on the left, so that all of them grow at the same end.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

LARGEST_UNIFORM = 1 - 1e-12  # keeps the inverse of the distribution function off its last, rounded entry


@dataclass(frozen=True)
class Sampling:
    """How one request is sampled. temperature 0 is greedy; top_k -1 and top_p 1 leave every token possible."""

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    ignore_eos: bool = False


@dataclass(eq=False)
class Request:
    """One prompt and what was sampled for it so far; `finish` is None, 'stop', 'length' or 'aborted'."""

    prompt: tuple[int, ...]
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish: str | None = None
    uniforms: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.sampling.seed)
        drawn = torch.rand(self.sampling.max_tokens, generator=generator, dtype=torch.float64)
        self.uniforms = drawn.clamp(max=LARGEST_UNIFORM)


@dataclass
class _Prefix:
    """A prompt's keys and values, [1, heads, T, D] each per layer, and the logits after it, [V]."""

    layers: list[tuple[Tensor, Tensor]]
    logits: Tensor


class Decoder:
    """The batch: `submit` requests, call `step` while `busy`; finished requests come back from `step`.

    A request's text depends on weights, prompt and seed only, up to the rounding of batched matrix products.

    Args: model: transformers causal language model in eval mode. stop_ids: tokens that end a response. max_rows:
    requests in the batch at once. max_tokens: prompt tokens per prefill, and prompt tokens kept for later requests.
    """

    def __init__(self, model: Any, stop_ids: Iterable[int], max_rows: int, max_tokens: int) -> None:
        self.model, self.stop_ids = model, frozenset(stop_ids)
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.prefills = 0  # prompts prefilled so far
        self._prefixes: OrderedDict[tuple[int, ...], _Prefix] = OrderedDict()
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._mask = torch.zeros(0, 0, dtype=torch.long)  # [rows, cached tokens], 0 on padding

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self.waiting or self.running)

    def submit(self, request: Request) -> None:
        """Put a request in the queue; it joins the batch at the next step with room."""
        self.waiting.append(request)

    def forget(self) -> None:
        """Drop kept prompts: the weights have changed. Running requests keep what they have."""
        self._prefixes.clear()

    def abort(self) -> list[Request]:
        """End all requests where they are, finish 'aborted'."""
        ended = [*self.running, *self.waiting]
        for request in ended:
            request.finish = "aborted"
        self.running, self._layers, self._mask = [], [], torch.zeros(0, 0, dtype=torch.long)
        self.waiting.clear()
        return ended

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Sample one token of every running request and the first of those that join; those that ended."""
        ended = self._extend()
        return ended + self._admit()

    def _extend(self) -> list[Request]:
        if not self.running:
            return []
        cache = _cache(self._layers)
        positions = self._mask.sum(dim=1, keepdim=True)
        self._mask = torch.cat([self._mask, torch.ones(len(self.running), 1, dtype=torch.long)], dim=1)
        last = torch.tensor([[request.tokens[-1]] for request in self.running])
        output = self.model(
            input_ids=last,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        self._layers = _layers(output.past_key_values)
        self._take(self.running, output.logits[:, -1])
        ended = [request for request in self.running if request.finish]
        if ended:
            self._keep([row for row, request in enumerate(self.running) if not request.finish])
        return ended

    def _keep(self, rows: list[int]) -> None:
        """Only these rows of the batch go on; columns that pad all of them are cut off."""
        self.running = [self.running[row] for row in rows]
        index = torch.tensor(rows, dtype=torch.long)
        mask = self._mask[index]
        first = int(mask.shape[1] - mask.sum(dim=1).max()) if rows else mask.shape[1]
        self._mask = mask[:, first:]
        self._layers = [(keys[index, :, first:], values[index, :, first:]) for keys, values in self._layers]

    def _admit(self) -> list[Request]:
        joining: list[Request] = []
        while self.waiting and len(self.running) + len(joining) < self.max_rows:
            joining.append(self.waiting.popleft())
        if not joining:
            return []
        prefixes = self._prefill([request.prompt for request in joining])
        self._take(joining, torch.stack([prefixes[request.prompt].logits for request in joining]))
        staying = [request for request in joining if not request.finish]
        if staying:
            self._join(staying, [prefixes[request.prompt] for request in staying])
        return [request for request in joining if request.finish]

    def _join(self, requests: list[Request], prefixes: list[_Prefix]) -> None:
        lengths = [prefix.layers[0][0].shape[2] for prefix in prefixes]
        width = max(*lengths, self._mask.shape[1])
        mask = torch.zeros(len(requests), width, dtype=torch.long)
        for row, length in enumerate(lengths):
            mask[row, width - length :] = 1
        self._mask = torch.cat([_pad_left(self._mask, width), mask]) if self.running else mask
        joined = []
        for number in range(len(prefixes[0].layers)):
            parts = [self._layers[number]] if self.running else []
            parts += [prefix.layers[number] for prefix in prefixes]
            joined.append(tuple(torch.cat([_pad_left(part[side], width, 2) for part in parts]) for side in (0, 1)))
        self._layers = joined
        self.running = self.running + requests

    def _prefill(self, prompts: list[tuple[int, ...]]) -> dict[tuple[int, ...], _Prefix]:
        """Prefixes of these prompts; those not kept from before are computed, each once."""
        found = {prompt: self._prefixes[prompt] for prompt in prompts if prompt in self._prefixes}
        missing = sorted(set(prompts) - found.keys(), key=lambda prompt: (len(prompt), prompt))
        while missing:
            longest = len(missing[-1])
            count = max(1, min(len(missing), self.max_tokens // longest))
            batch, missing = missing[-count:], missing[:-count]
            found |= dict(zip(batch, self._prefill_batch(batch), strict=True))
        self._prefixes |= found
        while len(self._prefixes) > 1 and sum(map(len, self._prefixes)) > self.max_tokens:
            self._prefixes.popitem(last=False)
        return found

    def _prefill_batch(self, prompts: list[tuple[int, ...]]) -> list[_Prefix]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=DynamicCache(),
            use_cache=True,
            logits_to_keep=1,
        )
        self.prefills += len(prompts)
        layers = _layers(output.past_key_values)
        made = []
        for row, prompt in enumerate(prompts):
            cut = slice(width - len(prompt), None)
            own = [(keys[row : row + 1, :, cut], values[row : row + 1, :, cut]) for keys, values in layers]
            made.append(_Prefix(own, output.logits[row, -1]))
        return made

    def _take(self, requests: list[Request], logits: Tensor) -> None:
        """Sample a token of each request from logits [B, V] and note where that ends it."""
        tokens, log_probs = sample(logits, requests)
        for request, token, log_prob in zip(requests, tokens, log_probs, strict=True):
            request.tokens.append(token)
            request.log_probs.append(log_prob)
            if token in self.stop_ids and not request.sampling.ignore_eos:
                request.finish = "stop"
            elif len(request.tokens) == request.sampling.max_tokens:
                request.finish = "length"


def sample(logits: Tensor, requests: list[Request]) -> tuple[list[int], list[float]]:
    """The next token of each request from logits [B, V], and its log-probability under what it was sampled from.

    Inverse of the distribution function at the request's own uniform number, so rows do not depend on each other.
    """
    settings = [request.sampling for request in requests]
    scale = torch.tensor([[item.temperature or 1.0] for item in settings])
    scores = logits.float() / scale
    if any(item.top_k > 0 or item.top_p < 1 for item in settings):
        scores = _filtered(scores, settings)
    log_probs = torch.log_softmax(scores, dim=-1)
    cumulated = log_probs.double().exp().cumsum(dim=-1)
    uniform = torch.stack([request.uniforms[len(request.tokens)] for request in requests])[:, None]
    drawn = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
    greedy = torch.tensor([[item.temperature == 0] for item in settings])
    tokens = torch.where(greedy, scores.argmax(dim=-1, keepdim=True), drawn)
    return tokens[:, 0].tolist(), log_probs.gather(1, tokens)[:, 0].tolist()


def _filtered(scores: Tensor, settings: list[Sampling]) -> Tensor:
    """Scores with what top_k and top_p exclude at -inf; the most likely token always stays."""
    ordered, order = scores.sort(dim=-1, descending=True)
    ranks = torch.arange(scores.shape[-1])
    top_k = torch.tensor([[item.top_k if item.top_k > 0 else scores.shape[-1]] for item in settings])
    top_p = torch.tensor([[item.top_p] for item in settings])
    kept = torch.where(ranks < top_k, ordered, -torch.inf)
    before = kept.softmax(dim=-1).cumsum(dim=-1) - kept.softmax(dim=-1)
    kept = torch.where((before < top_p) | (ranks == 0), kept, -torch.inf)
    return torch.empty_like(scores).scatter_(1, order, kept)


def _cache(layers: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache


def _layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    if other := [type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer]:
        raise ValueError(f"the hf rollout knows plain attention caches only; this model's cache has {other[0]}")
    return [(layer.keys, layer.values) for layer in cache.layers]


def _pad_left(tensor: Tensor, width: int, dim: int = 1) -> Tensor:
    """Zeros in front of dimension `dim`, up to `width`."""
    missing = width - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)
