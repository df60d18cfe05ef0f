"""`eaft analyze` as users call it: the store against transformers in float64, what is reused, what is refused."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import warm
from safetensors.torch import load_file, save_file

from eaft_verl.analysis.store import TokenStore
from eaft_verl.data.parquet import read_examples
from eaft_verl.experiment.analyze import configured
from eaft_verl.recipe.resolve import load_recipe

K = 20
EXACT = ("verl.engine.mixed_precision.param_dtype=fp32", "verl.engine.mixed_precision.reduce_dtype=fp32")
RECIPE = """
model: {model}
output: {folder}/out
compare: {{match: none}}
device: cpu
data: {{train: {folder}/train.jsonl, heldout: {folder}/heldout.jsonl, max_length: 128}}
verl:
  engine: {{mixed_precision: {{param_dtype: fp32, reduce_dtype: fp32}}}}
  data: {{train_batch_size: 4, max_token_len_per_gpu: 128}}
  trainer: {{total_training_steps: 2}}
arms:
  grpo: {{trainer: grpo}}
  masked: {{objective: {{name: masked}}}}
  flow: {{objective: {{name: flow}}}}
"""


def eaft(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        code = warm.eaft(words, cwd, out, err, timeout=1500)
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """What a command that was refused says: one line, and rows at fault below it, after how many rows are used."""
    first, *rows = [line for line in done.stderr.splitlines() if not line.startswith("data.train: ")]
    assert done.returncode == 2 and first.startswith("eaft: error: "), done.stderr
    assert all(row.startswith("  row ") for row in rows), done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("analyze")
    tiny.write_sums(folder / "train.jsonl", 10, seed=1)
    tiny.write_sums(folder / "heldout.jsonl", 4, seed=2)
    (folder / "r.yaml").write_text(RECIPE.format(model=tiny_model_path, folder=folder))
    return folder


@pytest.fixture(scope="module")
def analyzed(place: Path, tiny_model_path: Path) -> subprocess.CompletedProcess[str]:
    words = ("--own", "5", "--new-tokens", "12", "--show", "2", "--fidelity", "1000", "--out", place / "alone")
    return eaft("analyze", tiny_model_path, place / "train.jsonl", *words, *EXACT, "data.max_length=128", cwd=place)


def assert_is_the_models(store: TokenStore, examples: Sequence[object], model_path: Path) -> None:
    """Every row of the store by transformers and a float64 softmax, none of our statistics' code."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    rows = [row for batch in store.batches() for row in batch.to_pylist()]
    trained = [(s, t) for s, one in enumerate(examples) for t in range(1, len(one.input_ids)) if one.loss_mask[t]]
    assert [(row["sample"], row["position"]) for row in rows] == trained
    for sample, example in enumerate(examples):
        with torch.no_grad():
            p_TV = model(torch.tensor([list(example.input_ids)])).logits[0].double().softmax(-1)
        for row in (row for row in rows if row["sample"] == sample):
            p_V = p_TV[row["position"] - 1]
            best_K = p_V.sort(descending=True).values[:K]
            q_K = best_K / best_K.sum()
            truth = {
                "logprob": p_V[example.input_ids[row["position"]]].log(),
                "entropy": -(q_K * q_K.log()).sum(),
                "full_entropy": -(p_V * p_V.log()).sum(),
                "max_prob": p_V.max(),
                "sum_p2": (p_V**2).sum(),
                "top_k_mass": best_K.sum(),
            }
            for name, value in truth.items():
                assert row[name] == pytest.approx(float(value), rel=1e-5, abs=1e-5), name
            assert row["argmax"] == int(p_V.argmax())


def test_the_store_is_what_transformers_says_in_float64(
    analyzed: subprocess.CompletedProcess[str], place: Path, tiny_model_path: Path
) -> None:
    assert analyzed.returncode == 0, analyzed.stderr
    store = TokenStore(place / "alone" / "data" / "token_stats_k20")
    assert_is_the_models(store, read_examples(place / "alone" / "data" / "train.parquet"), tiny_model_path)
    assert (store.meta["origin"], store.meta["k"], store.meta["vocab"], store.meta["samples"]) == ("data", 20, 384, 10)
    assert set(store.column("role").to_pylist()) == {"assistant", "template"}


def test_fidelity_at_the_stores_own_k_is_what_the_store_says(
    analyzed: subprocess.CompletedProcess[str], place: Path
) -> None:
    """Another pass, by transformers alone, over the same tokens."""
    found = json.loads((place / "alone" / "analysis.json").read_text())
    stored, rows = found["data"]["agreement"], {row["k"]: row for row in found["fidelity"]["rows"]}
    assert sorted(rows) == [5, 10, 20, 50, 100, 200] and rows[stored["k"]]["tokens"] == stored["tokens"]
    for name in ("pearson", "max_error", "mean_error", "mass"):
        assert rows[stored["k"]][name] == pytest.approx(stored[name], abs=2e-5)
    assert all(row["microseconds"] > 0 and row["bytes"] > 0 for row in rows.values())
    assert (place / "alone" / "figures" / "fidelity.png").is_file()


