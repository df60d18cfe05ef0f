"""What the exactness test runs on verl's real engine, in processes of its own. Imports verl only inside functions."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SMALL = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2}
DYNAMIC = {"use_dynamic_bsz": True, "max_token_len_per_gpu": 64}
ALL_ROWS = (0, 1, 2, 3, 4, 5, 6, 7)
PADDED = -1


@dataclass(frozen=True)
class Case:
    """One training step: which objective, how verl lays the batch out, which rows it holds."""

    name: str
    objective: str
    params: dict[str, Any] = field(default_factory=dict)
    engine: str = "fp32"  # key of ENGINES
    layout: dict[str, Any] = field(default_factory=lambda: SMALL)
    rows: tuple[int, ...] = ALL_ROWS
    state: dict[str, float] = field(default_factory=dict)
    # what the batch carries besides: "top" (stored reference), "old" (an older policy), "base" (the starting model)
    source: str | None = None


ENGINES: dict[str, list[str]] = {  # overrides of the recipe
    "fp32": [],
    "padded": ["verl.model.use_remove_padding=false"],
    "eager": ["verl.model.override_config.attn_implementation=eager"],
    "no_sync": ["verl.engine.use_no_sync_for_gradient_accumulation=true"],
    "whole": ["fused_head=false"],
    "one_unit": ["verl.engine.wrap_policy.disable=true", "verl.model.enable_gradient_checkpointing=true"],
    "bf16": ["verl.engine.mixed_precision.param_dtype=bf16"],
    # an adapter whose B matrices are not zero, so that A has a gradient
    "lora": ["verl.model.lora_rank=4", "verl.model.lora_adapter_path={folder}/adapter"],
    "ulysses": [
        "verl.engine.ulysses_sequence_parallel_size=2",
        "verl.model.override_config.attn_implementation=ulysses_sdpa",
    ],
}
EXPORTED = ("fp32", "lora", "one_unit")
ANCHOR = {"kind": "forward_kl", "coef": 0.5}
TOP = {"kind": "forward_kl_topk", "coef": 0.7, "k": 8}


def _one(size: int) -> dict[str, Any]:
    return {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": size}


def cases(world: int) -> list[Case]:
    """Every case of a world size; names are unique."""
    talr = {"tau": 2.0, "floor": 0.01}
    made = []
    for engine in ("fp32", "padded"):
        for label, layout in (("micro1", _one(1)), ("micro2", _one(2)), ("micro4", _one(4)), ("dynamic", DYNAMIC)):
            made.append(Case(f"eaft-{engine}-{label}", "eaft", engine=engine, layout=layout))
            made.append(Case(f"sft-{engine}-{label}", "sft", engine=engine, layout=layout))
        for label, layout in (("micro2", _one(2)), ("dynamic", DYNAMIC)):
            made.append(Case(f"deft-{engine}-{label}", "deft", engine=engine, layout=layout))
            made.append(Case(f"flow-{engine}-{label}", "flow", {"temperature": 1.0}, engine, layout))
            made.append(Case(f"talr-{engine}-{label}", "talr", talr, engine, layout))
    for objective in ("sft", "eaft"):
        made.append(Case(f"{objective}-no_sync-micro1", objective, engine="no_sync", layout=_one(1)))
        made.append(Case(f"{objective}-bf16-micro2", objective, engine="bf16"))
        made.append(Case(f"{objective}-lora-micro2", objective, engine="lora"))
        made.append(Case(f"{objective}-whole-dynamic", objective, engine="whole", layout=DYNAMIC))
        made.append(Case(f"{objective}-one_unit-micro2", objective, engine="one_unit"))
    made.append(Case("sft_kl-one_unit-dynamic", "sft", {"anchor": ANCHOR}, "one_unit", DYNAMIC))
    made.append(Case("eaft-eager-dynamic", "eaft", engine="eager", layout=DYNAMIC))
    made.append(Case("eaft-no_sync-dynamic", "eaft", engine="no_sync", layout=DYNAMIC))
    made.append(Case("talr-batch_tau", "talr", {"floor": 0.01}, state={"tau": 1.5}))
    made.append(Case("eaft-weight_scale", "eaft", {"weight_norm": "batch_mean"}, state={"weight_scale": 1.7}))
    made.append(Case("eaft-small_k", "eaft", {"k": 5, "power": 2.0}))
    made.extend(_padding_cases())
    made.extend(_anchored_cases(world))
    made.extend(_rival_cases(world))
    if world == 2:
        for label, layout in (("micro2", SMALL), ("dynamic", DYNAMIC)):
            made.append(Case(f"eaft-ulysses-{label}", "eaft", engine="ulysses", layout=layout))
        made.append(Case("deft-ulysses-micro1", "deft", engine="ulysses", layout=_one(1)))
    return made


def _anchored_cases(world: int) -> list[Case]:
    """Second engine, stored reference, adapter off, old policy, in every layout."""
    made = []
    reverse, half = {"kind": "reverse_kl", "coef": 0.3}, (3, 6, 1, 7, *[PADDED] * 4)
    for engine in ("fp32", "padded"):
        for label, layout in (("micro1", _one(1)), ("micro4", _one(4)), ("dynamic", DYNAMIC)):
            made.append(Case(f"sft_kl-{engine}-{label}", "sft", {"anchor": ANCHOR}, engine, layout))
            made.append(Case(f"sft-top-{engine}-{label}", "sft", {"anchor": TOP}, engine, layout, source="top"))
            made.append(Case(f"psft-{engine}-{label}", "psft", {}, engine, layout, source="old"))
        made.append(Case(f"eaft-reverse-{engine}", "eaft", {"anchor": reverse}, engine))
    made.append(Case("sft_kl-padding", "sft", {"anchor": ANCHOR}, layout=_one(1), rows=half))
    made.append(Case("sft-top-padding", "sft", {"anchor": TOP}, layout=DYNAMIC, rows=half, source="top"))
    made.append(Case("sft_kl-no_sync", "sft", {"anchor": ANCHOR}, "no_sync", DYNAMIC))
    made.append(Case("sft_kl-bf16", "sft", {"anchor": ANCHOR}, "bf16"))
    for label, layout in (("micro2", SMALL), ("dynamic", DYNAMIC)):
        made.append(Case(f"sft_kl-lora-{label}", "sft", {"anchor": ANCHOR}, "lora", layout))
    if world == 2:
        for label, layout in (("micro2", SMALL), ("dynamic", DYNAMIC)):
            made.append(Case(f"sft_kl-ulysses-{label}", "sft", {"anchor": ANCHOR}, "ulysses", layout))
            made.append(Case(f"sft-top-ulysses-{label}", "sft", {"anchor": TOP}, "ulysses", layout, source="top"))
            made.append(Case(f"psft-ulysses-{label}", "psft", {}, "ulysses", layout, source="old"))
    return made


def _rival_cases(world: int) -> list[Case]:
    """Entropy of the whole vocabulary, a share of the run, weights of the starting model, an anchor by its weight."""
    made, half = [], (3, 6, 1, 7, *[PADDED] * 4)
    base, mask = {"stats": "base"}, {"anchor": {"kind": "mask_target", "coef": 0.3}}
    top = {"boost": 3.0, "anchor": TOP | {"coef": 1.0}}
    for engine in ("fp32", "padded"):
        for label, layout in (("micro2", _one(2)), ("dynamic", DYNAMIC)):
            made.append(Case(f"mile-{engine}-{label}", "mile", {}, engine, layout, state={"weight_scale": 0.4}))
            made.append(Case(f"idft-{engine}-{label}", "idft", {}, engine, layout, state={"progress": 0.27}))
            made.append(Case(f"gift-{engine}-{label}", "gift", {"boost": 3.0}, engine, layout, source="base"))
            made.append(Case(f"eaft-base-{engine}-{label}", "eaft", base, engine, layout, source="base"))
        made.append(Case(f"mile-base-{engine}", "mile", {**base, "weight_norm": "none"}, engine, source="base"))
        made.append(Case(f"mask_target-{engine}", "sft", mask, engine, DYNAMIC))
    made.append(Case("prift-padding", "prift", {}, layout=_one(1), rows=half, source="base"))
    made.append(Case("gift-top", "gift", top, source="top base"))
    if world == 2:
        made.append(Case("eaft-base-ulysses", "eaft", base, "ulysses", DYNAMIC, source="base"))
        made.append(Case("mask_target-ulysses", "sft", mask, "ulysses"))
    return made


def _padding_cases() -> list[Case]:
    """Rows that only fill the batch: some, a whole micro-batch, a whole rank of two, all but one row."""
    some, half = (0, 1, 2, 3, 4, 5, PADDED, PADDED), (3, 6, 1, 7, *[PADDED] * 4)
    one = (5, *[PADDED] * 7)
    made = [Case("sft-padding-first", "sft", layout=_one(1), rows=(PADDED, PADDED, *ALL_ROWS[:6]))]
    for label, rows in (("some", some), ("half", half), ("all_but_one", one)):
        for kind, layout in (("micro2", SMALL), ("dynamic", DYNAMIC)):
            made.append(Case(f"eaft-padding-{label}-{kind}", "eaft", layout=layout, rows=rows))
    return made


def sample_weights() -> list[float]:
    """Of the eight examples, for flow."""
    return [0.25, 1.5, 0.5, 1.0, 2.0, 0.125, 0.75, 1.25]


def examples() -> list[Any]:
    """Eight sequences of 9 to 40 tokens with holes in their masks. Some end on an untrained token; some begin alike, so
    that a CPU takes what they share once."""
    import random

    from eaft_verl.data.prepare import Example

    draw, made = random.Random(3), []
    alike = [draw.randrange(384) for _ in range(24)]
    shared = {0: 24, 2: 19, 4: 16, 6: 18, 7: 24}  # tokens of `alike` that a row begins with
    for number, length in enumerate((40, 9, 33, 17, 26, 12, 21, 37)):
        ids = [draw.randrange(384) for _ in range(length)]
        ids[: shared.get(number, 0)] = alike[: shared.get(number, 0)]
        mask = [0 if t < length // 3 or draw.random() < 0.2 else 1 for t in range(length)]
        mask[-1] = number % 2
        mask[-2] = 1
        made.append(Example(id=str(number), messages=[], input_ids=ids, loss_mask=mask))
    return made


def run_cases(rank: int, folder: str, recipe: str, model: str) -> None:
    """Entry of one of two spawned processes. Leaves {case: what was found} in FOLDER/WORLD_RANK.pt.

    First each process is a world of its own and runs half of the cases of one rank, then both are the ranks of one
    world: importing verl costs more than most of the work.
    """
    os.environ.update(
        {
            **{"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "VERL_LOGGING_LEVEL": "ERROR"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"},
        }
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    register_ulysses_sdpa()
    engines = sorted({case.engine for case in cases(1)})
    for world, group, mine in ((1, 0, engines[rank::2]), (2, rank, list(ENGINES))):
        os.environ.update({"RANK": str(group), "WORLD_SIZE": str(world), "LOCAL_RANK": str(group)})
        os.environ["DIST_INIT_METHOD"] = f"file://{folder}/rendezvous_{world}_{rank if world == 1 else 0}"
        torch.save(_run_world(world, group, mine, folder, recipe, model), Path(folder) / f"{world}_{rank}.pt")
        dist.destroy_process_group()


def _run_world(world: int, rank: int, engines: list[str], folder: str, recipe: str, model: str) -> dict[str, Any]:
    import verl  # noqa: F401 - first of all: its entry points must bring the platform
    from verl.plugin.platform.platform_manager import get_platform

    from eaft_verl.training.sft import fused_head

    results: dict[str, Any] = {"platform": type(get_platform()).__name__}
    usual = fused_head.each_once

    def counted(module: Any, inputs: dict[str, Any], offsets: Any) -> dict[str, Any]:
        found = usual(module, inputs, offsets)
        left_out = inputs["input_ids"].numel() - found["input_ids"].numel()
        results[f"taken once, {engine}"] = results.get(f"taken once, {engine}", 0) + left_out
        return found

    fused_head.each_once = counted
    for engine in engines:
        worker = build_worker(recipe, model, [item.format(folder=folder) for item in ENGINES[engine]])
        worker.open_reference()
        for case in cases(world):
            if case.engine == engine:
                results[case.name] = train_once(worker, case, rank)
        if engine in EXPORTED:
            worker.export(f"{folder}/export-{world}-{engine}", model, "float32")
        if engine in ("fp32", "padded"):
            results[f"infer-{engine}"] = infer_once(worker, rank, world)
            results[f"top-{engine}"] = top_once(worker, rank, world)
            results[f"drift-{engine}"] = drift_once(worker, rank, world, engine)
    return results


def build_worker(recipe: str, model: str, overrides: list[str]) -> Any:
    """Our worker as Ray would build it, from a recipe."""
    from eaft_verl.recipe.resolve import load_recipe, resolve
    from eaft_verl.training.sft.worker import EaftWorker
    from eaft_verl.training.sft.workers import worker_config

    config = resolve(load_recipe(recipe), "sft", overrides)
    reference = None if config.verl.model.lora_rank else f"{model}-reference"
    worker = EaftWorker(worker_config(config, model, 10, reference))
    worker.reset()
    return worker


def train_once(worker: Any, case: Case, rank: int) -> dict[str, Any]:
    """One `train_batch` of the worker; gradients are taken where the optimizer would take its step."""
    from verl.utils import tensordict_utils as tu

    from eaft_verl.recipe.objective import build_objective
    from eaft_verl.training.sft.batches import make_batch
    from eaft_verl.training.sft.loss import BATCH_FLAGS, TokenLoss

    weights = sample_weights() if case.objective == "flow" else None
    flags = {**BATCH_FLAGS, **case.layout, "objective_state": case.state}
    model = Path(worker.config.model_config.path)
    sources = [Stored(kind, model) for kind in (case.source or "").split()]
    batch = make_batch(examples(), list(case.rows), flags, weights, sources)
    parallel = worker.engine.get_data_parallel_size()
    mine = tu.chunk_tensordict(batch, parallel)[worker.engine.get_data_parallel_rank()]
    tu.assign_non_tensor(mine, global_token_num=None)
    grads: dict[str, Any] = {}

    def take() -> float:
        for name, parameter in worker.engine.module.named_parameters():
            if parameter.grad is not None:
                grads[name] = parameter.grad.full_tensor().clone()
        return 0.0

    worker.engine.optimizer_step = take
    worker.set_loss_fn(TokenLoss(build_objective(case.objective, **case.params)))
    output = worker.train_batch(mine)
    metrics = None if output is None else tu.get(output, "metrics")
    return {"metrics": metrics, "grads": grads if rank == 0 else {}, "fused": worker.loss_fn.fused}


class Stored:
    """Token values of the reference model by a plain forward pass, example by example."""

    def __init__(self, kind: str, model: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.kind = kind
        found = AutoModelForCausalLM.from_pretrained(f"{model}-reference", dtype=torch.float64)
        with torch.no_grad():
            self.tables = [found(torch.tensor([example.input_ids])).logits[0].log_softmax(-1) for example in examples()]

    def tokens(self, index: int) -> dict[str, Any]:
        import torch

        table = self.tables[index]
        if self.kind == "old":
            label = torch.tensor([*examples()[index].input_ids[1:], 0])
            return {"old_logprob": table.gather(-1, label[:, None])[:, 0].float()}
        if self.kind == "base":
            label = torch.tensor([*examples()[index].input_ids[1:], 0])
            best = table.topk(20).values.log_softmax(-1)
            found = {
                "logprob": table.gather(-1, label[:, None])[:, 0],
                "entropy": -(best.exp() * best).sum(-1),
                "full_entropy": -(table.exp() * table).sum(-1),
                "sum_p2": (table.exp() ** 2).sum(-1),
            }
            return {f"base_{name}": values.float() for name, values in found.items()}
        top = table.topk(TOP["k"], dim=-1)
        tail = 1.0 - top.values.exp().sum(-1)
        return {
            "anchor_ids": top.indices.int(),
            "anchor_logprob": top.values.float(),
            "anchor_tail": tail.float(),
        }


def top_once(worker: Any, rank: int, world: int) -> list[Any]:
    """The rows of a stored reference, from a pass over the workers' second model, in the order of the rows."""
    import torch
    from verl.utils import tensordict_utils as tu

    from eaft_verl.training.sft.anchor_cache import EmitTop, unpack
    from eaft_verl.training.sft.batches import make_batch
    from eaft_verl.training.sft.loss import BATCH_FLAGS

    batch = make_batch(examples(), list(ALL_ROWS), {**BATCH_FLAGS, **DYNAMIC}, None)
    mine = tu.chunk_tensordict(batch, world)[rank]
    tu.assign_non_tensor(mine, global_token_num=None)
    worker.set_loss_fn(EmitTop(TOP["k"]))
    output = worker.infer_batch(mine)
    columns = [output[f"top_{rank:04d}"].unbind() for rank in range(TOP["k"])]
    packed = [torch.stack(row, dim=-1) for row in zip(*columns, strict=True)]
    return [tuple(unpack(row, tail)) for row, tail in zip(packed, output["tail"].unbind(), strict=True)]


