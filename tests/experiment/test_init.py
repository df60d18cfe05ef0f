"""`eaft init`: what is said of a data file, and a recipe that is sound and fits it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import yaml
from config_fixtures import composed_once  # noqa: F401

from eaft_verl.cli import main
from eaft_verl.experiment.init import LORA_RATE, lay, length_limit, settings_for
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.resolve import load_recipe, resolve


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_recipe_for_a_file_is_sound_and_nothing_is_overwritten(
    tmp_path: Path, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.sums(60, seed=3)
    twice = {**rows[7], "response": "Let me see.\n" + rows[7]["response"]}
    broken = {"prompt": "What?", "response": "", "note": "x"}
    data = tmp_path / "chats.v1.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, twice, broken]))
    words = ["init", str(data), "--model", str(tiny_model_path)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "columns prompt and response in .v1.jsonl; columns prompt, response" in said
    assert "rows: 61 of 62 rows are used; 1 are not:" in said
    assert "assistant turns: 1; system prompts in 0 of 61, tools in 0 of 61, reasoning in 0 of 61" in said
    assert "answers that can be checked (a number): 61 of 61 tried" in said
    unused = "(1 of them at fault or copies, which are left out)"
    assert f"56 rows to train on {unused}, 6 held out" in said and "fits this machine" in said

    train, heldout = rows_of(tmp_path / "chats.train.jsonl"), rows_of(tmp_path / "chats.heldout.jsonl")
    assert len(train) == 56 and len(heldout) == 6 and broken in train
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in heldout}
    assert sorted(map(str, train + heldout)) == sorted(map(str, [*rows, twice, broken]))

    recipe = load_recipe(tmp_path / "chats.yaml")
    assert list(recipe.arms) == ["sft", "eaft"]
    config = resolve(recipe, "eaft")
    check(config)
    assert config.data.over_long == "drop" and config.evaluate.drift.data == "generate:neutral_prompts"
    assert config.verl.optim.lr == 4e-5 and config.verl.data.train_batch_size == 4
    assert main(["compare", "chats.yaml", "--dry-run"]) == 0
    assert "warning" not in capsys.readouterr().err

    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(words) == 2 and "is never overwritten" in capsys.readouterr().err
    (tmp_path / "chats.yaml").unlink()
    assert main(words) == 2 and "chats.train.jsonl exists" in capsys.readouterr().err
    assert before.pop(tmp_path / "chats.yaml") and before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_rows_are_written_as_they_are(
    tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever they hold: what is a secret of the environment elsewhere, half a character, a number that is none."""
    monkeypatch.setenv("MY_API_KEY", "changeme")
    rows: list[dict[str, Any]] = [{**row, "id": n} for n, row in enumerate(tiny.sums(30, seed=3))]
    rows[3]["prompt"] += " changeme"
    rows[4]["response"] += "\ud83d"
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["init", "odd.jsonl", "--model", str(tiny_model_path)]) == 0
    written = rows_of(tmp_path / "odd.train.jsonl") + rows_of(tmp_path / "odd.heldout.jsonl")
    assert sorted(written, key=lambda row: row["id"]) == rows
    before = sorted(tmp_path.iterdir())
    for out, why in (("odd.jsonl/x.yaml", "odd.jsonl"), ("mine é.yaml", "must be letters, digits")):
        assert main(["init", "odd.jsonl", "--model", str(tiny_model_path), "--out", out]) == 2
        said = capsys.readouterr().err
        assert why in said and said.count("\n") == 1 and sorted(tmp_path.iterdir()) == before


def test_the_arm_that_is_commented_out_is_sound_too(tmp_path: Path, tiny_model_path: Path) -> None:
    data = tiny.write_sums(tmp_path / "sums.jsonl", 40, seed=3)
    assert main(["init", str(data), "--model", str(tiny_model_path), "--out", "all.yaml"]) == 0
    written = tmp_path / "all.yaml"
    written.write_text(written.read_text().replace("  # grpo:", "  grpo:"))
    check(resolve(load_recipe(written), "grpo"))


def test_prepared_data_is_as_good_as_the_rows_it_was_made_of(tmp_path: Path, tiny_model_path: Path) -> None:
    model = ["--model", str(tiny_model_path)]
    data = tiny.write_sums(tmp_path / "raw.jsonl", 40, seed=4)
    assert main(["prepare", str(data), "ready.parquet", *model]) == 0
    assert main(["init", str(data), *model, "--out", "a.yaml"]) == 0
    assert main(["init", "ready.parquet", *model, "--out", "b.yaml"]) == 0
    a, b = (yaml.safe_load((tmp_path / name).read_text()) for name in ("a.yaml", "b.yaml"))
    assert a["data"]["max_length"] == b["data"]["max_length"]
    held = [rows_of(tmp_path / name) for name in ("a.heldout.jsonl", "b.heldout.jsonl")]
    assert [row["prompt"] for row in held[0]] == [row["messages"][0]["content"] for row in held[1]]
    assert not {"input_ids", "loss_mask"} & held[1][0].keys()
    check(resolve(load_recipe(tmp_path / "b.yaml"), "sft"))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a", "response": "b"}] * 3, "10 are the least"),
        ([{"prompt": "a", "response": f"{n}"} for n in range(12)], "so few different questions"),
        ([{"text": "a"}] * 12, "none of 12 rows is left"),
        ([], "holds no rows"),
    ],
)
def test_what_no_recipe_can_be_written_for(
    tmp_path: Path, tiny_model_path: Path, capsys: pytest.CaptureFixture[str], rows: list[Any], said: str
) -> None:
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["init", "few.jsonl", "--model", str(tiny_model_path)]) == 2
    assert said in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["few.jsonl"]


