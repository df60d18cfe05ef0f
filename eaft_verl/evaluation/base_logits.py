"""What the base says of every word of the drift probe, worked out once for all runs that are compared with it."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from eaft_verl.data.parquet import Example
from eaft_verl.evaluation.records import digest
from eaft_verl.evaluation.teacher_forced import TOKEN_BUDGET, answer_logits
from eaft_verl.files import computed_once

KEPT_BYTES = 2**30  # of one probe; more is worked out again by every run: a disk of GiB is not quicker than the model


def base_logits(model: PreTrainedModel, examples: Sequence[Example], token_budget: int = TOKEN_BUDGET) -> list[Tensor]:
    """The base's logits_TV of every example in host memory, float32.

    Memory: answer tokens * vocabulary * 4 bytes (48 x 48 tokens of 49,152 words: 0.45 GB; 64 x 256 of 151,936: 10 GB).
    """
    logits = {index: logits_TV.float().cpu() for index, logits_TV in answer_logits(model, examples, token_budget)}
    return [logits[index] for index in range(len(examples))]


def kept_logits(
    work: Path, how: object, examples: Sequence[Example], words: int, make: Callable[[], list[Tensor]]
) -> list[Tensor]:
    """`base_logits` as `make` gives them, kept in `work` for the runs to come and read from its file as needed.

    how: what they depend on besides the examples, device and libraries; words: of the vocabulary. A disk without room
    costs time only. RunError for a file that is not what was written.
    """
    answers = sum(sum(example.loss_mask) for example in examples)
    if 4 * answers * words > KEPT_BYTES:
        return make()
    here = [torch.cuda.is_available(), torch.__version__, transformers.__version__]
    key = digest([how, here, [(list(example.input_ids), list(example.loss_mask)) for example in examples]])
    folder = work / f"base-logits-{key[:16]}"
    made = None if folder.exists() else make()  # out here, so that its own errors are not taken for the disk's

    def write(empty: Path) -> None:
        tensors = {str(index): logits_TV.contiguous() for index, logits_TV in enumerate(made or make())}
        save_file(tensors, empty / "logits.safetensors")

    with contextlib.suppress(OSError, SafetensorError):
        file = computed_once(folder, key, write) / "logits.safetensors"
        with safe_open(file, framework="pt") as tensors:
            return [tensors.get_tensor(str(index)) for index in range(len(examples))]
    return made or make()
