"""Whether a model, its tokenizer and the prepared data fit together and the recipe: said before anything is loaded.

Decided from the model's configuration and from its modules without weights. Errors name what was found, what would fit
and what to do; what is legal but not meant by everyone is returned as a note.
"""

import copy
import inspect
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eaft_verl.errors import ConfigError, require
from eaft_verl.evaluation.model_files import positions_of, told
from eaft_verl.models import at_hand, load_config, load_tokenizer, resolve_model
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.views import objective_of

CAUSAL = "ForCausalLM"
PACKING = "verl.model.use_remove_padding"
ATTENTION = frozenset(  # kinds of layers that see the sequence through an attention mask only, or not at all
    ("full_attention", "sliding_attention", "chunked_attention", "attention", "sparse", "dense", "moe", "mlp")
)
LAYER_LISTS = ("layer_types", "layers_block_type", "block_types")  # where configurations list them
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
SHOWN = 12  # names of modules in a message


def check_model_fits(config: Config, lengths: Iterable[int] = (), largest_id: int | None = None) -> list[str]:
    """Notes on a model that can be trained as the recipe asks; ConfigError for one that cannot.

    lengths: of the longest prepared examples, in tokens; largest_id: of the prepared data. Without them only what the
    recipe says is judged.
    """
    resolved = resolve_model(config.model)
    model = load_config(resolved)
    _check_kind(config, model)
    notes = _check_vocabulary(config, model, load_tokenizer(resolved), largest_id)
    notes += _check_positions(config, model, max(lengths, default=0))
    skeleton = modules_of(model)
    _check_attention(config, skeleton)
    notes += _check_packing(config, model)
    if config.verl.model.lora_rank > 0:
        _check_adapter(config, skeleton)
    if config.trainer == "sft" and (k := objective_of(config).k) > (rows := model.get_text_config().vocab_size):
        notes.append(f"objective.k={k} and the model has {rows} tokens: entropy is that of all of them")
    if any(told(model.get_text_config(), name) for name in EXPERTS):
        notes.append(f"{model.model_type} routes tokens to experts: its router's balance loss is part of no objective")
    return notes


def notes_at_hand(config: Config) -> list[str]:
    """The same for a dry run: nothing for a model that is not here yet."""
    return check_model_fits(config) if at_hand(config.model) else []


def _check_kind(config: Config, model: Any) -> None:
    """verl builds the class that config.json names; anything but a decoder it would build and train on something."""
    name = f"model={config.model!r}"
    require(
        not model.is_encoder_decoder,
        f"{name} is an encoder-decoder ({model.model_type}); prompts and responses are one sequence here: use a "
        f"decoder (…{CAUSAL})",
    )
    classes = list(model.architectures or [])
    require(classes, f"{name}: config.json names no `architectures`; add the class it is of, e.g. [Llama{CAUSAL}]")
    sees = told(model, "vision_config") is not None or told(model, "audio_config") is not None
    require(
        not sees,
        f"{name} ({classes[0]}) takes more than text, and its positions and export are not those of a decoder; use the "
        f"text model of its family (…{CAUSAL})",
    )
    require(
        CAUSAL in classes[0],
        f"{name} is a {classes[0]}, and verl builds the head that predicts tokens for a …{CAUSAL} only; use one",
    )


def _check_vocabulary(config: Config, model: Any, tokenizer: Any, largest_id: int | None) -> list[str]:
    """Every id of the data must have a row in the embedding; tokens that no row of the data uses need none."""
    rows, vocabulary = model.get_text_config().vocab_size, tokenizer.get_vocab()
    extra = sorted((number, token) for token, number in vocabulary.items() if number >= rows)
    if not extra:
        return []
    number, token = extra[0]
    found = (
        f"model={config.model!r}: its tokenizer has {max(vocabulary.values()) + 1} tokens and its embedding {rows} "
        f"rows; the first token without one is {token!r} ({number})"
    )
    remedy = "use the model's own tokenizer, or resize the embedding (resize_token_embeddings) and save the model"
    if largest_id is not None and largest_id >= rows:
        raise ConfigError(f"{found}, and the data use id {largest_id}: {remedy}")
    used = "the data use none of these" if largest_id is not None else "refused if the data use one of these"
    return [f"{found}; {used}"]


def _check_positions(config: Config, model: Any, longest: int) -> list[str]:
    known = positions_of(model)
    if not known:
        return []
    said = f"model={config.model!r} knows {known} positions (max_position_embeddings and its rope scaling)"
    remedy = "or give the model a rope scaling (verl.model.override_config.rope_parameters)"
    if config.trainer == "grpo":
        data = config.verl.data
        asked = (data.max_prompt_length or config.data.max_length - data.max_response_length) + data.max_response_length
        require(
            asked <= known,
            f"{said}, and prompt and response may have {asked} tokens together: lower data.max_length or "
            f"verl.data.max_response_length, {remedy}",
        )
        return []
    require(
        longest <= known,
        f"{said}, and the longest example has {longest} tokens: set data.max_length={known} and "
        f"data.over_long=drop or truncate, {remedy}",
    )
    if config.data.max_length > known:
        return [f"{said}, data.max_length={config.data.max_length} allows more: longer rows would be refused"]
    return []


