"""A run's checkpoints evaluated from end to end on a tiny random Llama: records, resuming, failures."""

import json
import math
import shutil
from pathlib import Path

import pytest
from tiny import CHATML, tiny_model, write_sums

from eaft_verl.errors import ConfigError, DataError, RunError
from eaft_verl.evaluation.checkpoints import EvaluateSettings, evaluate_checkpoints
from eaft_verl.evaluation.tasks import Entry
from eaft_verl.runs import Run

pytest.importorskip("reasoning_gym")
RECORD_KEYS = {
    *("benchmark", "side", "metric", "step", "metrics", "n", "task_version", "prompt_hash", "data_hash"),
    *("backend", "harness", "seconds"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {step: tiny_model(folder / f"step_{step}", hidden=32, seed=step) for step in (0, 4, 8)}


@pytest.fixture
def settings(tmp_path: Path) -> EvaluateSettings:
    return EvaluateSettings(
        target=["sums"],
        general=[{"task": "gcd", "limit": 2}],
        heldout=str(write_sums(tmp_path / "heldout.jsonl", 5, seed=2)),
        drift={"rows": 3, "new_tokens": 5},
        limit=3,
        max_length=512,
    )


def new_run(path: Path) -> Run:
    return Run.create(path, info={"kind": "arm", "arm": "sft"}, config="", env={})


def test_records_of_an_arm(models, settings, tmp_path):
    run = new_run(tmp_path / "run")
    checkpoints = {step: models[step] for step in (4, 8)}
    evaluate_checkpoints(run, checkpoints, settings, str(models[0]), tmp_path / "work", {8})
    evals = run.evals()
    assert {step: set(records) for step, records in evals.items()} == {
        4: {"heldout", "drift", "sums"},
        8: {"heldout", "drift", "sums", "gcd"},
    }
    sides = {"heldout": "target", "sums": "target", "gcd": "general", "drift": "drift"}
    for step, records in evals.items():
        for name, record in records.items():
            assert set(record) == RECORD_KEYS
            assert (record["benchmark"], record["side"], record["step"]) == (name, sides[name], step)
            samples = run.samples(step, name)
            assert record["n"] == len(samples) == {"gcd": 2}.get(name, 3)
            for metric, entry in record["metrics"].items():
                assert set(entry) == {"score", "stderr", "higher_is_better"}
                scores = [sample["scores"][metric] for sample in samples]
                weights = [sample.get("tokens", 1) for sample in samples]
                mean = math.fsum(s * w for s, w in zip(scores, weights, strict=True)) / sum(weights)
                assert entry["score"] == pytest.approx(mean)
            json.dumps(record, allow_nan=False)
    assert evals[4]["drift"]["metrics"]["kl"]["score"] > 0.1
    assert evals[4]["sums"]["prompt_hash"] == evals[8]["sums"]["prompt_hash"]
    assert evals[4]["drift"]["data_hash"] == evals[8]["drift"]["data_hash"]
    assert evals[4]["sums"]["metric"] == "accuracy"
    assert evals[4]["sums"]["harness"].startswith("lm_eval ")
    assert run.info["eval_seconds"] > 0
    assert len(list((tmp_path / "work").glob("drift-probe-*.jsonl"))) == 1


def test_prompts_are_those_of_training(models, settings, tmp_path):
    """The harness must write the prompt exactly as the chat template writes it for training."""
    from transformers import AutoTokenizer

    from eaft_verl.data.encode import render
    from eaft_verl.data.synthesis import generate

    run = new_run(tmp_path / "run")
    evaluate_checkpoints(
        run, {4: models[4]}, EvaluateSettings(target=["sums"], limit=2), str(models[0]), tmp_path, set()
    )
    tokenizer = AutoTokenizer.from_pretrained(models[4])
    for sample, row in zip(run.samples(4, "sums"), generate("sums_heldout"), strict=False):
        assert sample["id"] == row["id"]
        assert sample["prompt"] == render(tokenizer, [{"role": "user", "content": row["prompt"]}], generate=True)


def test_a_date_in_the_template_is_the_one_of_training(models, tmp_path):
    from transformers import AutoTokenizer

    from eaft_verl.data.encode import render
    from eaft_verl.evaluation import harness

    folder = shutil.copytree(models[4], tmp_path / "dated")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
    tokenizer.save_pretrained(folder)
    settings = EvaluateSettings(max_length=512)
    model, tokenizer = harness.load_model(folder, settings)
    message = [{"role": "user", "content": "Hi"}]
    language = harness.language_model(model, tokenizer, settings)
    assert language.apply_chat_template(message) == render(tokenizer, message, generate=True)


def test_the_base_run_has_not_drifted(models, settings, tmp_path):
    run = new_run(tmp_path / "base")
    evaluate_checkpoints(run, {0: models[0]}, settings, str(models[0]), tmp_path / "work", {0})
    metrics = run.evals()[0]["drift"]["metrics"]
    assert (metrics["kl"]["score"], metrics["agreement"]["score"]) == (0.0, 1.0)
    assert set(run.evals()[0]) == {"heldout", "drift", "sums", "gcd"}


def test_a_killed_evaluation_goes_on_where_it_stopped(models, settings, tmp_path):
    run = new_run(tmp_path / "run")
    arguments = ({4: models[4]}, settings, str(models[0]), tmp_path / "work", {4})
    evaluate_checkpoints(run, *arguments)
    before = run.evals()[4]
    folder = run.path / "eval" / "step_000004"
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "drift.json").unlink()
    (folder / "gcd.json").unlink()
    evaluate_checkpoints(run, *arguments)
    after = run.evals()[4]
    kept = {name for name, stamp in times.items() if (folder / name).stat().st_mtime_ns == stamp}
    assert kept == {"sums.json", "heldout.json"}
    for name in ("drift", "gcd"):
        assert {**after[name], "seconds": 0} == {**before[name], "seconds": 0}


def test_nothing_is_loaded_when_nothing_is_left(models, settings, tmp_path):
    run = new_run(tmp_path / "run")
    few = EvaluateSettings(heldout=settings.heldout, max_length=512)
    evaluate_checkpoints(run, {4: models[4]}, few, str(models[0]), tmp_path, set())
    # A base model that does not exist would be an error, were it looked at.
    evaluate_checkpoints(run, {4: models[4]}, few, str(tmp_path / "gone"), tmp_path, set())


def test_a_failing_benchmark_is_named(models, tmp_path, monkeypatch):
    def fails(text: str) -> None:
        raise DataError("answer 'two'")

    monkeypatch.setattr("eaft_verl.evaluation.scorers.final_number", fails)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    settings = EvaluateSettings(target=[{"task": "gsm8k", "data": str(rows)}], max_length=512)
    with pytest.raises(RunError, match=r"'gsm8k' failed at step 4: DataError: answer 'two'"):
        evaluate_checkpoints(new_run(tmp_path / "run"), {4: models[4]}, settings, str(models[0]), tmp_path, set())


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"question": "q"}\n', DataError, "row 1 has no 'answer'"),
        ("", DataError, "holds no rows"),
        ('{"question": "q", "answer": "two"}\n', DataError, "row 1: answer 'two' cannot be graded"),
    ],
)
def test_unfit_rows_are_found_before_a_model_is_loaded(text: str, error: type, message: str, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(text)
    settings = EvaluateSettings(target=[{"task": "gsm8k", "data": str(rows)}])
    with pytest.raises(error, match=message):
        evaluate_checkpoints(new_run(tmp_path / "run"), {4: "org/no-such-model"}, settings, "org/base", tmp_path, set())


def test_unknown_metrics_are_found_before_a_model_is_loaded(tmp_path):
    settings = EvaluateSettings(target=[{"task": "sums", "metric": "f1"}])
    with pytest.raises(ConfigError, match="has no metric 'f1'; choose one of accuracy, format_rate"):
        evaluate_checkpoints(new_run(tmp_path / "run"), {4: "org/no-such-model"}, settings, "org/base", tmp_path, set())


LOCAL_ROWS = {
    "gsm8k": [{"question": "1 + 1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}],
    "mmlu": [{"subject": "high_school_physics", "question": "Q", "choices": ["a", "b", "c", "d"], "answer": 2}],
    "cluewsc": [{"text": "x", "label": "true", "target": {"span1_text": "a", "span2_text": "b"}}],
    "aime24": [{"id": 60, "problem": "P", "answer": "204"}],
}


def test_local_variants_run(models, tmp_path):
    entries = []
    for task, rows in LOCAL_ROWS.items():
        path = tmp_path / f"{task}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries.append({"task": task, "data": str(path)})
    run = new_run(tmp_path / "run")
    settings = EvaluateSettings(general=entries, max_length=160)
    evaluate_checkpoints(run, {4: models[4]}, settings, str(models[0]), tmp_path, {4})
    records = run.evals()[4]
    primary = {name: record["metric"] for name, record in records.items()}
    assert primary == {"gsm8k": "accuracy", "mmlu": "acc", "cluewsc": "acc", "aime24": "exact_match"}
    assert records["mmlu"]["metrics"]["choice_logprob"]["score"] < 0
    assert set(run.samples(4, "mmlu")[0]["logprobs"]) == {"A", "B", "C", "D"}


def test_answers_are_cut_to_fit_the_context(tmp_path):
    from eaft_verl.evaluation.benchmarks import load_benchmark

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(LOCAL_ROWS["aime24"][0]) + "\n")
    task = load_benchmark(Entry("aime24", data=str(path)), max_length=4096).tasks["aime24"]
    assert task.get_config("generation_kwargs")["max_gen_toks"] == 4096 - 1024
    task = load_benchmark(Entry("sums"), max_length=4096).tasks["sums"]
    assert task.get_config("generation_kwargs")["max_gen_toks"] == 24
