"""`eaft plan` from recipes: what fits, what it proposes, where its numbers of tokens come from, errors, JSON."""

import json
import re
from pathlib import Path

import pytest
import tiny
from config_fixtures import composed_once  # noqa: F401
from omegaconf import DictConfig
from plan_setups import QWEN_32B, config, write_recipe
from rich.console import Console

from eaft_verl.cli import main
from eaft_verl.errors import ConfigError
from eaft_verl.models import load_tokenizer
from eaft_verl.planning.amount import amount_of
from eaft_verl.planning.architectures import architecture_of
from eaft_verl.planning.arm_plan import plan_arm
from eaft_verl.planning.formulas import GIB
from eaft_verl.planning.machine import Machine, gpus_here, machine_of, parse_gpus
from eaft_verl.planning.remedies import remedies
from eaft_verl.planning.setup import arm_of, micro_batch
from eaft_verl.planning.text import _grouped, _tables
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.datasets import prepare_data
from eaft_verl.recipe.resolve import load_recipe

A100 = Machine(1, 8, 80.0, "A100", None)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def test_the_32b_model_with_fp32_adam_does_not_fit_eight_a100_and_offloading_is_the_first_remedy(recipe: Path) -> None:
    full = config(recipe, "sft")
    plan = plan_arm(full, A100)
    assert plan.verdict == "no" and plan.peak > 85 * GIB
    found = remedies(full, A100)
    assert found[0]["overrides"] == ["verl.engine.offload_policy=true"]
    assert {remedy["way"].partition(":")[0] for remedy in found} >= {"8-bit Adam", "more nodes", "LoRA"}
    offloaded = plan_arm(config(recipe, "sft", "verl.engine.offload_policy=true"), A100)
    assert offloaded.verdict == "fits" and offloaded.peak < 40 * GIB
    assert offloaded.host["offloaded"] == 16 * QWEN_32B.parameters


def test_verls_other_offloading_does_not_help_and_the_plan_says_so(recipe: Path) -> None:
    parked = config(recipe, "sft", "verl.engine.optimizer_offload=true", "verl.engine.param_offload=true")
    plan = plan_arm(parked, A100)
    assert plan.peak == plan_arm(config(recipe, "sft"), A100).peak
    assert any("do not lower the peak" in note for note in plan.arm.notes)


@pytest.mark.parametrize("arm", ["sft", "kl", "topk"])
def test_every_remedy_fits_when_it_is_applied_and_passes_the_checks(recipe: Path, arm: str) -> None:
    for remedy in remedies(config(recipe, arm), A100):
        changed = config(recipe, arm, *remedy["overrides"])
        check(changed, elsewhere=True)
        machine = Machine(changed.verl.trainer.nnodes, 8, 80.0, "A100", None)
        plan = plan_arm(changed, machine)
        assert plan.verdict == "fits", remedy
        assert plan.peak == pytest.approx(remedy["peak"])


def test_a_state_that_is_saved_in_the_background_takes_its_size_in_host_memory(recipe: Path) -> None:
    plain, behind = (plan_arm(config(recipe, "sft", f"async_save={on}"), A100) for on in ("false", "true"))
    assert behind.needed - plain.needed == 12 * QWEN_32B.parameters and behind.peak == plain.peak


def test_what_each_anchor_loads(recipe: Path) -> None:
    plans = {arm: plan_arm(config(recipe, arm), A100) for arm in ("sft", "kl", "topk", "lora", "lora_kl")}
    assert plans["kl"].device["reference"] == 2 * QWEN_32B.parameters / 8
    assert plans["topk"].disk["reference cache"] == 6400 * 16384 * (64 * 8 + 4)
    assert "reference" not in plans["topk"].device and "reference" not in plans["lora_kl"].device
    assert plans["lora_kl"].peak > plans["lora"].peak  # logits and gradient, but no second model
    assert plans["kl"].seconds["arithmetic"] / plans["sft"].seconds["arithmetic"] == pytest.approx(1.25, abs=0.02)
    assert plans["topk"].before_s > 0 == plans["sft"].before_s


def test_disk_holds_an_export_after_1_2_4_8_updates_and_at_the_end(recipe: Path) -> None:
    steps = "verl.trainer.total_training_steps="
    two, three = (plan_arm(config(recipe, "sft", steps + count), A100).disk for count in ("20", "24"))
    assert three["at once"] - two["at once"] == two["export"] == 2 * QWEN_32B.parameters  # 16 is too near to 20
    # two states are kept and a third is written beside them; exports after 1, 2, 4, 8, 20
    assert two["at once"] == 3 * two["resumable checkpoint"] + 5 * two["export"]