def test_own_answers_are_the_models_and_say_how_they_were_drawn(
    analyzed: subprocess.CompletedProcess[str], place: Path, tiny_model_path: Path
) -> None:
    (folder,) = (place / "alone").glob("own-*")
    store = TokenStore(folder / "tokens")
    answers = read_examples(folder / "answers" / "000000-000005" / "answers.parquet")
    given = read_examples(place / "alone" / "data" / "train.parquet")
    assert_is_the_models(store, answers, tiny_model_path)
    said = {"prompts": 5, "temperature": 1.0, "top_p": 1.0, "new_tokens": 12, "seed": 0}
    assert store.meta["origin"] == "own" and store.meta["sampling"] == said
    for mine, theirs in zip(answers, given, strict=False):
        prompt = mine.loss_mask.index(1)
        assert list(mine.input_ids[:prompt]) == list(theirs.input_ids[: theirs.loss_mask.index(1)])
        assert 1 <= sum(mine.loss_mask) <= 12


def test_samples_are_shown_token_by_token(analyzed: subprocess.CompletedProcess[str], place: Path) -> None:
    lines = analyzed.stdout.splitlines()
    store = TokenStore(place / "alone" / "data" / "token_stats_k20")
    heading = lines.index(next(line for line in lines if line.startswith("--- data 1/10")))
    first = store.sample(0).to_pylist()
    shown = [line.split() for line in lines[heading:] if line.startswith(("assistant ", "template "))]
    numbers = [words[1:4] for words in shown if "trained)" not in words[-1]][: len(first)]
    expected = [
        [f"{value:.3f}" for value in (torch.tensor(row["logprob"]).exp().item(), row["entropy"])] for row in first
    ]
    assert [words[:2] for words in numbers] == expected
    weights = [row["entropy"] / torch.tensor(20.0).log().item() for row in first]
    assert [float(words[2]) for words in numbers] == pytest.approx(weights, abs=6e-4)
    assert sum(line.startswith("--- own") for line in lines) == 2


def test_a_second_analysis_repeats_nothing_and_other_settings_are_another_panel(
    analyzed: subprocess.CompletedProcess[str], place: Path, tiny_model_path: Path
) -> None:
    before = {file: file.stat().st_mtime_ns for file in (place / "alone").rglob("*.parquet")}
    words = ("--out", place / "alone", "--own", "5", "--new-tokens", "12", *EXACT, "data.max_length=128")
    again = eaft("analyze", tiny_model_path, place / "train.jsonl", *words, cwd=place)
    assert again.returncode == 0 and "step" not in again.stderr
    assert {file: file.stat().st_mtime_ns for file in (place / "alone").rglob("*.parquet")} == before


@pytest.mark.slow
def test_training_takes_thresholds_and_weights_from_the_analysis_and_leaves_it_as_it_was(
    place: Path, tiny_model_path: Path
) -> None:
    done = eaft("analyze", place / "r.yaml", cwd=place)
    assert done.returncode == 0, done.stderr
    file = place / "out" / "data" / "token_stats_k20" / "tokens.parquet"
    before, store = file.read_bytes(), TokenStore(file.parent)
    for arm in ("masked", "flow"):
        trained = eaft("train", place / "r.yaml", "--arm", arm, cwd=place)
        assert trained.returncode == 0, trained.stderr
    assert file.read_bytes() == before
    info = json.loads((place / "out" / "masked-seed0" / "run.json").read_text())
    entropy = torch.tensor(store.column("entropy").to_numpy()).double() / torch.tensor(20.0).double().log()
    assert info["calibrated"]["threshold"] == pytest.approx(float(entropy.quantile(0.15)), rel=1e-5)
    assert info["base_pass"]["seconds"] == store.meta["seconds"]