def drift_once(worker: Any, rank: int, world: int, engine: str) -> dict[str, Any]:
    """A reading of the meter between two equal training passes: its rows, and whether the passes came out the same."""
    import torch
    from verl.utils import tensordict_utils as tu

    from eaft_verl.training.sft.batches import make_batch
    from eaft_verl.training.sft.loss import BATCH_FLAGS

    case = Case("between", "eaft", engine=engine)
    before = train_once(worker, case, rank)
    loss = worker.loss_fn
    sources = [Stored("top", Path(worker.config.model_config.path))]
    batch = make_batch(examples(), list(ALL_ROWS), {**BATCH_FLAGS, **DYNAMIC}, None, sources)
    mine = tu.chunk_tensordict(batch, world)[rank]
    tu.assign_non_tensor(mine, global_token_num=None)
    output = worker.drift_batch(mine)
    rows = {name: [row.clone() for row in output[name].unbind()] for name in ("kl", "same")}
    kept = worker.loss_fn is loss and loss.guarded
    after = train_once(worker, case, rank)
    same = all(torch.equal(before["grads"][name], after["grads"][name]) for name in before["grads"])
    return {**rows, "kept": kept, "same_training": same and before["metrics"]["loss"] == after["metrics"]["loss"]}


def infer_once(worker: Any, rank: int, world: int) -> dict[str, Any]:
    """Per-token answers of `infer_batch`, in the order of the rows, with micro-batches that verl reorders."""
    from verl.utils import tensordict_utils as tu

    from eaft_verl.objectives import Sft
    from eaft_verl.training.sft.batches import make_batch
    from eaft_verl.training.sft.loss import BATCH_FLAGS, TokenLoss

    batch = make_batch(examples(), list(ALL_ROWS), {**BATCH_FLAGS, **DYNAMIC}, None)
    mine = tu.chunk_tensordict(batch, world)[rank]
    tu.assign_non_tensor(mine, global_token_num=None)
    worker.set_loss_fn(TokenLoss(Sft()))
    output = worker.infer_batch(mine)
    return {name: [row.clone() for row in output[name].unbind()] for name in ("nll", "entropy")}


