"""A trained model as a Hugging Face folder: safetensors, config, generation config, tokenizer."""

import copy
import functools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from eaft_verl.errors import ConfigError, Diverged, RunError
from eaft_verl.evaluation.model_files import write_checksums
from eaft_verl.files import new_folder
from eaft_verl.training.dcp import finite

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export_weights(
    weights: Iterable[tuple[str, Tensor]],
    folder: Path,
    base_model: str,
    dtype: str,
    *,
    write: bool,
    ends: Sequence[str] = (),
) -> None:
    """Gather every weight and, on the writing rank, save them beside the base model's config and tokenizer.

    All ranks must walk the iterator: each weight is all-gathered as it is reached. The folder appears under its name
    only when it is complete and read back. ends: tokens that ended the trained turns, which generation has to stop at.
    Raises Diverged for weights that are not finite in `dtype`, RunError for one that the files do not hold
    as it was.
    """
    config = AutoConfig.from_pretrained(base_model)
    state = {}
    for name, weight in weights:
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        if write and not tied:  # a tied head is the embedding; saving it twice doubles a small model's file
            kept = weight.detach().to("cpu", DTYPES[dtype]).contiguous()
            # Rows that do not divide by the ranks are gathered into a longer buffer, which safetensors refuses.
            state[name] = kept if kept.untyped_storage().nbytes() == kept.nbytes else kept.clone()
    if not write:
        return
    if bad := [name for name, weight in state.items() if not finite(weight)]:
        raise Diverged(
            f"{folder.name} is not exported: {len(bad)} weights are not finite in {dtype}, first {bad[0]}; go on with "
            "resume=changed and a lower verl.optim.lr, or choose another output="
        )
    with new_folder(folder) as partial:
        save_torch_state_dict(state, partial, metadata={"format": "pt"})
        write_companions(partial, base_model, dtype, ends)
        _read_back(partial, state)
        write_checksums(partial)


def stored_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a folder's safetensors files, one tensor in memory at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                yield name, tensors.get_tensor(name)


def _read_back(folder: Path, state: dict[str, Tensor]) -> None:
    """Every weight is in the files, with its values: a full disk or a failing one is found before the name is given."""
    left = dict(state)
    for name, weight in stored_weights(folder):
        if not torch.equal(weight, left.pop(name)):
            raise RunError(f"{folder}: {name} was not written as it was")
    if left:
        raise RunError(f"{folder} lacks {len(left)} of {len(state)} weights, first {min(left)}")


def rehearse(base_model: str, ends: Sequence[str]) -> list[str]:
    """Write all of an export but its weights into a scratch folder, before work; what had to be repaired.

    ConfigError where a part of the base model cannot be saved again: it would be found when training is over.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            note = write_companions(Path(scratch), base_model, export_dtype(base_model), ends)
        except Exception as error:  # whatever transformers raises
            text = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"model={base_model!r}: its exports could not be written ({type(error).__name__}: {text}); mend its "
                "config.json, generation_config.json or tokenizer files"
            ) from None
    return [note] if note else []


def write_companions(folder: Path, base_model: str, dtype: str, ends: Sequence[str]) -> str:
    """The base model's config, tokenizer and generation config beside weights; what was repaired of the last, or ''."""
    config = AutoConfig.from_pretrained(base_model)
    config.dtype = dtype
    config.save_pretrained(folder)
    tokenizer = _tokenizer(base_model)
    tokenizer.save_pretrained(folder)
    stops: Any = tokenizer.convert_tokens_to_ids(list(ends))
    generation, note = savable(generation_config(base_model, stops))
    generation.save_pretrained(folder)
    return note


@functools.cache  # most of what an export of a small model costs besides its weights
def _tokenizer(base_model: str) -> Any:
    return AutoTokenizer.from_pretrained(base_model)


def savable(config: GenerationConfig) -> tuple[GenerationConfig, str]:
    """The configuration as transformers agrees to write it, and what was changed.

    Shipped files say temperature without do_sample, which can be read and not saved. They mean sampling: do_sample is
    set; where that does not help, only the ids of tokens are kept.
    """
    tokens = {key: value for key, value in config.to_diff_dict().items() if key.endswith("token_id")}
    sampling = copy.deepcopy(config)
    sampling.do_sample = True
    repaired = ((sampling, "do_sample=true is added"), (GenerationConfig(**tokens), "only its token ids are kept"))
    cause = ""
    for candidate, change in ((config, ""), *repaired):
        try:
            candidate.validate(strict=True)
        except ValueError as error:
            cause = cause or " ".join(str(error).split())[:160]
        else:
            return (
                candidate,
                change and f"generation_config.json cannot be saved as it is ({cause}): {change} in exports",
            )
    raise ConfigError(f"generation_config.json cannot be saved: {cause}")


def generation_config(base_model: str, ends: Sequence[int]) -> GenerationConfig:
    """The base model's, which stops at the trained ends of turn too.

    A base model stops at the end of a document: told to go on where its training taught it to stop, it would write the
    user's next turn itself.
    """
    try:
        config = GenerationConfig.from_pretrained(base_model)
    except OSError:  # many base models carry none
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(base_model))
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stops = [token for token in dict.fromkeys([*known, *ends]) if token is not None]
    if set(stops) != set(known):
        config.eos_token_id = stops
    return config


def export_dtype(base_model: str) -> str:
    """The base model's own dtype: what it is served in."""
    dtype = str(AutoConfig.from_pretrained(base_model).dtype or "bfloat16").removeprefix("torch.")
    return dtype if dtype in DTYPES else "bfloat16"