def unpackable(model: Any) -> str | None:
    """Why rows of one packed sequence would see each other in this model, however their positions start anew.

    Attention is told rows apart by its mask; state that is carried from token to token is not: linear attention, state
    space models, recurrences and convolutions over the sequence. They are found by the layers the configuration lists,
    by what transformers says of the class, and by the modules.
    """
    text = model.get_text_config()
    kinds = {str(kind) for name in LAYER_LISTS for kind in told(text, name) or ()}
    if other := sorted(kinds - ATTENTION):
        return f"layers of kind {', '.join(other)}"
    skeleton = modules_of(model)
    if told(skeleton, "_is_stateful"):
        return f"{type(skeleton).__name__} carries state"
    mixing = [name for name, module in skeleton.named_modules() if type(module).__name__.startswith("Conv1d")]
    if mixing:
        return f"a convolution over the sequence ({mixing[0]})"
    if "position_ids" not in inspect.signature(skeleton.forward).parameters:
        return f"{type(skeleton).__name__} takes no position_ids"
    return None


def modules_of(model: Any) -> Any:
    """The model of a configuration, its modules without weights."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=True):
        return AutoModelForCausalLM.from_config(copy.deepcopy(model))


def _check_attention(config: Config, skeleton: Any) -> None:
    """What transformers raises when the workers build the model."""
    asked = (config.verl.model.override_config or {}).get("attn_implementation", "flash_attention_2")
    flag = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}.get(asked)
    require(
        flag is None or told(skeleton, flag) is not False,
        f"{type(skeleton).__name__} has no attention {asked}: set verl.model.override_config.attn_implementation=eager",
    )


def _check_packing(config: Config, model: Any) -> list[str]:
    reason = unpackable(model)
    if not reason:
        return []
    parallel = config.verl.engine.ulysses_sequence_parallel_size
    require(
        parallel == 1,
        f"model={config.model!r} has {reason}, which verl.engine.ulysses_sequence_parallel_size={parallel} would cut "
        "apart: set it to 1",
    )
    require(
        config.trainer != "grpo" or config.verl.actor_rollout_ref.rollout.name != "hf",
        f"model={config.model!r} has {reason}, and the rollout hf keeps keys and values only; GRPO needs "
        "verl.actor_rollout_ref.rollout.name=vllm for it",
    )
    if not config.verl.model.use_remove_padding:
        return []
    return [f"{model.model_type} has {reason}: rows are padded, not packed (verl.model.use_remove_padding=false)"]


def _check_adapter(config: Config, skeleton: Any) -> None:
    """The adapter sits on modules that exist, and on such that its merge into the base reaches."""
    settings = config.verl.model
    if settings.lora_adapter_path is not None:
        targets = _stored_targets(Path(str(settings.lora_adapter_path)).expanduser(), settings.lora_rank)
    else:
        targets = settings.target_modules
    require(
        not told(settings, "target_parameters"),
        "verl.model.target_parameters: adapters on bare parameters are not merged into the export; set it to null",
    )
    names = {name: module for name, module in skeleton.named_modules() if type(module).__name__ != "ModuleList"}
    ends = [skeleton.get_input_embeddings(), skeleton.get_output_embeddings()]
    inner = [name for name, one in names.items() if type(one).__name__ == "Linear" and one is not ends[1]]
    linear = sorted({name.rpartition(".")[2] for name in inner})
    for target in _listed(targets):
        matched = [name for name in names if _matches(name, target, regex=isinstance(targets, str))]
        require(
            matched,
            f"verl.model.target_modules: {target!r} matches no module of {type(skeleton).__name__}; its linear modules "
            f"are {', '.join(linear[:SHOWN])}, or all-linear",
        )
        touched = [name for name in matched if any(names[name] is end for end in ends)]
        require(
            not touched,
            f"verl.model.target_modules: {target!r} is on {touched and touched[0]}, the embedding or the head, which "
            "verl's merge does not reach: the export would lack it. Leave it out, or train all weights (lora_rank=0)",
        )


def _listed(targets: Any) -> Sequence[str]:
    if targets == "all-linear":
        return []
    return [targets] if isinstance(targets, str) else list(targets or [])


def _matches(name: str, target: str, *, regex: bool) -> bool:
    """As peft decides: text is a pattern of the whole name, an item of a list the name or its end."""
    if regex:
        return re.fullmatch(target, name) is not None
    return name == target or name.endswith(f".{target}")


def _stored_targets(folder: Path, rank: int) -> Any:
    """Modules of an adapter on disk; ConfigError for one that is no plain LoRA: its merge would leave parts out."""
    try:
        stored = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"verl.model.lora_adapter_path={str(folder)!r} holds no adapter_config.json: {error}"
        ) from None
    parts = {
        "peft_type": stored.get("peft_type", "LORA") != "LORA",
        "use_dora": bool(stored.get("use_dora")),
        "bias": stored.get("bias", "none") != "none",
        **{name: bool(stored.get(name)) for name in ("modules_to_save", "target_parameters", "layer_replication")},
        "trainable_token_indices": bool(stored.get("trainable_token_indices")),
    }
    if bad := [name for name, given in parts.items() if given]:
        raise ConfigError(
            f"verl.model.lora_adapter_path={str(folder)!r} has {bad[0]}={stored[bad[0]]!r}, which the merged export "
            "would lack; only plain LoRA weights are merged: merge that adapter into its base and train from there"
        )
    require(
        stored.get("r") == rank,
        f"verl.model.lora_rank={rank} and the adapter in {str(folder)!r} has r={stored.get('r')}; set the first to it",
    )
    return stored.get("target_modules")