def register_ulysses_sdpa() -> None:
    """Plain attention between two all-to-alls: verl patches flash-attention only, which a CPU does not have."""
    import torch
    import torch.distributed as dist
    from transformers import AttentionInterface
    from transformers.models.llama.modeling_llama import repeat_kv
    from verl.utils.ulysses import (
        gather_heads_scatter_seq,
        gather_seq_scatter_heads,
        get_ulysses_sequence_parallel_group,
        get_ulysses_sequence_parallel_world_size,
    )

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[Any, None]:
        """[1, heads, T / sp, D] -> [1, T / sp, heads, D]; sequences are told apart by their position ids."""
        query, key, value = (gather_seq_scatter_heads(part, seq_dim=2, head_dim=1) for part in (query, key, value))
        positions = kwargs["position_ids"]
        parts = [torch.empty_like(positions) for _ in range(get_ulysses_sequence_parallel_world_size())]
        dist.all_gather(parts, positions.contiguous(), group=get_ulysses_sequence_parallel_group())
        sequence = (torch.cat(parts, dim=-1) == 0).cumsum(-1)[0]
        allowed = (sequence[:, None] == sequence[None, :]).tril()
        groups = query.shape[1] // key.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            query, repeat_kv(key, groups), repeat_kv(value, groups), attn_mask=allowed, scale=kwargs["scaling"]
        )
        return gather_heads_scatter_seq(out, seq_dim=2, head_dim=1).transpose(1, 2).contiguous(), None

    AttentionInterface.register("ulysses_sdpa", attention)
