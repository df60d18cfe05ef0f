"""Tiny models of many architectures on verl's real engine, in a process of its own. verl is imported in functions."""

import os
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": 1},
    **{"eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": False, "initializer_range": 0.2},
}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16}
_LINEAR |= {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
PACKABLE: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("llama", "qwen2", "qwen3", "glm4", "olmo2", "gpt_neox")},
    "mistral": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_moe": _EXPERTS,
}
STATEFUL: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 128},
    "qwen3_5_text": _LINEAR,
    "qwen3_next": {**_LINEAR, "num_experts": 0, "mlp_only_layers": [0, 1]},
    "jamba": {
        **{"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
        **{"use_mamba_kernels": False, "mamba_d_state": 8},
    },
}
BLIND = ("llama", "verl.model.override_config.attn_implementation=blind")
SOFTCAP = {"gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 0.5}}
PADDED = "verl.model.use_remove_padding=false"
BF16 = "verl.engine.mixed_precision.param_dtype=bf16"


def make(folder: Path, kind: str, spec: dict[str, Any]) -> str:
    """A random model with the tiny tokenizer."""
    import tiny
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path, tokenizer = folder / kind, tiny.tiny_tokenizer()
    if not path.exists():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**SMALL, **spec})
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return str(path)


class Group:
    """What the check asks of a worker group, with the only worker in this process."""

    world_size = 1

    def __init__(self, worker: Any) -> None:
        self.worker = worker

    def infer_batch(self, batch: Any) -> Any:
        from verl.utils import tensordict_utils as tu

        tu.assign_non_tensor(batch, global_token_num=None)
        found = self.worker.infer_batch(batch)
        return type("Answer", (), {"get": lambda _: found})()

    def plain_nll(self, *arguments: Any, **named: Any) -> list[Any]:
        return [self.worker.plain_nll(*arguments, **named)]


def rows() -> list[Any]:
    import tiny

    from eaft_verl.data.parquet import Example

    tokenizer, found = tiny.tiny_tokenizer(), []
    for row in tiny.sums(8, seed=3):
        ids = tokenizer(3 * row["prompt"] + row["response"])["input_ids"]
        found.append(Example("", [], ids, [0] + [1] * (len(ids) - 1)))
    return found


def one(recipe: str, model: str, overrides: list[str]) -> dict[str, Any] | str:
    """What the check finds; its message where it refuses."""
    from eaft_verl.errors import RunError
    from eaft_verl.objectives import Sft
    from eaft_verl.recipe.resolve import load_recipe, resolve
    from eaft_verl.training.sft.loss import TokenLoss
    from eaft_verl.training.sft.self_check import self_check
    from eaft_verl.training.sft.worker import EaftWorker
    from eaft_verl.training.sft.workers import worker_config

    config = resolve(load_recipe(recipe), "sft", [f"model={model}", *overrides])
    worker = EaftWorker(worker_config(config, model, 10))
    worker.reset()
    worker.set_loss_fn(TokenLoss(Sft()))
    try:
        return self_check(config, Group(worker), rows(), model)
    except RunError as error:
        return str(error)


def run_all(rank: int, folder: str, recipe: str) -> None:
    """Entry of the spawned process: {(model, overrides): what was found} in FOLDER/found.pt."""
    os.environ.update(
        {
            **{"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "VERL_LOGGING_LEVEL": "ERROR"},
            **{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DIST_INIT_METHOD": f"file://{folder}/rendezvous"},
            **{"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
        }
    )
    import torch
    import verl  # noqa: F401 - first of all: its entry points must bring the platform

    torch.set_num_threads(1)
    _register_blind()
    cases: list[tuple[str, tuple[str, ...]]] = [(kind, ()) for kind in (*PACKABLE, *STATEFUL, *SOFTCAP)]
    cases += [(kind, (PADDED,)) for kind in STATEFUL]
    cases += [("llama", (BF16,)), ("qwen3_moe", (BF16,)), ("lfm2", (BF16,)), ("lfm2", (BF16, PADDED))]
    cases.append((BLIND[0], BLIND[1:]))
    specs = PACKABLE | STATEFUL | SOFTCAP
    found = {case: one(recipe, make(Path(folder), case[0], specs[case[0]]), list(case[1])) for case in cases}
    torch.save(found, Path(folder) / "found.pt")


def _register_blind() -> None:
    """Attention that sees all that came before, whatever row it belongs to."""
    import torch
    from transformers import AttentionInterface
    from transformers.models.llama.modeling_llama import repeat_kv

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[Any, None]:
        groups = query.shape[1] // key.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            query, repeat_kv(key, groups), repeat_kv(value, groups), is_causal=True, scale=kwargs["scaling"]
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("blind", attention)