def test_grpo_wakes_vllm_beside_what_is_parked(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, grpo=True)
    arm = ["compare.match=none"]
    awake = plan_arm(config(path, "grpo", *arm), A100)
    assert awake.verdict == "no" and awake.seconds["rollout"] > 0
    offloaded = plan_arm(config(path, "grpo", *arm, "verl.engine.offload_policy=true"), A100)
    assert offloaded.verdict == "fits" and offloaded.phase == "rollout"
    assert offloaded.peak == pytest.approx(0.6 * 80 * GIB)
    crowded = config(path, "grpo", *arm, "verl.engine.offload_policy=true",
                     "verl.actor_rollout_ref.rollout.gpu_memory_utilization=0.222")  # fmt: skip
    assert plan_arm(crowded, A100).reasons == ["vLLM's share holds its weights but not the cache of one response"]
    asked = config(path, "grpo", *arm, "verl.actor_rollout_ref.actor.use_kl_loss=true")
    plan = plan_arm(asked, A100)
    assert plan.host["reference"] == 2 * QWEN_32B.parameters and "reference" not in plan.device


@pytest.mark.parametrize(
    ("overrides", "sequences", "expected"),
    [
        ([], 64, (16384, 8)),  # eight ranks, eight sequences each, one to a micro-batch
        (["verl.data.max_token_len_per_gpu=32768"], 64, (32768, 4)),
        (["verl.engine.ulysses_sequence_parallel_size=2", "verl.data.max_token_len_per_gpu=8192"], 64, (8192, 16)),
        (["verl.data.use_dynamic_bsz=false", "verl.data.micro_batch_size_per_gpu=2"], 64, (32768, 4)),
        (["verl.data.max_token_len_per_gpu=1000000"], 64, (131072, 1)),  # there is no more than the batch
    ],
)
def test_the_longest_micro_batch_by_hand(
    recipe: Path, overrides: list[str], sequences: int, expected: tuple[int, int]
) -> None:
    assert micro_batch(config(recipe, "sft", *overrides), sequences, 16384, 16384, 8) == expected


def test_tokens_come_from_prepared_data_where_there_is_some(tmp_path: Path, tiny_model_path: Path) -> None:
    train = tiny.write_sums(tmp_path / "train.jsonl", 12, seed=1)
    path = tmp_path / "small.yaml"
    path.write_text(
        f"model: {tiny_model_path}\noutput: {tmp_path}/out\ndata: {{train: {train}, max_length: 128}}\n"
        "evaluate: {target: [sums]}\nverl: {data: {train_batch_size: 8, max_token_len_per_gpu: 256}}\n"
        "arms: {sft: {objective: {name: sft}}}\n"
    )
    small = config(path, "sft")
    assumed = amount_of(small)
    assert (assumed.examples, assumed.mean, assumed.longest) == (12, 128, 128)
    assert "every example is taken to have data.max_length=128" in assumed.origin
    data = prepare_data(small, load_tokenizer(tiny_model_path), "train")
    lengths = [len(example.input_ids) for example in data.examples]
    found = amount_of(small)
    assert (found.examples, found.mean, found.longest) == (12, sum(lengths) / 12, max(lengths))
    assert found.attended == pytest.approx(sum(n**2 for n in lengths) / sum(lengths), rel=0.3)
    assert found.trained == sum(sum(example.loss_mask) for example in data.examples)
    assert arm_of(small).updates_per_epoch == 2
    other = amount_of(config(path, "sft", "data.rows=4"))
    assert other.examples == 4 and "prepared with another rows" in other.origin


def test_an_unknown_amount_of_data_is_called_unknown(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace(", rows: 6400", ""))
    arm = arm_of(config(recipe, "sft"))
    assert arm.updates is None and "number of examples is unknown" in arm.notes[0]


@pytest.mark.parametrize("text", ["8", "x80", "8x", "0x80", "8x0", "8x-1", "eight", "8x80x2"])
def test_a_machine_in_another_form_is_refused_with_the_form(
    recipe: Path, text: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["plan", str(recipe), "--gpus", text]) == 2
    assert "must be GPUs per node x GiB of each, e.g. 8x80" in capsys.readouterr().err