def test_named_columns_and_many_faulty_rows_are_in_the_recipe(tmp_path: Path, tiny_model_path: Path) -> None:
    rows = [{"Q": row["prompt"], "A": row["response"]} for row in tiny.sums(40, seed=5)]
    rows[::4] = [{"Q": "", "A": ""}] * 10
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = ["--column", "prompt=Q", "--column", "response=A"]
    assert main(["init", "odd.jsonl", "--model", str(tiny_model_path), *named]) == 0
    data = yaml.safe_load((tmp_path / "odd.yaml").read_text())["data"]
    assert data["columns"] == {"prompt": "Q", "response": "A"}
    held = len(rows_of(tmp_path / "odd.heldout.jsonl"))
    assert held == 3 and 10 / (40 - held) <= data["max_rejected"] <= 10 / (40 - held) + 0.02


@pytest.mark.parametrize(
    ("lengths", "positions", "limit", "kept"),
    [
        ([100] * 198 + [120] * 2, None, 128, 200),  # the longest is little more
        ([100] * 198 + [1000] * 2, None, 112, 198),  # it is much more: 99 % are kept
        ([1000] * 198 + [4000] * 2, None, 1024, 198),
        ([100] * 200, 64, 64, 0),  # the model knows no more positions
    ],
)
def test_the_length_limit(lengths: list[int], positions: int | None, limit: int, kept: int) -> None:
    lengths_E = np.array(lengths)
    quantiles = [int(np.quantile(lengths_E, share, method="lower")) for share in (0.5, 0.9, 0.99, 1.0)]
    found: Any = SimpleNamespace(lengths_E=lengths_E, quantiles=quantiles)
    assert length_limit(found, positions) == (limit, kept)


@pytest.mark.parametrize(
    ("trained", "weights", "batch", "rate", "epochs"),
    [
        (40, 1e8, 4, 4e-5, 3),
        (600, 1.35e8, 16, 4e-5, 3),
        (19_000, 4e9, 64, 1e-5, 1),  # the paper's batch and rate
        (2_000, 1.5e9, 32, 2e-5, 3),
    ],
)
def test_rates_and_batches(trained: int, weights: float, batch: int, rate: float, epochs: int) -> None:
    split: Any = SimpleNamespace(usable=trained)
    verl = settings_for(split, 512, int(weights))["verl"]
    assert verl["data"]["train_batch_size"] == batch and verl["optim"]["lr"] == rate
    assert verl["trainer"]["total_epochs"] == epochs


def test_an_adapter_gets_a_rate_of_its_own() -> None:
    verl: dict[str, Any] = {"optim": {"lr": 1e-5}, "data": {}}
    lay(verl, ["verl.model.lora_rank=32", "verl.engine.model_dtype=bf16", "verl.data.max_token_len_per_gpu=512"])
    assert verl == {
        "optim": {"lr": LORA_RATE},
        "data": {"max_token_len_per_gpu": 512},
        "model": {"lora_rank": 32},
        "engine": {"model_dtype": "bf16"},
    }


def test_copies_of_a_row_that_is_held_out_are_not_trained(
    tmp_path: Path, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"What is {n}?", "response": f"It is {n}."} for n in range(40)]
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + rows))
    assert main(["init", "twice.jsonl", "--model", str(tiny_model_path)]) == 0
    train, heldout = rows_of(tmp_path / "twice.train.jsonl"), rows_of(tmp_path / "twice.heldout.jsonl")
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in heldout}
    assert sorted(map(str, train + heldout)) == sorted(map(str, rows + rows))
    asked = len({row["prompt"] for row in heldout})
    said = capsys.readouterr().out
    assert f"{len(train)} rows to train on ({40 - asked} of them at fault or copies, which are left out)" in said
    assert f"{asked} held out (beside {asked} copies of them, which are left out)" in said


def test_one_question_asked_over_and_over_has_nothing_to_hold_out(
    tmp_path: Path, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "same.jsonl").write_text('{"prompt": "hi", "response": "yo"}\n' * 40)
    assert main(["init", "same.jsonl", "--model", str(tiny_model_path)]) == 2
    assert "so few different questions that none can be held out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "same.jsonl"]


def test_a_row_of_millions_of_tokens_is_left_out(
    tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`eaft init` takes no data.over_long, so it may not ask for it."""
    monkeypatch.setattr("eaft_verl.data.profile.LONGEST", 1000)
    rows = [{"prompt": "Go on.", "response": "yo " * 1000}, *tiny.sums(40, seed=3)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["init", "long.jsonl", "--model", str(tiny_model_path)]) == 0
    assert "rows: 40 of 41 rows are used; 1 are not: over_long 1" in capsys.readouterr().out
    assert rows[0] in rows_of(tmp_path / "long.train.jsonl")
    assert resolve(load_recipe(tmp_path / "long.yaml"), "eaft").data.over_long == "drop"
