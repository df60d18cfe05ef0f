"""Loss and all gradients of verl's engine with our loss equal a plain float64 computation, however a batch is laid out.

The reference shares no code with the package but the tiny model and the examples: one sequence at a time, the formula
of each objective written out, `autograd` for the gradient.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from engine_cases import ENGINES, EXPORTED, PADDED, TOP, Case, cases, examples, run_cases, sample_weights
from tiny import tiny_model

WORLDS = (1, 2)
TOLERANCE = {"bf16": 3e-2}  # relative; float32 otherwise
FLOAT32 = 1e-5
RECIPE = """
device: cpu
data: {{train: {data}, max_length: 64}}
verl:
  engine: {{mixed_precision: {{param_dtype: fp32, reduce_dtype: fp32}}}}
  data: {{train_batch_size: 8, max_token_len_per_gpu: 64}}
  trainer: {{total_epochs: 1}}
arms:
  sft: {{objective: {{name: sft}}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, adapter and recipe that all processes read."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("exactness")
    tiny_model(folder / "model", hidden=32)
    tiny_model(folder / "model-reference", hidden=32, seed=5)
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder / "adapter")
    (folder / "recipe.yaml").write_text(RECIPE.format(data=folder / "recipe.yaml"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """{world size: [results of each rank]}."""
    mp.spawn(run_cases, args=(str(folder), str(folder / "recipe.yaml"), str(folder / "model")), nprocs=2)
    halves, ranks = ([torch.load(folder / f"{world}_{rank}.pt") for rank in range(2)] for world in WORLDS)
    return {1: [halves[0] | halves[1]], 2: ranks}


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[bool | str, torch.nn.Module]:
    """{with adapter: float64 model}, and the frozen one."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.float64, attn_implementation="eager"
        ).double()

    frozen = AutoModelForCausalLM.from_pretrained(folder / "model-reference", dtype=torch.float64).double()
    return {
        "frozen": frozen,
        False: load(),
        True: PeftModel.from_pretrained(load(), folder / "adapter", is_trainable=True).double(),
    }


def reference_weight(case: Case, logp: torch.Tensor, row: int) -> torch.Tensor:
    """Weight of each position from its [T, V] log-probabilities and the label's, by the published formulas."""
    table, label = logp
    if case.objective == "prift":
        return label.exp()
    if case.objective in ("mile", "idft"):
        entropy = -(table.exp() * table).sum(dim=-1)
        if case.objective == "mile":
            return (1 + entropy) * case.state.get("weight_scale", 1.0)
        exponent = (-(label + entropy)).exp().clamp(0.1, 2.0)
        blend = (case.state["progress"] - 0.2) / 0.1
        return label.exp() ** (1 + blend * (exponent - 1))
    if case.objective == "gift":
        raised = label.exp() * (math.exp(case.params["boost"]) - 1)
        return raised / (1 + raised)
    if case.objective == "sft":
        return torch.ones_like(label)
    if case.objective == "eaft":
        k = case.params.get("k", 20)
        best = table.topk(k, dim=-1).values.log_softmax(dim=-1)
        entropy = -(best.exp() * best).sum(dim=-1)
        return (entropy / math.log(k)) ** case.params.get("power", 1.0) * case.state.get("weight_scale", 1.0)
    if case.objective == "deft":
        return label.exp() ** (table.exp() ** 2).sum(dim=-1)
    if case.objective == "talr":
        tau = case.params.get("tau", case.state.get("tau"))
        return torch.maximum(label.exp() ** (1 / tau), torch.tensor(case.params["floor"], dtype=label.dtype))
    assert case.objective == "flow"
    return torch.full_like(label, sample_weights()[row])


def anchor_of(case: Case) -> dict[str, Any] | None:
    return case.params.get("anchor", {"kind": "forward_kl", "coef": 1.0} if case.objective == "gift" else None)


def reference_divergence(case: Case, table: torch.Tensor, frozen: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The anchor's term of each position by the textbook formula, from two [T, V] tables of log-probabilities."""
    anchor = anchor_of(case)
    if anchor["kind"] == "mask_target":
        others = torch.ones_like(table, dtype=torch.bool).scatter(-1, labels[:, None], False)
        ours, theirs = (part[others].view(len(part), -1).log_softmax(-1) for part in (table, frozen))
        return (theirs.exp() * (theirs - ours)).sum(-1)
    if anchor["kind"] == "forward_kl":
        return (frozen.exp() * (frozen - table)).sum(-1)
    if anchor["kind"] == "reverse_kl":
        return (table.exp() * (table - frozen)).sum(-1)
    ids = frozen.topk(anchor["k"], dim=-1).indices
    ours, theirs = (part.gather(-1, ids).exp() for part in (table, frozen))
    ours, theirs = (torch.cat([part, 1 - part.sum(-1, keepdim=True)], dim=-1) for part in (ours, theirs))
    return (theirs * (theirs / ours).log()).sum(-1)


def reference(model: Any, frozen: Any, case: Case) -> dict[str, Any]:
    """Loss, gradients and the step's metrics of a batch in float64."""
    rows = [(row, examples()[row]) for row in case.rows if row != PADDED]
    trained = sum(sum(example.loss_mask[1:]) for _, example in rows)
    model.zero_grad()
    loss, nlls, weights, divergences = 0.0, [], [], []
    for row, example in rows:
        ids = torch.tensor(example.input_ids)
        mask = torch.tensor(example.loss_mask[1:]).bool()
        table = model(ids[None]).logits[0, :-1].log_softmax(dim=-1)
        label = table[torch.arange(len(ids) - 1), ids[1:]]
        with torch.no_grad():
            frozen_table = frozen(ids[None]).logits[0, :-1].log_softmax(dim=-1)
        if case.objective == "psft":
            ratio = (label - frozen_table[torch.arange(len(ids) - 1), ids[1:]]).exp()
            tokens, weight = -torch.minimum(ratio, ratio.clamp(0.8, 1.28)), ratio.detach() * (ratio <= 1.28)
        else:
            with torch.no_grad():
                frozen_label = frozen_table[torch.arange(len(ids) - 1), ids[1:]]
                whose = (frozen_table, frozen_label) if "base" in (case.source or "") else (table, label)
                weight = reference_weight(case, whose, row)
            tokens = weight * -label
        if anchor := anchor_of(case):
            divergence = reference_divergence(case, table, frozen_table, ids[1:])
            share = 1 - weight if case.objective == "gift" else 1.0
            tokens = tokens + anchor["coef"] * share * divergence
            divergences.append(divergence.detach()[mask])
        part = tokens[mask].sum() / trained
        part.backward()
        loss += part.item()
        nlls.append(-label.detach()[mask])
        weights.append(weight[mask])
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    nll, weight = torch.cat(nlls), torch.cat(weights)
    medians = torch.stack([part.mean() for part in nlls]).quantile(0.5)
    metrics = {"nll": nll.mean(), "weight_mean": weight.mean(), "median_example_nll": medians}
    metrics |= {"anchor_kl": torch.cat(divergences).mean()} if divergences else {}
    metrics |= {"ess": weight.sum() ** 2 / (len(weight) * (weight**2).sum()), "step_tokens": trained}
    return {"loss": loss, "grads": grads, "metrics": {name: float(value) for name, value in metrics.items()}}


@pytest.mark.parametrize(
    ("world", "case"), [pytest.param(w, case, id=f"{w}-{case.name}") for w in WORLDS for case in cases(w)]
)
def test_step_equals_plain_float64(world: int, case: Case, results: Any, references: Any) -> None:
    lora = case.engine == "lora"
    expected = reference(references[lora], references[False] if lora else references["frozen"], case)
    found = results[world][0][case.name]
    tolerance = TOLERANCE.get(case.engine, FLOAT32)
    assert found["metrics"]["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    for name, value in expected["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=tolerance), name
    assert found["grads"].keys() == expected["grads"].keys()
    names = sorted(expected["grads"])
    ours = torch.cat([found["grads"][name].double().flatten() for name in names])
    truth = torch.cat([expected["grads"][name].flatten() for name in names])
    assert truth.norm() > 1e-3
    assert ((ours - truth).norm() / truth.norm()).item() <= tolerance


def test_the_head_is_fused_wherever_it_may_be(results: Any) -> None:
    for case in cases(2):
        whole = case.engine in ("padded", "whole") or anchor_of(case) is not None
        assert [found[case.name]["fused"] for found in results[2]] == [not whole] * 2, case.name


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("engine", ["fp32", "padded"])
def test_inference_keeps_the_order_of_the_rows(world: int, engine: str, results: Any, references: Any) -> None:
    rows = [
        values
        for rank in range(world)
        for values in zip(*(results[world][rank][f"infer-{engine}"][name] for name in ("nll", "entropy")), strict=True)
    ]
    for (nll, entropy), example in zip(rows, examples(), strict=True):
        ids = torch.tensor(example.input_ids)
        mask = torch.tensor(example.loss_mask[1:]).bool()
        with torch.no_grad():
            table = references[False](ids[None]).logits[0, :-1].log_softmax(dim=-1)
        best = table.topk(20, dim=-1).values.log_softmax(dim=-1)
        label = table[torch.arange(len(ids) - 1), ids[1:]]
        torch.testing.assert_close(nll[:-1][mask].double(), -label[mask], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            entropy[:-1][mask].double(), -(best.exp() * best).sum(dim=-1)[mask], rtol=1e-5, atol=1e-5
        )
        assert nll[-1] == 0.0
        assert not nll[:-1][~mask].any()


def test_ranks_report_the_same_metrics(results: Any) -> None:
    first, second = results[2]
    for case in cases(2):
        if case.engine != "ulysses":
            for name in ("loss", "nll", "weight_p50", "ess", "step_tokens"):
                assert first[case.name]["metrics"][name] == second[case.name]["metrics"][name]


@pytest.fixture(scope="module")
def exported(folder: Path, results: Any, references: Any) -> Any:
    """(world, engine) -> weights of the exported folder, and those of the reference with its adapter merged."""
    import copy

    from transformers import AutoModelForCausalLM

    def load(world: int, engine: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        model = AutoModelForCausalLM.from_pretrained(folder / f"export-{world}-{engine}")
        truth = copy.deepcopy(references[engine == "lora"])
        truth = truth.merge_and_unload() if engine == "lora" else truth
        return model.state_dict(), truth.state_dict()

    return load


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("engine", EXPORTED)
def test_export_is_the_whole_model_to_bfloat16(world: int, engine: str, exported: Any) -> None:
    found, truth = exported(world, engine)
    assert found.keys() == truth.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight.double(), truth[name], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("engine", ["fp32", "lora"])
def test_float32_export_keeps_float32(world: int, engine: str, exported: Any) -> None:
    found, truth = exported(world, engine)
    for name, weight in found.items():
        torch.testing.assert_close(weight.double(), truth[name], rtol=1e-6, atol=1e-7)


def test_verl_found_the_platform_through_its_entry_point(results: Any) -> None:
    assert [rank["platform"] for rank in results[2]] == ["PlatformCPU"] * 2


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("engine", ["fp32", "padded"])
def test_the_stored_reference_is_the_frozen_models(world: int, engine: str, results: Any, references: Any) -> None:
    rows = [row for rank in range(world) for row in results[world][rank][f"top-{engine}"]]
    for (ids, logprob, tail), example in zip(rows, examples(), strict=True):
        with torch.no_grad():
            table = references["frozen"](torch.tensor([example.input_ids])).logits[0].log_softmax(dim=-1)
        torch.testing.assert_close(table.gather(-1, ids), logprob.double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(table.topk(TOP["k"]).values, logprob.double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(1 - logprob.double().exp().sum(-1), tail.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("engine", ["fp32", "padded"])
def test_the_meter_reads_the_divergence_and_leaves_the_training_alone(
    world: int, engine: str, results: Any, references: Any
) -> None:
    found = [results[world][rank][f"drift-{engine}"] for rank in range(world)]
    assert all(one["kept"] and one["same_training"] for one in found)
    rows = [row for one in found for row in zip(one["kl"], one["same"], strict=True)]
    for (kl, same), example in zip(rows, examples(), strict=True):
        ids, mask = torch.tensor([example.input_ids]), torch.tensor(example.loss_mask[1:]).bool()
        with torch.no_grad():
            theirs, ours = (references[name](ids).logits[0, :-1].log_softmax(dim=-1) for name in ("frozen", False))
        best = theirs.topk(TOP["k"], dim=-1).indices
        p, q = (torch.cat([part.gather(-1, best).exp(), torch.zeros(len(best), 1)], -1) for part in (theirs, ours))
        p[:, -1], q[:, -1] = 1 - p.sum(-1), 1 - q.sum(-1)
        known = (p * (p / q).log()).sum(-1)
        torch.testing.assert_close(kl[:-1][mask].double(), known[mask], rtol=1e-4, atol=1e-5)
        assert (same[:-1][mask].bool() == (theirs.argmax(-1) == ours.argmax(-1))[mask]).all()


def test_what_rows_share_was_taken_once_where_it_can_be(results: dict[int, list[dict[str, Any]]]) -> None:
    for ranks in results.values():
        left_out = {engine: sum(found.get(f"taken once, {engine}", 0) for found in ranks) for engine in ENGINES}
        assert all(left_out[engine] > 0 for engine in ("fp32", "no_sync", "whole", "bf16", "lora"))
        assert not any(left_out[engine] for engine in ("padded", "eager", "ulysses"))
