"""The weight average of two models as a Hugging Face folder, one tensor in memory at a time.

Source: Wortsman et al., Robust fine-tuning of zero-shot models (WiSE-FT), arXiv 2109.01903: theta = w theta_tuned +
(1 - w) theta_base.
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from eaft_verl.errors import RunError
from eaft_verl.evaluation.model_files import write_checksums
from eaft_verl.files import new_folder
from eaft_verl.training.dcp import finite

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings")
HEAD = "lm_head.weight"
SHOWN = 3


def average_weights(tuned: Path, other: Path, weight: float, target: Path) -> None:
    """Write w * tuned + (1 - w) * other to `target`, a folder of the same files, shards, dtypes and names as `tuned`.

    tuned: an export of this project; other: a folder with safetensors. Integer tensors must be equal and stay; a head
    that is tied stays tied. The folder appears under its name when it is complete and read back.
    Raises RunError naming the setting or the tensor in which the two differ, or that is not finite.
    """
    ours, theirs = _tensors(tuned), _tensors(other)
    check_averageable(tuned, other)
    with new_folder(target) as partial:
        shutil.copytree(tuned, partial, dirs_exist_ok=True)
        for name, place in ours.items():
            value = mean(place.read(name), theirs[name].read(name), weight)
            if not finite(value):
                raise RunError(f"{name} is not finite in {tuned}, in {other} or in their average, which is not made")
            written = place._replace(file=partial / place.file.name)
            written.write(value)
            if not _bits(written.read(name)).equal(_bits(value)):
                raise RunError(f"{written.file}: {name} was not written as it was")
        write_checksums(partial)
        shutil.rmtree(target, ignore_errors=True)


def mean(tuned: Tensor, other: Tensor, weight: float) -> Tensor:
    """w * tuned + (1 - w) * other in float32 (float64 where `tuned` is), rounded once to the dtype of `tuned`.

    Both ends are the model itself, bit for bit; the sign of a zero would be lost in a sum. Integers are `tuned`.
    """
    if weight == 1 or not tuned.is_floating_point():
        return tuned
    if weight == 0:
        return other.to(tuned.dtype)
    wide = torch.promote_types(tuned.dtype, torch.float32)
    return torch.lerp(other.to(wide), tuned.to(wide), weight).to(tuned.dtype)


def check_averageable(tuned: Path, other: Path) -> None:
    """RunError unless both folders hold one architecture and one vocabulary, and the same tensors in the same shapes.

    Reads headers, configurations and tokenizers only.
    """
    ours, theirs = _tensors(tuned), _tensors(other)
    own, its = (AutoConfig.from_pretrained(folder) for folder in (tuned, other))
    for key in SIZES:
        left, right = (config.get_text_config().to_dict().get(key) for config in (own, its))
        if left != right:
            raise RunError(f"{tuned} has {key} {left} and {other} {right}: only models of one architecture average")
    if "quantization_config" in {**own.to_dict(), **its.to_dict()}:
        raise RunError(f"{tuned} or {other} is quantized: packed weights have no average; use the model it is made of")
    vocabularies = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (tuned, other)]
    if vocabularies[0] != vocabularies[1]:
        raise RunError(f"{tuned} and {other} have different vocabularies, so their embeddings have no average")
    tied = {HEAD} if own.tie_word_embeddings else set()
    for having, lacking, names in ((tuned, other, ours.keys() - theirs), (other, tuned, theirs.keys() - ours - tied)):
        if names:
            raise RunError(f"{having} has {len(names)} tensors that {lacking} lacks: {_first(names)}")
    for name, place in ours.items():
        if place.shape != theirs[name].shape:
            raise RunError(f"{name} is {place.shape} in {tuned} and {theirs[name].shape} in {other}")
        if place.dtype not in DTYPES and not torch.equal(place.read(name), theirs[name].read(name)):
            raise RunError(f"{name} holds {place.dtype}, which is not averaged, and differs in {tuned} and {other}")


class _Tensor(NamedTuple):
    """Where a tensor stands; begin: bytes before it in its file."""

    file: Path
    begin: int
    dtype: str
    shape: list[int]

    def read(self, name: str) -> Tensor:
        with safe_open(self.file, framework="pt") as file:
            return file.get_tensor(name)

    def write(self, value: Tensor) -> None:
        """Put a value of the same size in its place."""
        with self.file.open("r+b") as stream:
            stream.seek(self.begin)
            stream.write(_bits(value).numpy().tobytes())


def _tensors(folder: Path) -> dict[str, _Tensor]:
    """{name: its place}, from the headers: 8 bytes of length, JSON, then the tensors."""
    found: dict[str, _Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            found[name] = _Tensor(file, 8 + length + entry["data_offsets"][0], entry["dtype"], entry["shape"])
    if not found:
        raise RunError(f"{folder} has no *.safetensors, of which an average is made; convert the model to that format")
    return found


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().view(-1).view(torch.uint8)


def _first(names: set[str]) -> str:
    return ", ".join(sorted(names)[:SHOWN])
