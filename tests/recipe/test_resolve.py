"""Layers of a configuration, its errors, and what an arm declares."""

import copy
from pathlib import Path
from typing import Any

import pytest
from config_fixtures import composed_once  # noqa: F401
from omegaconf import OmegaConf
from omegaconf.errors import ReadonlyConfigError

from eaft_verl.errors import ConfigError
from eaft_verl.recipe.resolve import OURS_INSTEAD, declared_keys, load_recipe, resolve
from eaft_verl.recipe.verl_keys import OURS_INSTEAD as GRPO_INSTEAD

RECIPE = """
model: some/model
device: cpu
data: {train: generate:sums_train, max_length: 128}
objective: {name: talr, floor: 0.2}
verl:
  optim: {lr: 3e-5}
  trainer: {total_epochs: 3}
arms:
  sft: {objective: {name: sft}}
  fast: {verl: {optim: {lr: 2.0e-4}}, seed: 7}
  plain:
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    (tmp_path / "demo.yaml").write_text(RECIPE, encoding="utf-8")
    return load_recipe(tmp_path / "demo.yaml")


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "other.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# layers


def test_each_layer_wins_over_the_one_before(recipe: Any) -> None:
    plain, fast = resolve(recipe, "plain"), resolve(recipe, "fast")
    assert plain.verl.optim.weight_decay == 0.01  # verl
    assert plain.verl.optim.lr_warmup_steps_ratio == 0.03  # defaults.yaml over verl's 0.0
    assert plain.verl.engine.strategy == "fsdp2"
    assert plain.verl.model.override_config == {"attn_implementation": "sdpa"}  # the device
    assert (plain.verl.optim.lr, plain.verl.trainer.total_epochs, plain.seed) == (3e-5, 3, 0)  # the recipe
    assert (fast.verl.optim.lr, fast.seed) == (2e-4, 7)  # the arm
    assert resolve(recipe, "fast", ["verl.optim.lr=1e-3", "seed=8"]).verl.optim.lr == 1e-3  # the command line
    assert resolve(recipe, "fast", ["seed=8", "seed=9"]).seed == 9


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_adamw_is_fused_unless_something_is_said(recipe: Any, device: str) -> None:
    def said(*words: str) -> Any:
        return resolve(recipe, "plain", [f"device={device}", *words]).verl.optim.override_optimizer_config

    assert said() == {"fused": True}
    assert said("verl.optim.override_optimizer_config.fused=false") == {"fused": False}
    assert said("verl.optim.optimizer=SGD") is None


def test_a_word_of_one_arm_changes_that_arm_and_is_declared(recipe: Any) -> None:
    words = ["verl.optim.lr=1e-5", "arms.fast.verl.optim.lr=5e-5", "arms.sft.objective.name=eaft"]
    assert [resolve(recipe, arm, words).verl.optim.lr for arm in ("plain", "fast")] == [1e-5, 5e-5]
    assert [resolve(recipe, arm, words).objective.name for arm in ("plain", "sft")] == ["talr", "eaft"]
    assert "floor" not in resolve(recipe, "sft", words).objective  # chosen whole
    more = ["arms.plain.objective.floor=0.3", "arms.plain.meter.every=5"]
    assert resolve(recipe, "plain", more).objective == {"name": "talr", "floor": 0.3}
    assert declared_keys(recipe, "plain", more) == ["meter.every", "objective.floor"]
    assert (declared_keys(recipe, "plain"), resolve(recipe, "plain").objective["floor"]) == ([], 0.2)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("arms.fats.seed=1", "has no arm 'fats'; its arms are sft, fast, plain; did you mean fast"),
        ("arms.fast=1", "arms.fast=1 must name a key, arms.fast.key=value; --arms says which arms run"),
        ("arms.fast=null", "arms.fast=None must name a key"),
        ("arms=fast", "arms='fast' must name an arm and a key"),
        ("arms.fast.sead=1", "command line: arms.fast: unknown key sead"),
        ("arms.fast.compare.match=none", "command line: arms.fast sets compare, which holds for all arms"),
    ],
)
def test_a_word_of_one_arm_that_cannot_be_meant(recipe: Any, word: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(recipe, "fast", [word])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_recipe_wins_over_what_the_device_chose(recipe: Any) -> None:
    changes = ["verl.model.override_config.attn_implementation=eager", "verl.model.enable_gradient_checkpointing=true"]
    config = resolve(recipe, "sft", changes)
    assert config.verl.model.override_config.attn_implementation == "eager"
    assert config.verl.model.enable_gradient_checkpointing is True
    assert resolve(
        recipe, "plain", ["trainer=grpo", "verl.engine.use_torch_compile=true"]
    ).verl.engine.use_torch_compile


def test_name_output_recipe_and_arm_are_filled_in(recipe: Any) -> None:
    config = resolve(recipe, "sft")
    assert (config.name, config.arm, config.recipe) == ("demo", "sft", str(recipe.path))
    assert config.output == str(Path("runs/demo").absolute())
    assert resolve(recipe, "sft", ["name=other"]).output == str(Path("runs/other").absolute())
    assert resolve(recipe, "sft", ["output=x/y"]).output == str(Path("x/y").absolute())


def test_resolving_leaves_the_recipe_as_it_was(recipe: Any) -> None:
    before = copy.deepcopy((recipe.shared, recipe.arms))
    first = resolve(recipe, "fast", ["verl.optim.lr=1", "objective.floor=0.5", "evaluate.target=[sums]"])
    assert (recipe.shared, recipe.arms) == before
    assert resolve(recipe, "fast") != first
    assert resolve(recipe, "sft").evaluate.target == []


def test_the_result_is_read_only_and_the_same_every_time(recipe: Any) -> None:
    config = resolve(recipe, "sft")
    with pytest.raises(ReadonlyConfigError):
        config.verl.optim.lr = 1.0
    assert OmegaConf.to_yaml(config) == OmegaConf.to_yaml(resolve(recipe, "sft"))


def test_references_inside_a_recipe_are_resolved(tmp_path: Path) -> None:
    text = "data: {train: a/b, heldout: '${data.train}'}\narms: {sft: }"
    assert resolve(load_recipe(written(tmp_path, text)), "sft").data.heldout == "a/b"
    text = "data: {train: '${data.nothing}'}\narms: {sft: }"
    with pytest.raises(ConfigError, match="reference cannot be resolved"):
        resolve(load_recipe(written(tmp_path, text)), "sft")


# objectives


def test_an_objective_is_chosen_whole(recipe: Any) -> None:
    assert resolve(recipe, "plain").objective == {"name": "talr", "floor": 0.2}
    assert resolve(recipe, "sft").objective == {"name": "sft"}
    assert resolve(recipe, "plain", ["objective.name=eaft"]).objective == {"name": "eaft"}


def test_a_parameter_alone_is_laid_over_the_objective(recipe: Any) -> None:
    assert resolve(recipe, "plain", ["objective.tau=2"]).objective == {"name": "talr", "floor": 0.2, "tau": 2}


# what an arm declares


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ({"objective": {"name": "eaft", "power": 2}}, ["objective.name", "objective.power"]),
        (
            {"seed": 1, "verl": {"optim": {"lr": 1.0, "betas": [0.9, 0.95]}}},
            ["seed", "verl.optim.betas", "verl.optim.lr"],
        ),
        ({"evaluate": {"drift": None}, "objective": {}}, ["evaluate.drift", "objective"]),
        ({}, []),
    ],
)
def test_declared_keys(recipe: Any, arm: dict[str, Any], expected: list[str]) -> None:
    recipe.arms["made"] = arm
    assert declared_keys(recipe, "made") == expected


# devices


def test_auto_is_cpu_without_an_nvidia_driver_or_a_cluster(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert resolve(recipe, "sft", ["device=auto"]).device == "cpu"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert resolve(recipe, "sft", ["device=auto"]).device == "cuda"
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert resolve(recipe, "sft", ["device=auto"]).device == "cuda"
    assert resolve(recipe, "sft").device == "cpu"


def test_cuda_keeps_verls_own_settings(recipe: Any) -> None:
    model = resolve(recipe, "sft", ["device=cuda"]).verl.model
    assert model.override_config == {}
    assert model.enable_gradient_checkpointing is True
    cpu = resolve(recipe, "sft").verl
    assert cpu.model.enable_gradient_checkpointing is False
    assert resolve(recipe, "plain", ["trainer=grpo"]).verl.engine.use_torch_compile is False


def test_an_arm_may_choose_the_device(tmp_path: Path) -> None:
    text = "device: cuda\narms: {a: {device: cpu}, b: {}}"
    loaded = load_recipe(written(tmp_path, text))
    assert (resolve(loaded, "a").device, resolve(loaded, "b").device) == ("cpu", "cuda")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("data.rows", "8"), ("data.heldout", "x.jsonl"), ("evaluate.limit", "3"), ("evaluate.drift", "{rows: 4}")),
        *(("control", "{of: sft, by: nll}"), ("verl.trainer.total_training_steps", "5"), ("name", "other")),
        *(("verl.model.lora_adapter_path", "x"), ("output", "elsewhere")),
    ],
)
def test_null_undoes_what_a_recipe_says_wherever_null_is_the_default(tmp_path: Path, key: str, value: str) -> None:
    nested = value
    for part in reversed(key.split(".")):
        nested = f"{{{part}: {nested}}}"
    arms = "{sft: {}, other: {}}"
    said = OmegaConf.merge(OmegaConf.create(nested), OmegaConf.create(f"{{device: cpu, arms: {arms}}}"))
    plain = load_recipe(written(tmp_path, f"device: cpu\narms: {arms}"))
    loud = load_recipe(written(tmp_path, OmegaConf.to_yaml(said)))
    one, other = resolve(plain, "other"), resolve(loud, "other", [f"{key}=null"])
    assert OmegaConf.select(one, key) == OmegaConf.select(other, key)
    assert OmegaConf.select(other, key) is None or key in ("name", "output")


# errors


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("verl.model.lora.rank=8", r"verl.model.lora has no effect: it is Megatron's; set verl.model.lora_rank"),
        ("verl.model.custom_chat_template=x", r"has no effect: data are encoded by the tokenizer's own chat template"),
        ("verl.model.trust_remote_code=true", r"has no effect: code that comes with a model is never run"),
        ("verl.engine.entropy_checkpointing=true", r"is for arms with trainer: grpo, and this one has trainer: sft"),
        ("verl.engine._target_=x", r"unknown key verl.engine._target_"),
        ("modle=x", r"command line: unknown key modle; did you mean model\?"),
        ("data.max_len=3", r"unknown key data.max_len; did you mean data.max_length\?"),
        ("verl.optim.lrs=3", r"unknown key verl.optim.lrs; did you mean verl.optim.lr\?"),
        ("verl.engine.qat.enabel=true", r"unknown key verl.engine.qat.enabel; did you mean verl.engine.qat.enable\?"),
        ("verl.trainer.project_name=x", r"unknown key verl.trainer.project_name; allowed here: total_epochs, "),
        ("zzz=3", r"unknown key zzz; allowed here: name, model, device"),
        ("verl.rollout.n=3", r"unknown key verl.rollout"),
        ("evaluate.drifts.rows=3", r"unknown key evaluate.drifts; did you mean evaluate.drift\?"),
        ("seed=abc", r"seed='abc' must be an integer, such as 0"),
        ("seed=1.5", r"seed=1.5 must be an integer"),
        ("seed=true", r"seed=True must be an integer"),
        ("verl.optim.lr=fast", r"verl.optim.lr='fast' must be a number"),
        ("verl.optim.betas=0.9", r"verl.optim.betas=0.9 must be a list"),
        ("verl.data.use_dynamic_bsz=1", r"verl.data.use_dynamic_bsz=1 must be true or false"),
        ("trainer=[sft]", r"trainer=\['sft'\] must be text"),
        ("data=x", r"data='x' must be a mapping with keys train, heldout"),
        ("verl.optim=x", r"verl.optim='x' must be a mapping with keys"),
        ("objective=eaft", r"objective='eaft' must be a mapping"),
        ("verl.model.override_config=x", r"verl.model.override_config='x' must be a mapping"),
        ("device=tpu", r"command line: device='tpu' is not one of auto, cpu, cuda"),
        ("device=null", r"device=None is not one of"),
        ("verl.optim.lr", r"override 'verl.optim.lr' must be key=value"),
        ("=3", r"override '=3' must be key=value"),
        ("model=${oops}", r"reference cannot be resolved: Interpolation key 'oops' not found"),
    ],
)
def test_a_bad_override(recipe: Any, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(recipe, "sft", [override])


@pytest.mark.parametrize(("key", "instead"), OURS_INSTEAD.items())
def test_verls_keys_that_are_ours_point_to_ours(recipe: Any, key: str, instead: str) -> None:
    overrides = ["trainer=grpo", "compare.match=none"] if key in GRPO_INSTEAD else []
    arm = "plain" if overrides else "sft"
    with pytest.raises(ConfigError, match=rf"{key} is set through `{instead}`"):
        resolve(recipe, arm, [*overrides, f"{key}=1"])
    for ours in instead.split("` and `"):
        where = ours if "." in ours or "clip" not in ours else f"verl.actor_rollout_ref.actor.{ours}"
        where = where.removesuffix(".param_dtype")  # of an open mapping
        assert OmegaConf.select(resolve(recipe, arm, overrides), where, default="absent") != "absent"


def test_an_unknown_key_names_the_layer_it_stands_in(tmp_path: Path) -> None:
    path = written(tmp_path, "arms: {sft: {verl: {optim: {lrr: 1}}}}")
    with pytest.raises(ConfigError, match=r"other.yaml: arms.sft: unknown key verl.optim.lrr; did you mean"):
        resolve(load_recipe(path), "sft")
    with pytest.raises(ConfigError, match=r"other.yaml: unknown key sede; did you mean seed\?"):
        resolve(load_recipe(written(tmp_path, "sede: 1\narms: {sft: }")), "sft")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\narms: {}", "is not valid YAML"),
        ("a: 1\n\tb: 2", "is not valid YAML"),
        ("a: \0", "is not valid YAML"),
        ("", "needs `arms:` with at least one arm"),
        ("- a", "needs `arms:`"),
        ("model: x", "needs `arms:`"),
        ("arms: {}", "needs `arms:`"),
        ("arms: [sft]", "needs `arms:`"),
        ("arms: {base: }", "an arm cannot be called 'base'"),
        ("arms: {a/b: }", "name 'a/b' must be letters"),
        ("arms: {-a: }", "name '-a' must be letters"),
        ("name: a b\narms: {sft: }", "name 'a b' must be letters"),
        (f"arms: {{{'x' * 129}: }}", "at most 128 characters"),
    ],
)
def test_a_bad_recipe(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(written(tmp_path, text))


def test_a_missing_recipe_names_those_that_exist(tmp_path: Path, recipe: Any) -> None:
    with pytest.raises(ConfigError, match=r"nothing.yaml does not exist; there are .*demo.yaml"):
        load_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match=r"no/where.yaml does not exist; by name there are .*quickstart"):
        load_recipe(tmp_path / "no" / "where.yaml")


def test_an_unknown_arm_names_those_that_exist(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=r"demo.yaml has no arm 'eaft'; its arms are sft, fast, plain"):
        resolve(recipe, "eaft")


@pytest.mark.parametrize(
    "text",
    [
        "arms: {sft: foo}",  # AttributeError
        "arms: {sft: [1]}",  # AttributeError
        "name: 2024\narms: {sft: }",  # TypeError: Path / int
    ],
)
def test_a_recipe_of_the_wrong_shape(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        resolve(load_recipe(written(tmp_path, text)), "sft")


@pytest.mark.parametrize(
    "override",
    [
        "data.rows=[1,",  # yaml.parser.ParserError
        "output=5",  # TypeError
        "name=5",  # TypeError
        "name=../x",  # accepted: the output leaves runs/
    ],
)
def test_an_override_of_the_wrong_shape(recipe: Any, override: str) -> None:
    with pytest.raises(ConfigError):
        resolve(recipe, "sft", [override])


def test_lora_target_modules_may_be_a_list(recipe: Any) -> None:
    config = resolve(recipe, "sft", ["verl.model.lora_rank=4", "verl.model.target_modules=[q_proj,v_proj]"])
    assert config.verl.model.target_modules == ["q_proj", "v_proj"]


def test_a_number_may_refer_to_another_key(tmp_path: Path) -> None:
    text = "data: {max_length: 64}\nverl: {data: {max_token_len_per_gpu: '${data.max_length}'}}\narms: {sft: }"
    assert resolve(load_recipe(written(tmp_path, text)), "sft").verl.data.max_token_len_per_gpu == 64
