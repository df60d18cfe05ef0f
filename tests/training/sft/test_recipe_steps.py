"""Every recipe of the paper trains two real steps on a tiny model of its family, in its conversation format."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from family_models import family_model
from one_worker import without_ray
from recipe_data import agent_rows, math_rows, reasoned_rows, write_rows

from eaft_verl.data.prepare import load_prepared
from eaft_verl.data.show import bracketed
from eaft_verl.experiment.train import train
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.resolve import declared_keys, load_recipe, resolve
from eaft_verl.runs import Run

FOLDER = Path(__file__).parents[3] / "recipes"
SMALL = [
    *("device=cpu", "data.max_length=1536", "evaluate.target=[sums]", "evaluate.general=[]", "evaluate.drift=null"),
    *("evaluate.backend=hf", "evaluate.backend_args=null", "evaluate.points=1", "verl.trainer.n_gpus_per_node=1"),
    *("verl.trainer.total_training_steps=2", "verl.trainer.save_freq=-1", "verl.data.train_batch_size=4"),
    *("verl.data.max_token_len_per_gpu=1536", "verl.engine.offload_policy=false"),
    "verl.engine.mixed_precision={param_dtype: fp32, reduce_dtype: fp32}",
]
# recipe, arm, family, rows, architecture: every kind of engine need is there (plain, second engine, pass over the base,
# statistics of the whole batch, gate), every recipe and every family
CASES = [
    ("math_qwen3_4b", "sft", "qwen3_instruct_2507", math_rows, "Qwen3ForCausalLM"),
    ("math_qwen3_4b", "sft_kl", "qwen3_instruct_2507", math_rows, "Qwen3ForCausalLM"),
    ("math_qwen2_5_32b", "eaft", "qwen2_5", math_rows, "Qwen2ForCausalLM"),
    ("math_glm4_9b", "flow", "glm4_0414", math_rows, "Glm4ForCausalLM"),
    ("math_glm4_9b", "eaft", "glm4_0414", agent_rows, "Glm4ForCausalLM"),
    ("medical_qwen3_4b_thinking", "eaft", "qwen3_thinking_2507", reasoned_rows, "Qwen3ForCausalLM"),
    ("agent_qwen3_4b", "talr", "qwen3_instruct_2507", agent_rows, "Qwen3ForCausalLM"),
    ("lr_sweep_qwen3_4b", "sft_1e-6", "qwen3_instruct_2507", math_rows, "Qwen3ForCausalLM"),
]
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 31, "y": 76}}\n</tool_call><|im_end|>'
QUICK = [("math_qwen2_5_32b", "eaft"), ("math_glm4_9b", "flow"), ("medical_qwen3_4b_thinking", "eaft")]  # each family
TRAINED = {  # of the first row, by hand
    ("math_qwen3_4b", "sft"): ["It is \\boxed{107}.<|im_end|>"],
    ("math_qwen2_5_32b", "eaft"): ["It is \\boxed{107}.<|im_end|>"],
    ("math_glm4_9b", "flow"): ["\nIt is \\boxed{107}.<|user|>"],
    ("math_glm4_9b", "eaft"): ['add\n{"x": 31, "y": 76}<|observation|>', "\nIt is 107.<|user|>"],
    ("medical_qwen3_4b_thinking", "eaft"): ["Adding (31, 76).\n</think>\n\nIt is 107.<|im_end|>"],
    ("agent_qwen3_4b", "talr"): [CALL, "It is 107.<|im_end|>"],
}


def marked(cases: list[Any]) -> list[Any]:
    """The cases as parameters, named, all but one of each family slow."""
    slow = [[] if case[:2] in QUICK else [pytest.mark.slow] for case in cases]
    return [pytest.param(case, marks=mark, id="-".join(case[:3])) for case, mark in zip(cases, slow, strict=True)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Run]]:
    """All of them in this process."""
    folder = tmp_path_factory.mktemp("recipes")
    done: dict[tuple[str, str], Run] = {}

    def run(name: str, arm: str, family: str, rows: Callable[[int], list[dict[str, Any]]], _: str) -> Run:
        if (name, arm) in done:
            return done[name, arm]
        model = folder / family
        if not model.exists():
            family_model(model, family)
        data = write_rows(folder / f"{rows.__name__}.jsonl", rows(8))
        recipe = load_recipe(FOLDER / f"{name}.yaml")
        config = resolve(recipe, arm, [*SMALL, f"model={model}", f"data.train={data}", f"output={folder / name}-{arm}"])
        check(config)
        done[name, arm] = train(config, declared_keys(recipe, arm))
        return done[name, arm]

    with without_ray(folder):
        yield run


@pytest.mark.parametrize("case", marked(CASES))
def test_two_steps(trained: Callable[..., Run], case: tuple[Any, ...]) -> None:
    arm, architecture = case[1], case[4]
    run = trained(*case)
    rows = [row for row in run.metrics() if row["split"] == "train"]
    assert run.info["status"] == "finished" and run.info["total_steps"] == 2
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row[key]) for row in rows for key in ("loss", "nll", "grad_norm"))
    assert all(row["grad_norm"] > 0 for row in rows)
    peak = 1e-6 if arm == "sft_1e-6" else 1e-5
    assert max(row["lr"] for row in rows) == pytest.approx(peak)
    prepared = load_prepared(run.path.parent / "data" / "train.parquet")
    assert rows[1]["tokens"] == sum(sum(example.loss_mask) for example in prepared.examples)  # 8 rows, 2 steps of 4
    assert prepared.manifest["counts"]["open_turns"] == 0 and prepared.manifest["counts"]["kept"] == 8
    check_export(run, architecture)


def check_export(run: Run, architecture: str) -> None:
    """A model of the family that transformers loads, with what it needs to stop where its family stops."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = run.checkpoints()[2]
    assert AutoConfig.from_pretrained(folder).architectures == [architecture]
    base = Path(run.info["model"])
    stops = GenerationConfig.from_pretrained(folder).eos_token_id
    assert stops == GenerationConfig.from_pretrained(base).eos_token_id and len(stops) > 1
    assert AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(base).chat_template


