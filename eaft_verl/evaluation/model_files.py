"""Whether a model's files hold every weight that its configuration describes, and are those that were exported.

transformers fills what is missing or of another shape with random numbers and says so in a log line. Asked here of the
headers of the files, on no device: seconds for any size.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eaft_verl.errors import ConfigError
from eaft_verl.files import bytes_hash, content_hash, write_json
from eaft_verl.models import hub_arguments, told

INDEX = ".index.json"
NAMES = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers takes them
CHECKSUMS = "checksums.json"  # in an export: {file: xxh3 of its bytes}
SHOWN = 3


def positions_of(model: Any) -> int | None:
    """Positions that the model knows, what its rope scaling adds included; None where it counts none."""
    text = model.get_text_config()
    known = told(text, "max_position_embeddings")
    rope = told(text, "rope_parameters") or {}
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if known and factor and original:
        return max(known, int(factor * original))
    return known


def write_checksums(folder: Path) -> None:
    """Describe every file of an export that is about to get its name."""
    (folder / CHECKSUMS).unlink(missing_ok=True)
    write_json(folder / CHECKSUMS, {file.name: bytes_hash(file) for file in sorted(folder.iterdir()) if file.is_file()})


def check_checksums(folder: Path) -> None:
    """ConfigError for an export with a file that is not as it was written; nothing for a folder from elsewhere.

    Every byte is read once: what has been read is known by its size and times, see `content_hash`.
    """
    if not (file := folder / CHECKSUMS).is_file():
        return
    try:
        written = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{file} is damaged ({error}), so nobody knows whether the model is; export it again"
        ) from None
    for name, hashed in written.items():
        part = folder / str(name)
        if not part.is_file() or content_hash(part) != hashed:
            raise ConfigError(
                f"{part} is {'not as it was exported' if part.is_file() else 'missing'}: the model is not used. Put it "
                f"back, export it again (`eaft checkpoints RUN --export STEP`), or delete {CHECKSUMS} where you "
                "have changed the file yourself"
            )


def check_model_files(model: Path | str) -> None:
    """ConfigError for a resolved model with a file missing, unreadable or cut off, or a weight missing or of another
    shape, or with another byte than was exported; nothing for a hub id that is not in the local cache."""
    folder = model if isinstance(model, Path) else local_folder(model)
    if folder is not None:
        check_checksums(folder)
    if folder is None or not (files := _weight_files(folder, whole=isinstance(model, Path))):
        return
    state: dict[str, Any] = {}
    for file in files:
        state |= _shapes(file)
    if info := _loaded(folder, state):
        require_all(folder, info)


def _loaded(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """What transformers says of a load of these shapes; nothing of packed weights, which have shapes of their own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    try:
        config: Any = AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises whatever its readers do
        said = " ".join(str(error).split())[:200]
        raise ConfigError(f"{folder / 'config.json'} is no configuration that can be read ({said})") from None
    if "quantization_config" in config.to_dict():
        return {}
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # its report is what is asked for here
    logging.disable_progress_bar()
    try:
        with torch.device("meta"):
            kind: Any = type(AutoModelForCausalLM.from_config(config))
        options = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
        return dict(kind.from_pretrained(None, config=config, state_dict=state, **options)[1])
    finally:
        logging.set_verbosity(level)


def require_all(model: Path | str, info: dict[str, Any]) -> None:
    """ConfigError if transformers' account of a load says that a weight is missing or of another shape; a warning for
    weights that the model has no place for."""
    shaped = [f"{name} is {list(found)}, not {list(asked)}" for name, found, asked in sorted(info["mismatched_keys"])]
    for what, names in (("lacks", sorted(info["missing_keys"])), ("has other shapes than", shaped)):
        if names:
            raise ConfigError(
                f"model={str(model)!r} {what} weights that its config.json describes: {_first(names)}. They would be "
                "random numbers; the model must be copied, downloaded or exported again"
            )
    if unused := sorted(info["unexpected_keys"]):
        print(
            f"eaft: warning: model={str(model)!r} has weights that its config.json has no place for, which are not "
            f"used: {_first(unused)}",
            file=sys.stderr,
        )


def _first(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def local_folder(model: str) -> Path | None:
    """The snapshot of a hub id in the local cache; None where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    arguments = hub_arguments(model)
    found = try_to_load_from_cache(
        arguments["pretrained_model_name_or_path"], "config.json", revision=arguments.get("revision")
    )
    return Path(found).parent if isinstance(found, str) else None


def _weight_files(folder: Path, *, whole: bool) -> list[Path]:
    """The files that transformers would load; ConfigError where one is missing, [] if that is allowed (not `whole`)."""
    problem = f"has no weights ({' or '.join(NAMES)}, in one file or by shards with {INDEX})"
    for name in NAMES:
        index = folder / f"{name}{INDEX}"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            files = _shards(index)
            if absent := [file.name for file in files if not file.is_file()]:
                problem = f"lacks {len(absent)} of {len(files)} files that {index.name} names, first {absent[0]}"
                break
            return files
    if whole:
        raise ConfigError(f"model={str(folder)!r} {problem}; copy or download it again")
    return []


def _shards(index: Path) -> list[Path]:
    try:
        names: Iterable[str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [index.parent / name for name in sorted(set(names))]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ConfigError(f"{index} is damaged ({type(error).__name__}: {error}); copy or download it again") from None


def _shapes(file: Path) -> dict[str, Any]:
    """{name: tensor without data} of a file; nothing of a pickle is run."""
    from transformers.modeling_utils import load_state_dict

    try:
        return load_state_dict(str(file), map_location="meta")
    except Exception as error:  # safetensors, torch and pickle each have their own
        said = " ".join(str(error).split())[:200]
        if file.suffix == ".bin":
            said = "a pickle of anything but tensors is never run"
        raise ConfigError(f"{file} is damaged or no weight file ({said}); copy or download it again") from None
