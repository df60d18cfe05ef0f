"""What the rows of a batch begin with goes through the model once: the same tokens after the same tokens.

Where attention looks back only, a token's hidden state depends on the tokens before it and nothing else. So the rows
are laid out as a tree of pieces (a system prompt, the question it leads to, the answers sampled for that), each piece
once, and every row finds its tokens again in front of the head: there the gradients of all rows meet, and what is
trained is what was. Evaluations do the same with given answers, and with prompts before their answers.
Dimension letters: T tokens of the rows, S of the pieces.
"""

import inspect
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eaft_verl.attention import grouped, packed
from eaft_verl.attention.packed import Piece
from eaft_verl.models import told

SHORTEST = 16  # tokens in common that are worth a piece of their own: it costs every layer a call of attention
TOGETHER = 256  # tokens of short ends behind one beginning that one call takes, though it multiplies what they mask
MODELS = {  # each compared with itself row by row; others look ahead, keep a state or count positions of their own
    *("arcee", "cohere", "ernie4_5", "gemma", "glm", "glm4", "gpt2", "gpt_neox", "granite", "helium", "llama"),
    *("ministral3", "mistral", "mixtral", "olmo", "olmo2", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3"),
    *("qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2"),
}
DRAWN = re.compile("(?!summary|classifier).*(drop|jitter)")  # names of the rates of what is left to chance
EXPECTED = {"input_ids", "attention_mask", "position_ids", "logits_to_keep"}  # of a model's inputs; with more, no tree


class Tree(NamedTuple):
    """Pieces in the order of their tokens; source_S: a place in the rows of each; place_T: where each token went."""

    pieces: list[Piece]
    source_S: Tensor
    place_T: Tensor


class _Part(NamedTuple):
    """Tokens from `start` to `stop` of each of the rows, which are alike up to there."""

    rows: list[int]
    start: int
    stop: int


def each_once(module: Any, inputs: dict[str, Any], offsets: Tensor) -> dict[str, Any]:
    """A model's inputs for packed rows, what they share laid out once; as they are where that would change or gain
    nothing.

    offsets: where the rows begin in input_ids [1, T], and T. The logits are those of `logits_to_keep`, or of all rows.
    """
    if not _can_share(module, inputs) or inputs["input_ids"].shape[1] != offsets[-1]:
        return inputs
    ids_T = inputs["input_ids"][0]
    tree = tree_of([row.numpy() for row in ids_T.tensor_split(offsets[1:-1].cpu())])
    positions_T, source_S = inputs["position_ids"][0], tree.source_S
    if len(source_S) == len(ids_T) or not torch.equal(positions_T[source_S][tree.place_T], positions_T):
        return inputs
    kept = inputs.get("logits_to_keep")
    places_T = tree.place_T if kept is None else tree.place_T[kept]
    return inputs | laid_out(tree, ids_T, positions_T) | {"logits_to_keep": places_T}


def laid_out(tree: Tree, ids_T: Tensor, positions_T: Tensor) -> dict[str, Tensor]:
    """input_ids and position_ids [1, S] and attention_mask [1, 1, S, S] of a model, for rows that `shares` allows."""
    return {
        "input_ids": ids_T[tree.source_S][None],
        "position_ids": positions_T[tree.source_S][None],
        "attention_mask": packed.mask_of(tree.pieces),
    }


def packed_rows(rows: Sequence[NDArray[np.int64]]) -> tuple[Tensor, Tensor]:
    """ids_T and positions_T of rows one after the other."""
    positions = np.concatenate([np.arange(len(row)) for row in rows])
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(positions)


def tree_of(rows: Sequence[NDArray[np.int64]]) -> Tree:
    """The tree of rows of token ids, none of them empty."""
    starts = np.cumsum([0, *map(len, rows)])
    pieces: list[Piece] = []
    source: list[NDArray[np.int64]] = []
    place_T = np.empty(starts[-1], np.int64)

    def add(parts: Sequence[_Part], before: tuple[int, ...]) -> None:
        for part in parts:
            size = sum(map(len, source))
            source.append(starts[part.rows[0]] + np.arange(part.start, part.stop))
            for row in part.rows:
                place_T[starts[row] + part.start : starts[row] + part.stop] = np.arange(size, size + len(source[-1]))
        pieces.append(Piece(tuple(part.stop - part.start for part in parts), before))

    def grow(members: Sequence[int], start: int, before: tuple[int, ...]) -> None:
        parts = _parts(rows, members, start)
        for some in _together([part for part in parts if len(part.rows) == 1], alone=not before):
            add(some, before)
        for part in parts:
            if len(part.rows) > 1:
                add([part], before)
                longer = [row for row in part.rows if len(rows[row]) > part.stop]
                grow(longer, part.stop, (*before, len(pieces) - 1))

    grow(range(len(rows)), 0, ())
    return Tree(pieces, torch.from_numpy(np.concatenate(source)), torch.from_numpy(place_T))


def _parts(rows: Sequence[NDArray[np.int64]], members: Sequence[int], start: int) -> list[_Part]:
    """Rows that are alike before `start`, by what they share from there on; one alone is taken to its end."""
    groups: dict[Any, list[int]] = {}
    for row in members:
        ahead = rows[row][start : start + SHORTEST]
        groups.setdefault(ahead.tobytes() if len(ahead) == SHORTEST else row, []).append(row)
    parts = []
    for group in groups.values():
        most = min(len(rows[row]) for row in group)
        differs = np.any([rows[row][start:most] != rows[group[0]][start:most] for row in group], axis=0)
        parts.append(_Part(group, start, start + int(differs.argmax()) if differs.any() else most))
    return parts


def _together(leaves: Sequence[_Part], *, alone: bool) -> list[list[_Part]]:
    """Ends of rows in calls of attention of at most TOGETHER tokens, or of one; alone: one each."""
    calls: list[list[_Part]] = []
    size = TOGETHER
    for leaf in leaves:
        size += leaf.stop - leaf.start
        if alone or size > TOGETHER:
            calls.append([])
            size = leaf.stop - leaf.start
        calls[-1].append(leaf)
    return calls


def _can_share(module: Any, inputs: dict[str, Any]) -> bool:
    """Packed text, in a model that takes it so."""
    return (
        set(inputs) <= EXPECTED
        and inputs["attention_mask"] is None
        and inputs["position_ids"].dim() == 2
        and inputs["input_ids"].device.type == "cpu"  # a GPU's kernel takes rows only
        and shares(module)
    )


def shares(module: Any) -> bool:
    """Whether the layers of a model on a CPU see all that is before a token, by our attention, and draw nothing."""
    model = module.get_base_model() if hasattr(module, "get_base_model") else module
    config = model.config.get_text_config()
    kinds, windows = told(config, "layer_types"), ("sliding_window", "attention_chunk_size")
    full = set(kinds) == {"full_attention"} if kinds else not any(told(config, name) for name in windows)
    attention = config._attn_implementation
    return (
        full
        and config.model_type in MODELS
        and told(config, "is_causal") is not False
        and not told(config, "output_router_logits")  # their loss reads a mask of rows
        and (attention == grouped.NAME or (attention == "sdpa" and packed.registered()))
        and "logits_to_keep" in inspect.signature(model.forward).parameters
        and not (module.training and _draws(module, config))
    )


def _draws(module: Any, config: Any) -> bool:
    """Whether a pass in training is random: each row is owed a draw of its own."""
    rates = [value for name, value in vars(config).items() if DRAWN.match(name)]
    return any(rates) or any(isinstance(one, torch.nn.Dropout) and one.p > 0 for one in module.modules())