@pytest.mark.parametrize("case", marked([case for case in CASES if case[:2] in TRAINED]))
def test_what_was_trained_on(trained: Callable[..., Run], case: tuple[Any, ...]) -> None:
    from transformers import AutoTokenizer

    run = trained(*case)
    example = load_prepared(run.path.parent / "data" / "train.parquet").examples[0]
    text = bracketed(AutoTokenizer.from_pretrained(run.info["model"]), example.input_ids, example.loss_mask)
    found = [part.partition("]]")[0].replace("⏎\n", "\n") for part in text.split("[[")[1:]]
    assert found == TRAINED[case[:2]]


@pytest.mark.slow
def test_arms_did_what_they_are_named_for(trained: Callable[..., Run]) -> None:
    runs = {case[:2]: trained(*case).metrics()[0] for case in CASES}
    sft, anchored = runs["math_qwen3_4b", "sft"], runs["math_qwen3_4b", "sft_kl"]
    assert sft["loss"] == pytest.approx(sft["nll"]) and sft["weight_mean"] == pytest.approx(1.0)
    assert anchored["anchor_kl"] == 0.0  # the reference is the model itself before the first step
    assert anchored["nll"] == pytest.approx(sft["nll"], rel=1e-5)
    for name in ("math_qwen2_5_32b", "math_glm4_9b", "medical_qwen3_4b_thinking"):
        assert 0 < runs[name, "eaft"]["weight_mean"] < 1 and runs[name, "eaft"]["loss"] < runs[name, "eaft"]["nll"]
    assert 0 < runs["math_glm4_9b", "flow"]["weight_mean"] < 1  # exp(-nll / median nll) of each example
