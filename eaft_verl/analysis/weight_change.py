"""How far an export's weights lie from the base's, and of how many directions the change is made: secondary evidence.

Both folders are read tensor by tensor from their safetensors files, so that two are in memory at a time. Exports
of LoRA arms are merged, so what is found is the adapter's product (and the rounding to the export's dtype).
Dimension letters: M, N rows and columns of a matrix, S its singular values.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from eaft_verl.errors import RunError
from eaft_verl.files import read_json

LARGEST = {"cpu": 1024, "cuda": 8192}  # smaller side of a matrix whose spectrum is computed: minutes for a model
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
Row = dict[str, Any]


@torch.inference_mode()
def weight_change(base: Path, export: Path) -> Row:
    """{distance, norm, relative, layers: [{layer, relative, stable_rank, effective_rank}], missing: [names]}.

    distance = ||W - W0||_F over all weights that both folders hold, norm = ||W0||_F, relative = distance / norm; of a
    layer (None: embeddings, head, last norm) the same. Ranks are means over the layer's matrices that have changed,
    weighted by the square of their change: `stable_rank` and `effective_rank` of W - W0; None for matrices beyond
    LARGEST, or where nothing changed. missing: weights that only one folder holds.
    """
    first, second = _places(base), _places(export)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers: dict[int | None, list[tuple[float, float, float | None, float | None]]] = {}
    for name, before, after in _pairs(first, second):
        change = after.float() - before.float()
        squared, fits = float(change.double().square().sum()), change.ndim == 2 and min(change.shape) <= LARGEST[device]
        ranks = spectrum_ranks(change.to(device)) if fits and squared > 0 else (None, None)
        found = _LAYER.search(name)
        parts = layers.setdefault(int(found[1]) if found else None, [])
        parts.append((squared, float(before.double().square().sum()), *ranks))
    if not layers:
        raise RunError(f"{base} and {export} have no weight in common")
    every = [part for parts in layers.values() for part in parts]
    distance, norm = math.sqrt(sum(part[0] for part in every)), math.sqrt(sum(part[1] for part in every))
    ordered = sorted(layers, key=lambda layer: math.inf if layer is None else layer)
    return {
        **{"distance": distance, "norm": norm, "relative": distance / norm},
        "layers": [_layer(layer, layers[layer]) for layer in ordered],
        "missing": sorted(first.keys() ^ second.keys()),
    }


def spectrum_ranks(change_MN: Tensor) -> tuple[float, float]:
    """(stable, effective) rank of a matrix that is not zero, from the eigenvalues of its smaller Gram matrix.

    stable = ||D||_F^2 / ||D||_2^2 (Rudelson and Vershynin 2007); effective = exp(-sum_i q_i ln q_i) with q = s / sum(s)
    the normalised singular values (Roy and Vetterli 2007, EUSIPCO). Both lie between 1 and the rank.
    """
    narrow = change_MN if change_MN.shape[0] <= change_MN.shape[1] else change_MN.T
    scaled = (narrow / narrow.abs().max()).double()
    squares_S = torch.linalg.eigvalsh(scaled @ scaled.T).clamp(min=0)
    squares_S = squares_S[squares_S > squares_S.max() * len(squares_S) * torch.finfo(torch.float64).eps]
    share_S = squares_S.sqrt() / squares_S.sqrt().sum()
    return float(squares_S.sum() / squares_S.max()), float(torch.special.entr(share_S).sum().exp())


def _layer(layer: int | None, parts: list[tuple[float, float, float | None, float | None]]) -> Row:
    changed = [part for part in parts if part[2] is not None]
    weight = sum(part[0] for part in changed)
    stable, effective = (
        sum(part[0] * float(part[i] or 0) for part in changed) / weight if weight else None for i in (2, 3)
    )
    size = math.sqrt(sum(part[1] for part in parts))
    relative = math.sqrt(sum(part[0] for part in parts)) / size if size else None
    return {"layer": layer, "relative": relative, "stable_rank": stable, "effective_rank": effective}


def _places(folder: Path) -> dict[str, Path]:
    """{weight: file that holds it}."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in read_json(index)["weight_map"].items()}
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            found |= dict.fromkeys(weights.keys(), file)
    return found


def _pairs(first: dict[str, Path], second: dict[str, Path]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Weights that both hold, shard by shard of the first."""
    for name in sorted(first.keys() & second.keys(), key=lambda name: (str(first[name]), name)):
        with safe_open(first[name], framework="pt") as left, safe_open(second[name], framework="pt") as right:
            before, after = left.get_tensor(name), right.get_tensor(name)
        if before.shape != after.shape:
            raise RunError(f"weight {name} is {tuple(before.shape)} in the base and {tuple(after.shape)} in the export")
        yield name, before, after
