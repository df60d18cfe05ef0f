"""Finished is not the same as finished with these settings: every kind of change is named before anything starts."""

from pathlib import Path
from typing import Any

import pytest
from config_fixtures import composed_once  # noqa: F401
from omegaconf import OmegaConf

from eaft_verl.cli import main
from eaft_verl.data.prepare import SCHEMA
from eaft_verl.data.sources import source_hash
from eaft_verl.data.synthesis import generate
from eaft_verl.errors import RunError
from eaft_verl.evaluation.settings import evaluation_key
from eaft_verl.experiment.stored import differences, require_same
from eaft_verl.files import write_json, write_jsonl
from eaft_verl.models import model_key
from eaft_verl.recipe.resolve import load_recipe, resolve
from eaft_verl.recipe.views import evaluate_settings
from eaft_verl.runs import Run

RECIPE = """
model: {model}
output: {output}
device: cpu
data: {{train: {train}, max_length: 64}}
evaluate: {{target: [{{task: exact, data: {questions}}}], general: [products]}}
compare: {{to: sft}}
verl: {{data: {{train_batch_size: 4, max_token_len_per_gpu: 64}}}}
arms:
  sft: {{objective: {{name: sft}}}}
  eaft: {{objective: {{name: eaft}}}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(100))
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "1+1?", "response": "2"}] * 8)
    names = {name: tmp_path / name for name in ("model",)} | {"output": tmp_path / "out"}
    names |= {"train": tmp_path / "train.jsonl", "questions": tmp_path / "questions.jsonl"}
    write_jsonl(tmp_path / "questions.jsonl", [{"question": "1+1?", "answer": "2"}])
    text = RECIPE.format(**names).replace("{task: exact, data: " + str(names["questions"]) + "}", "sums")
    (tmp_path / "r.yaml").write_text(text)
    return tmp_path / "r.yaml"


def finished(recipe: Path, arm: str, *overrides: str, **info: Any) -> Run:
    """A run as training leaves it, with its data prepared from the recipe's source."""
    config = resolve(load_recipe(recipe), "sft" if arm == "base" else arm, overrides)
    keys = {"model": model_key(config.model), "data": "d", "evaluation": evaluation_key(evaluate_settings(config))}
    about = {"kind": "base" if arm == "base" else "arm", "status": "finished", "evaluated": True, "keys": keys}
    folder = Path(config.output) / ("base" if arm == "base" else f"{arm}-seed0")
    prepared = Path(config.output) / "data" / "train.manifest.json"
    write_json(prepared, {"schema": SCHEMA, "source_sha256": source_hash(config.data.train)})
    return Run.create(folder, info={**about, **info}, config=OmegaConf.to_yaml(config), env={})


def asked(recipe: Path, arm: str, *overrides: str) -> Any:
    return resolve(load_recipe(recipe), arm, overrides)


def test_the_same_settings_are_the_same(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, base = finished(recipe, "sft"), finished(recipe, "base")
    assert differences(run, asked(recipe, "sft")) == differences(base, asked(recipe, "sft")) == []
    monkeypatch.chdir(recipe.parent)
    assert differences(run, resolve(load_recipe("./r.yaml"), "sft")) == [], "the path of a recipe may be spelled anew"
    assert differences(run, asked(recipe, "sft", "verl.trainer.save_freq=5")) == []


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("verl.optim.lr=1e-3", "verl.optim.lr=1e-05 (now 0.001)"),
        ("data.rows=8", "data.rows=null (now 8)"),
        ("compare.match=none", 'compare.match="updates" (now "none")'),
        ("evaluate.limit=3", "evaluate.limit=null (now 3)"),
        ("objective.name=dft", 'objective.name="sft" (now "dft")'),
    ],
)
def test_a_changed_setting_is_named(recipe: Path, override: str, named: str) -> None:
    assert differences(finished(recipe, "sft"), asked(recipe, "sft", override)) == [named]


def test_the_base_rests_on_model_and_evaluation_only(recipe: Path) -> None:
    base = finished(recipe, "base")
    assert differences(base, asked(recipe, "sft", "verl.optim.lr=1e-3", "data.rows=8", "compare.match=none")) == []
    assert differences(base, asked(recipe, "sft", "evaluate.limit=3")) == ["evaluate.limit=null (now 3)"]


