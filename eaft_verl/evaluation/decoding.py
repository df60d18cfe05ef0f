"""Answers of a batch by transformers' `generate`, without the work for those that have ended.

Left to itself it feeds padding to every row until the last one ends, and its cache copies all keys and values at every
token. Here ended rows leave the batch, and keys and values have room for the tokens to come. Every answer is what it
was, but for the rounding that any other batch would bring too.

Dimension letters: B rows of a batch, T tokens so far, A of them in the answer, G key heads, L tokens of a cache, D of
a head.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria
from transformers.cache_utils import DynamicLayer

from eaft_verl.errors import DataError
from eaft_verl.evaluation.shared_prefix import open_cache, prompts

LEAVE = 4  # rows leave when one in so many has ended: what is kept of the others is copied for it
SPARE, LEAST_SPARE = 8, 16  # a cache that is full grows by one in so many of its tokens, by so many at least
# What may be asked of answers that are written in several calls of `generate`, which takes each for the first. Other
# settings count from the end of the prompt (the fewest tokens, what may not come first) or keep several answers a row.
PLAIN = {"do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "eos_token_id", "pad_token_id"}
PLAIN |= {"bos_token_id", "transformers_version"}


def in_parts(model: PreTrainedModel, settings: dict[str, Any]) -> bool:
    """Whether `decode` is for this model and these arguments of `generate`."""
    asked = {*model.generation_config.to_diff_dict(), *settings}
    return asked <= PLAIN and open_cache(model) is not None


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    ids_BT: Tensor,
    mask_BT: Tensor,
    max_length: int,
    ended: Callable[[Tensor], Tensor] | None = None,
    **settings: Any,
) -> Tensor:
    """What `generate` gives: prompts, padded on the left, and answers behind them, padded on the right.

    ended: says of ids_BA which rows are over, [B], besides those with an end token; more than an end may follow it.
    settings: as `in_parts` allows. DataError for prompts that leave no room for an answer.
    """
    if ids_BT.shape[1] >= max_length:
        raise DataError(f"a prompt of {ids_BT.shape[1]} tokens leaves nothing of max_length={max_length} for an answer")
    given = prompts(model, ids_BT, mask_BT)
    ids, mask = given["input_ids"], given["attention_mask"]
    cache: Any = given["past_key_values"] if "past_key_values" in given else open_cache(model)
    for number, layer in enumerate(cache.layers):  # one by one, as each is copied
        cache.layers[number] = Roomy.of(layer)
    rows_B = torch.arange(len(ids), device=ids.device)
    padding = settings.get("pad_token_id", model.generation_config.pad_token_id) or 0
    written_BT = torch.nn.functional.pad(ids, (0, max_length - ids.shape[1]), value=padding)
    while len(rows_B) and ids.shape[1] < max_length:
        over = _Over(ids_BT.shape[1], settings.get("eos_token_id", model.generation_config.eos_token_id), ended)
        how = {"attention_mask": mask, "past_key_values": cache, "max_length": max_length, **settings}
        ids = cast(Any, model).generate(ids, **how, stopping_criteria=[over])
        written_BT[rows_B, : ids.shape[1]] = ids
        stay = (~over.rows_B).nonzero()[:, 0]
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)[stay]
        ids, rows_B = ids[stay], rows_B[stay]
        cache.batch_select_indices(stay.cpu())  # layers may lie on several devices
    return written_BT[:, : ids.shape[1]]


class _Over(StoppingCriteria):
    """Stops all rows when one in LEAVE of them is over; `rows_B` says which are."""

    def __init__(self, width: int, ends: int | list[int] | None, ended: Callable[[Tensor], Tensor] | None) -> None:
        self.width, self.ended = width, ended
        self.ends = torch.tensor([] if ends is None else ends, dtype=torch.long).reshape(-1)
        self.rows_B = torch.zeros((), dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        over_B = torch.isin(input_ids[:, -1], self.ends.to(input_ids.device))
        if self.ended is not None:
            over_B = over_B | self.ended(input_ids[:, self.width :]).to(input_ids.device)
        self.rows_B = over_B | self.rows_B.to(input_ids.device)
        return self.rows_B | (self.rows_B.sum() * LEAVE >= len(self.rows_B))


class Roomy(DynamicLayer):
    """A layer of a cache whose keys and values [B, G, L, D] lie in front of unused room for more tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.room: list[Tensor] = []

    @classmethod
    def of(cls, layer: Any) -> "Roomy":
        """A layer that holds what the other one does."""
        new = cls()
        if layer.get_seq_length():
            new.update(layer.keys, layer.values)
        return new

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put these behind those that are held, and give all: views of the room."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held: tuple[Any, Any] = (self.keys, self.values)
        used = self.get_seq_length()
        total = used + key_states.shape[2]
        inside = bool(self.room) and held[0].data_ptr() == self.room[0].data_ptr()  # rows may have been chosen since
        if not inside or self.room[0].shape[2] < total:
            size = total + max(LEAST_SPARE, total // SPARE)
            self.room = [new.new_empty(*new.shape[:2], size, new.shape[3]) for new in (key_states, value_states)]
            for room, old in zip(self.room, held, strict=True):
                if used:
                    room[:, :, :used] = old
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, used:total] = new
        self.keys, self.values = (room[:, :, :total] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows; the room goes at once, or all layers would hold what is kept beside what it came from."""
        super().batch_select_indices(indices)
        self.room = []