@pytest.mark.slow
def test_two_workers_say_what_one_process_says(
    analyzed: subprocess.CompletedProcess[str], place: Path, tiny_model_path: Path
) -> None:
    words = ("data.max_length=128", "device=cpu", "verl.trainer.n_gpus_per_node=2", "verl.data.train_batch_size=4")
    done = eaft("analyze", tiny_model_path, place / "train.jsonl", "--out", place / "two", *EXACT, *words, cwd=place)
    assert done.returncode == 0, done.stderr
    one, two = (TokenStore(place / name / "data" / "token_stats_k20") for name in ("alone", "two"))
    for name in ("sample", "position", "token", "argmax", "role"):
        assert one.column(name).to_pylist() == two.column(name).to_pylist(), name
    for name in ("logprob", "entropy", "full_entropy", "max_prob", "sum_p2", "top_k_mass"):
        found, expected = (torch.tensor(store.column(name).to_numpy()) for store in (two, one))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rollouts_are_the_tokens_that_the_run_wrote(place: Path, tiny_model_path: Path) -> None:
    from transformers import AutoTokenizer

    from eaft_verl.data.prepare import template_hash
    from eaft_verl.errors import DataError
    from eaft_verl.experiment.answers import rollouts_of

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    run, config = place / "grpo-seed0", configured(str(place / "r.yaml"), [], None)
    run.mkdir(exist_ok=True)
    template = template_hash(tokenizer)
    (run / "run.json").write_text(json.dumps({"keys": {"template": template}}))
    with pytest.raises(DataError, match=r"holds no rollouts\.jsonl"):
        rollouts_of(config, run, tokenizer, template, 384)
    prompt = [{"role": "user", "content": "What is 1 + 2?"}]
    row = {"step": 4, "prompt": prompt, "response": "3", "tokens": [20, 21, tokenizer.eos_token_id]}
    (run / "rollouts.jsonl").write_text(json.dumps(row) + "\n")
    (example,) = rollouts_of(config, run, tokenizer, template, 384)
    text = "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert example.input_ids == [*tokenizer(text)["input_ids"], 20, 21, tokenizer.eos_token_id]
    assert sum(example.loss_mask) == 3 and example.loss_mask[-3:] == [1, 1, 1] and example.id == "step4-0"
    with pytest.raises(DataError, match="another tokenizer or chat template"):
        rollouts_of(config, run, tokenizer, "other", 384)
    with pytest.raises(DataError, match=r"rollouts\.jsonl:1 holds token 21 of 2$"):
        rollouts_of(config, run, tokenizer, template, 2)


# refused


def test_what_is_not_a_recipe_or_a_model_and_data(place: Path, tiny_model_path: Path) -> None:
    assert "RECIPE, or MODEL and DATA" in refused(eaft("analyze", tiny_model_path, cwd=place))
    assert "names its data" in refused(eaft("analyze", place / "r.yaml", "other.jsonl", cwd=place))


def test_k_over_the_vocabulary(place: Path) -> None:
    line = refused(eaft("analyze", place / "r.yaml", "objective.k=385", "--out", place / "k", cwd=place))
    assert "objective.k=385: the vocabulary of" in line and "has 384 tokens" in line and not (place / "k").exists()


def test_a_model_that_lacks_a_weight(place: Path, tiny_model_path: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_path, tmp_path / "m")
    weights = load_file(tmp_path / "m/model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    line = refused(eaft("analyze", tmp_path / "m", place / "train.jsonl", "--out", tmp_path / "o", cwd=place))
    assert "model.layers.1.mlp.up_proj.weight" in line and not (tmp_path / "o").exists()


def test_empty_data_and_data_where_nothing_is_trained(place: Path, tiny_model_path: Path) -> None:
    (place / "empty.jsonl").write_text("")
    assert "holds no rows" in refused(eaft("analyze", tiny_model_path, "empty.jsonl", "--out", "e", cwd=place))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "train": False}]
    (place / "masked.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    assert "masked" in refused(eaft("analyze", tiny_model_path, "masked.jsonl", "--out", "m", cwd=place))


def test_data_that_was_prepared_with_another_template(
    analyzed: subprocess.CompletedProcess[str], place: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    other = tiny.tiny_model(tmp_path / "other", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = tiny.CHATML.replace("assistant\n", "assistant: ")
    tokenizer.save_pretrained(other)
    prepared = place / "alone" / "data" / "train.parquet"
    line = refused(eaft("analyze", other, prepared, "data.max_length=128", "--out", tmp_path / "x", cwd=place))
    assert "stale" in line and "another chat template" in line


def test_a_folder_with_something_else_and_one_of_another_schema(place: Path, tiny_model_path: Path) -> None:
    (place / "thesis").mkdir()
    (place / "thesis" / "thesis.tex").write_text("years of work")
    words = ("analyze", tiny_model_path, place / "train.jsonl", "--out", place / "thesis")
    assert "something else" in refused(eaft(*words, cwd=place))
    assert [file.name for file in (place / "thesis").iterdir()] == ["thesis.tex"]
    (place / "thesis" / ".analysis.json").write_text('{"schema": 0}')
    assert "schema 0" in refused(eaft(*words, cwd=place))


def test_a_store_that_is_half_written_or_of_another_schema_is_named_and_kept(
    place: Path, tiny_model_path: Path
) -> None:
    file = place / "half" / "data" / "token_stats_k20" / "tokens.parquet"
    words = ("analyze", tiny_model_path, place / "train.jsonl", "--out", place / "half", "data.max_length=128")
    file.parent.mkdir(parents=True)
    (place / "half" / ".analysis.json").write_text('{"schema": 1}')
    file.write_bytes(b"PAR1 and then the disk was full")
    assert str(file) in refused(eaft(*words, cwd=place))
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata({"eaft_verl": '{"schema": 9}'}), file)
    assert "has schema 9" in refused(eaft(*words, cwd=place))


def test_the_first_sft_arm_of_a_recipe_runs_the_pass(place: Path) -> None:
    assert next(iter(load_recipe(place / "r.yaml").arms)) == "grpo"
    assert configured(str(place / "r.yaml"), ["objective.k=7"], None).objective.k == 7
    assert configured(str(place / "r.yaml"), [], None).arm == "masked"