def test_what_lies_behind_the_settings_is_looked_at(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, base, config = finished(recipe, "sft"), finished(recipe, "base"), asked(recipe, "sft")
    train = recipe.parent / "train.jsonl"
    before = train.read_text()
    train.write_text(before.replace("1+1", "1+2"))
    assert differences(run, config) == [f"data.train: {train} holds other rows"]
    assert differences(base, config) == []
    train.write_text(before)
    (recipe.parent / "model" / "model.safetensors").write_bytes(bytes(99) + b"x")
    said = [f"model: the files of {recipe.parent / 'model'} have changed"]
    assert differences(run, config) == differences(base, config) == said


def test_a_generated_data_set_is_what_its_code_makes_now(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(recipe, "sft", "data.train=generate:sums_train")
    config = asked(recipe, "sft", "data.train=generate:sums_train")
    assert differences(run, config) == []
    monkeypatch.setattr("eaft_verl.data.synthesis.generate", lambda name: generate(name)[1:])
    assert differences(run, config) == ["data.train: generate:sums_train holds other rows"]


def test_what_a_run_derived_is_not_what_was_asked(recipe: Path) -> None:
    derived = {"asked": {"verl.trainer.total_training_steps": None, "budget": {"of": "sft"}}}
    run = finished(recipe, "eaft", "compare.match=tokens", derived=derived)
    stored = run.config
    assert stored["budget"] == {"of": "sft"}
    stored["verl"]["trainer"]["total_training_steps"] = 16
    stored["budget"] = {"of": "sft", "unit": "tokens", "amount": 16}
    (run.path / "config.yaml").write_text(OmegaConf.to_yaml(stored))
    assert differences(run, asked(recipe, "eaft", "compare.match=tokens")) == []
    found = differences(run, asked(recipe, "eaft", "compare.match=samples"))
    assert found == ['compare.match="tokens" (now "samples")']


def test_compare_refuses_before_it_starts_and_says_the_ways_out(recipe: Path, capsys: Any) -> None:
    finished(recipe, "base")
    finished(recipe, "sft")
    text = recipe.read_text().replace("  eaft:", "  other:")
    recipe.write_text(text)
    for dry in ([], ["--dry-run"]):
        assert main(["compare", str(recipe), "--arms", "sft", "verl.optim.lr=1e-3", "data.rows=8", *dry]) == 2
        said = capsys.readouterr()
        assert "sft-seed0 (status finished) was made with other settings: data.rows=null (now 8);" in said.err
        assert "verl.optim.lr=1e-05 (now 0.001). Ask for those again, choose another output=, or remove" in said.err
        assert "done already" not in said.out


# what an unfinished run may be gone on with


def opened(recipe: Path, run: Run, *overrides: str) -> Run:
    from eaft_verl.experiment.train import _open

    return _open(asked(recipe, "sft", *overrides), [], run.info["keys"], {})


@pytest.mark.parametrize(
    "overrides",
    [
        ["verl.trainer.save_freq=5", "verl.trainer.test_freq=3", "verl.trainer.max_ckpt_to_keep=4"],
        ["save_minutes=1", "resume=strict"],
        ["verl.engine.wrap_policy.disable=false"],
        ["verl.trainer.n_gpus_per_node=2", "verl.trainer.nnodes=2"],
    ],
)
def test_what_decides_nothing_may_be_asked_for_otherwise(recipe: Path, overrides: list[str]) -> None:
    run = finished(recipe, "sft", status="failed")
    before = run.config
    assert opened(recipe, run, *overrides).path == run.path
    assert run.config == before and "changes" not in run.info
    require_same(run.path, asked(recipe, "sft", *overrides))


def test_the_number_of_devices_decides_where_their_seconds_are_the_budget(recipe: Path) -> None:
    chosen = ["compare.match=device_seconds", "verl.optim.lr_scheduler_type=constant"]
    run = finished(recipe, "sft", *chosen, status="failed")
    with pytest.raises(RunError, match=r"verl.trainer.n_gpus_per_node=1 \(now 2\)"):
        opened(recipe, run, *chosen, "verl.trainer.n_gpus_per_node=2")


def test_another_rate_needs_a_word_and_is_noted(recipe: Path) -> None:
    run = finished(recipe, "sft", status="failed", attempt=1)
    lower = "verl.optim.lr=1e-6"
    with pytest.raises(
        RunError, match=r"verl.optim.lr=1e-05 \(now 1e-06\); .*or add resume=changed to go on"
    ) as refused:
        opened(recipe, run, lower)
    for other in (["data.rows=8"], [lower, "data.rows=8"], ["verl.data.train_batch_size=8"]):
        with pytest.raises(RunError, match="another configuration") as told:
            opened(recipe, run, "resume=changed", *other)
        assert "add resume=changed" not in str(told.value)
    assert "changes" not in run.info and run.config["verl"]["optim"]["lr"] == 1e-5 and "resume" in str(refused.value)
    again = opened(recipe, run, lower, "resume=changed")
    require_same(run.path, asked(recipe, "sft", lower, "resume=changed"))
    assert again.info["changes"] == [{"attempt": 2, "settings": ["verl.optim.lr=1e-05 (now 1e-06)"]}]
    assert again.config["verl"]["optim"]["lr"] == 1e-6
    assert opened(recipe, run, lower).info["changes"] == again.info["changes"], "from then on it is the run's rate"


def test_a_finished_run_is_not_changed(recipe: Path) -> None:
    run = finished(recipe, "sft")
    with pytest.raises(RunError, match="holds a finished run"):
        opened(recipe, run, "resume=changed", "verl.optim.lr=1e-6")
    with pytest.raises(RunError, match="made with other settings: verl.optim.lr"):
        require_same(run.path, asked(recipe, "sft", "resume=changed", "verl.optim.lr=1e-6"))


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"status": "fai'])
def test_a_lost_run_json_is_written_anew_and_the_configuration_still_compared(
    recipe: Path, capsys: Any, text: str | None
) -> None:
    run = finished(recipe, "sft", status="failed")
    keys = run.info["keys"]
    for name in ("run.json", ".run.json"):
        (run.path / name).unlink()
        if text is not None:
            (run.path / name).write_text(text)
    from eaft_verl.experiment.train import _open

    again = _open(asked(recipe, "sft"), [], keys, {})
    assert "is damaged or missing and is written anew" in capsys.readouterr().err
    assert again.info["rebuilt"] and again.info["keys"] == keys and again.info["arm"] == "sft"
    with pytest.raises(RunError, match="verl.optim.lr"):
        _open(asked(recipe, "sft", "verl.optim.lr=1e-3"), [], keys, {})