def test_machines_by_kind() -> None:
    assert parse_gpus("8x80") == (8, "A100", 80.0)
    assert parse_gpus("4xh100-79.6") == (4, "H100", 79.6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=org/nobody-has-this"], "give a folder that holds config.json"),
        (["verl.optim.optimizer=Lion"], "cannot be sized"),
        (["verl.model.lora_rank=8", "verl.model.target_modules=[wrong]"], "is no matrix of a qwen2 layer"),
        (["--gpus", "8xB300-80"], "no speed is known"),
        (["--nodes", "0"], "must be at least 1"),
        (["--arm", "eeaft"], "has no arm 'eeaft'"),
    ],
)
def test_errors_say_what_to_do(
    recipe: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arm = [] if "--arm" in words else ["--arm", "sft"]
    gpus = [] if "--gpus" in words else ["--gpus", "8x80"]
    assert main(["plan", str(recipe), *gpus, *arm, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_model_of_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(ConfigError, match="of type 'mixtral'"):
        architecture_of(str(tmp_path))


def test_exit_codes_text_and_json(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe), "--gpus", "8x80"]) == 3
    text = capsys.readouterr().out
    assert "verl.engine.offload_policy=true" in text and "A100: 50 % of 312 TFLOP/s, assumed" in text
    assert main(["plan", str(recipe), "--gpus", "8x80", "--arm", "lora", "--host", "1000"]) == 0
    assert main(["plan", str(recipe), "--gpus", "8x80", "--arm", "lora", "--host", "60"]) == 3
    capsys.readouterr()
    assert main(["plan", str(recipe), "--gpus", "8xH100-80", "--nodes", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["kind"] == "H100" and set(found["arms"]) == {"sft", "kl", "topk", "lora", "lora_kl"}
    sft = found["arms"]["sft"]
    assert sft["device"]["bytes"] == pytest.approx(sum(sft["device"]["parts"].values()))
    assert sft["updates_per_epoch"] == 100 and sft["updates"] == 1000


RECIPES = (Path(__file__).parents[2] / "recipes").glob("*.yaml")
SHIPPED = sorted(path for path in RECIPES if not path.stem.startswith("synthesize_"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_fits_120_columns_and_says_a_thing_once(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parents[1])
    model = ["model=Qwen/Qwen2.5-32B-Instruct"] if path.stem == "paper" else []
    main(["plan", str(path), "--gpus", "8x40", "--nodes", "2", *model])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    head = " ".join(line for line in lines if line.startswith(" " * 20))  # of every table
    arms = {name for name, arm in load_recipe(path).arms.items() if not arm.get("average")}  # not trained
    assert sorted(head.replace(",", " ").split()) == sorted(arms), "every arm once, above a table"
    said = [line.partition(": ")[2] if set(re.split(", |: ", line)) & arms else line for line in lines[1:]]
    notes = [line for line in said if "--" in line or "tokens" in line or "upper bound" in line]
    assert len(notes) == len(set(notes))


def column(name: str, cells: dict[str, str]) -> tuple[str, dict]:
    return name, {"time": (cells, {})}


def test_arms_of_equal_numbers_are_one_column_and_too_many_columns_are_more_tables() -> None:
    grouped = _grouped([column("sft", {"a": "1"}), column("kl", {"a": "2"}), column("eaft", {"a": "1"})])
    assert [names for names, _ in grouped] == [["sft", "eaft"], ["kl"]]
    console = Console(width=1200)
    many = _grouped([column(f"an_arm_of_some_length_{index}", {"a": str(index)}) for index in range(10)])
    tables = list(_tables(console, many))
    assert [len(table.columns) - 1 for table in tables] == [4, 4, 2]
    assert all(console.measure(table).maximum <= 120 for table in tables)
    (long,) = _tables(console, _grouped([column("x" * 128, {})]))
    assert console.measure(long).maximum > 128, "a name is never cut"


def test_what_would_not_start_is_said_and_planned_all_the_same(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--gpus", "8x80", "--arm", "lora", "verl.data.train_batch_size=63"]
    main(["plan", str(recipe), *words])
    assert "would not start: verl.data.train_batch_size=63" in capsys.readouterr().out


def test_a_cpu_is_judged_by_the_memory_of_the_machine(tmp_path: Path, tiny_model_path: Path) -> None:
    path = tmp_path / "cpu.yaml"
    path.write_text(
        f"device: cpu\nmodel: {tiny_model_path}\noutput: {tmp_path}/out\ndata: {{train: org/data, max_length: 128}}\n"
        "evaluate: {target: [sums]}\narms: {sft: {objective: {name: sft}}}\n"
    )
    assert main(["plan", str(path)]) == 0
    assert main(["plan", str(path), "--host", "0.5"]) == 3  # a worker's imports alone take more


def test_planning_loads_neither_torch_nor_verl(recipe: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from eaft_verl.cli import main; "
        f"assert main(['plan', {str(recipe)!r}, '--gpus', '8x80', '--arm', 'lora']) == 0; "
        "assert not {'torch', 'verl', 'ray', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_settings_are_read_from_the_recipe(recipe: Path) -> None:
    def setup(*overrides: str) -> DictConfig:
        return arm_of(config(recipe, "sft", *overrides)).setup

    assert setup().tokens == 16384 and setup().micro_batches == 8 and setup().checkpointing
    assert setup("verl.engine.fsdp_size=4").shards == 4
    assert setup("verl.engine.mixed_precision.param_dtype=fp32").compute == 4
    assert setup("verl.engine.use_no_sync_for_gradient_accumulation=true").unsynced
    assert setup("objective.weight_norm=batch_mean").extra_forwards == 1
    assert not setup("verl.model.enable_gradient_checkpointing=false").checkpointing


def test_nvidia_smi_is_asked_once_and_read_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    answer = "NVIDIA H100 80GB HBM3, 81559, 580.65.06\nNVIDIA GB10, [N/A], 580.65.06"
    smi.write_text(f"#!/bin/sh\necho '{answer}'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    first, second = gpus_here()
    assert (first.name, first.driver) == ("NVIDIA H100 80GB HBM3", "580.65.06")
    assert first.gib == pytest.approx(79.65, abs=0.01) and second.gib == 0
    assert str(first) == "NVIDIA H100 80GB HBM3, 81559 MiB, 580.65.06"
    here = machine_of(config(write_recipe(tmp_path), "sft"), None, None)
    assert (here.kind, here.gib, here.devices) == ("H100", first.gib, 8)
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert gpus_here() == []
