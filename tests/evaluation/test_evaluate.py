"""A run's checkpoints evaluated from end to end on a tiny random Llama: records, resuming, failures."""

import json
import math
import shutil
from pathlib import Path

import pytest
from tiny import CHATML, tiny_model, write_sums

from eaft_verl.errors import ConfigError, DataError, RunError
from eaft_verl.evaluation import harness
from eaft_verl.evaluation.benchmarks import Benchmark, _shares, load_benchmark
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
            assert set(record) - {"truncated"} == RECORD_KEYS
            assert ("truncated" in record) == (name in ("sums", "gcd"))
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


def test_a_failing_benchmark_is_named(models, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1?", "answer": "two"}\n')
    settings = EvaluateSettings(target=[{"task": "gsm8k", "data": str(rows)}], max_length=512)
    with pytest.raises(RunError, match=r"'gsm8k' failed at step 4: DataError: answer 'two'"):
        evaluate_checkpoints(new_run(tmp_path / "run"), {4: models[4]}, settings, str(models[0]), tmp_path, set())


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"question": "q"}\n', DataError, "row 1 has no 'answer'"),
        ("", DataError, "holds no rows"),
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


def language_and_tasks(models, rows: list[dict], tmp_path: Path, max_length: int) -> tuple:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = EvaluateSettings(max_length=max_length)
    language = harness.language_model(*harness.load_model(models[4], settings), settings)
    return language, load_benchmark(Entry("aime24", data=str(path)))


def test_answers_get_what_the_longest_prompt_leaves(models, tmp_path):
    rows = [{"id": number, "problem": "P" * (1 + 40 * number), "answer": "2"} for number in range(3)]
    language, benchmark = language_and_tasks(models, rows, tmp_path, 250)
    harness.give_room(language, benchmark)
    record, samples = harness.run_benchmark(language, benchmark)
    longest = max(len(language.tok_encode(sample["prompt"])) for sample in samples)
    assert benchmark.tasks["aime24"].get_config("generation_kwargs")["max_gen_toks"] == 250 - longest
    lengths = [len(language.tok_encode(sample["response"])) for sample in samples]
    cut = [sample.get("truncated") == "answer" for sample in samples]
    assert cut == [length >= 250 - longest for length in lengths] and any(cut)  # a random model does not stop
    assert record["truncated"] == {"prompts": 0, "answers": sum(cut)}
    short = load_benchmark(Entry("sums"))
    harness.give_room(language, short)
    assert short.tasks["sums"].get_config("generation_kwargs")["max_gen_toks"] == 24


def test_a_prompt_that_leaves_no_room_is_an_error_before_anything_is_generated(models, tmp_path, monkeypatch):
    rows = [{"id": 1, "problem": "Pq" * 110, "answer": "2"}]
    language, benchmark = language_and_tasks(models, rows, tmp_path, 250)
    monkeypatch.setattr(language, "generate_until", lambda requests: pytest.fail("generated"))
    with pytest.raises(DataError, match=r"a prompt of \d+ tokens leaves \d+ of data.max_length=250 .* aime24 asks for"):
        harness.give_room(language, benchmark)
    run = new_run(tmp_path / "run")
    settings = EvaluateSettings(target=[{"task": "aime24", "data": str(tmp_path / "rows.jsonl")}], max_length=100)
    with pytest.raises(DataError, match="leaves 0 of data.max_length=100"):
        evaluate_checkpoints(run, {4: models[4]}, settings, str(models[0]), tmp_path, set())
    assert run.evals() == {}


@pytest.mark.parametrize(
    ("sizes", "total", "expected"),
    [
        ([5, 1, 5], 6, [3, 1, 2]),  # two left after one round each and one more: 1, 1, 1 -> 2, 1, 2 -> 3, 1, 2
        ([5, 1, 5], 100, [5, 1, 5]),
        ([9, 9, 9, 9], 2, [1, 0, 1, 0]),
        ([4], 3, [3]),
        ([100] * 57, 500, None),
    ],
)
def test_a_limit_is_divided_evenly(sizes: list[int], total: int, expected: list[int] | None):
    shares = _shares(sizes, total)
    assert sum(shares) == min(total, sum(sizes)) and all(a <= b for a, b in zip(shares, sizes, strict=True))
    assert shares == expected or (expected is None and set(shares) == {8, 9} and shares.count(9) == 500 - 8 * 57)


def test_a_limit_on_a_group_is_that_of_the_whole_group(models, tmp_path):
    from lm_eval.api.group import Group

    parts = {}
    for name, count in (("aime24", 3), ("aime25", 1)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"id": n, "problem": "P", "answer": "2"}) + "\n" for n in range(count)))
        parts |= load_benchmark(Entry(name, data=str(path))).tasks
    group = Group("both")
    for task in parts.values():
        group.add(task)
    whole = Benchmark("both", parts, {"both": group}, "1")
    settings = EvaluateSettings(max_length=120)
    language = harness.language_model(*harness.load_model(models[4], settings), settings)
    for limit, ids in (
        (3, ["aime24:0", "aime24:1", "aime25:0"]),
        (9, ["aime24:0", "aime24:1", "aime24:2", "aime25:0"]),
    ):
        benchmark = whole.first(limit)
        harness.give_room(language, benchmark)
        record, samples = harness.run_benchmark(language, benchmark)
        assert [sample["id"] for sample in samples] == ids and record["n"] == len(ids)
