"""A run's checkpoints evaluated from end to end on a tiny random Llama: records, resuming, failures."""

import gc
import json
import math
import multiprocessing
import os
import shutil
import time
import weakref
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from tiny import CHATML, tiny_model, write_sums
from transformers import AutoTokenizer

from eaft_verl.data.prepare import prepare
from eaft_verl.data.spec import DataSpec
from eaft_verl.errors import ConfigError, DataError, RunError
from eaft_verl.evaluation import checkpoints as module
from eaft_verl.evaluation import harness, loading
from eaft_verl.evaluation.benchmarks import Benchmark, _shares, load_benchmark
from eaft_verl.evaluation.checkpoints import EvaluateSettings, evaluate_checkpoints
from eaft_verl.evaluation.tasks import Entry
from eaft_verl.runs import Run

pytest.importorskip("reasoning_gym")
RECORD_KEYS = {
    *("benchmark", "side", "metric", "step", "metrics", "n", "task_version", "prompt_hash", "data_hash"),
    *("backend", "harness", "seconds"),
}


def prepared(rows: Path, model: Path, **spec) -> str:
    """The rows prepared for the model, as training would have them."""
    out = rows.with_name(f"{rows.stem}-prepared.parquet")
    return str(prepare(DataSpec(str(rows), **spec), AutoTokenizer.from_pretrained(model), out).path)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {step: tiny_model(folder / f"step_{step}", hidden=32, seed=step) for step in (0, 4, 8)}


@pytest.fixture
def settings(models, tmp_path: Path) -> EvaluateSettings:
    return EvaluateSettings(
        target=["sums"],
        general=[{"task": "gcd", "limit": 2}],
        heldout=prepared(write_sums(tmp_path / "heldout.jsonl", 5, seed=2), models[0]),
        drift={"rows": 3, "new_tokens": 5},
        limit=3,
        max_length=512,
    )


def new_run(path: Path, kind: str = "arm") -> Run:
    return Run.create(path, info={"kind": kind, "arm": "sft"}, config="", env={})


def test_records_of_an_arm(models, settings, tmp_path):
    run = new_run(tmp_path / "run")
    checkpoints = {step: models[step] for step in (4, 8)}
    evaluate_checkpoints(run, checkpoints, settings, str(models[0]), tmp_path / "work", points=2)
    evals = run.evals()
    assert {step: set(records) for step, records in evals.items()} == {
        4: {"heldout", "drift", "drift_task", "sums"},
        8: {"heldout", "drift", "drift_task", "sums", "gcd"},
    }
    sides = {"heldout": "target", "sums": "target", "gcd": "general", "drift": "drift", "drift_task": "drift"}
    for step, records in evals.items():
        for name, record in records.items():
            assert set(record) - {"truncated", "truncation_rate"} == RECORD_KEYS
            assert ("truncated" in record) == ("truncation_rate" in record) == (name in ("sums", "gcd"))
            assert (record["benchmark"], record["side"], record["step"]) == (name, sides[name], step)
            samples = run.samples(step, name)
            assert record["n"] == len(samples) == {"gcd": 2, "drift_task": 5}.get(name, 3)
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
    assert len(list((tmp_path / "work").glob("drift-probe-*"))) == 2  # neutral prompts, and the task's own
    for name in ("drift", "drift_task"):
        for sample in run.samples(8, name):
            assert len(sample["kl_T"]) == sample["tokens"]
            assert math.fsum(sample["kl_T"]) / sample["tokens"] == pytest.approx(sample["scores"]["kl"], rel=1e-5)


def test_no_model_outlives_its_evaluation(models, settings, tmp_path, monkeypatch):
    """In one process after another: what is frozen is never collected."""
    held = []

    def load(path, given):
        model, tokenizer = original(path, given)
        held.append(weakref.ref(model.get_input_embeddings().weight))
        return model, tokenizer

    original = loading.load_model
    monkeypatch.setattr(loading, "load_model", load)
    gc.disable()  # what nobody asks to be collected is not
    try:
        for number in range(3):
            run = new_run(tmp_path / f"run{number}")
            evaluate_checkpoints(run, {8: models[8]}, settings, str(models[0]), tmp_path / "work", points=1)
    finally:
        gc.enable()
    gc.collect()
    assert len(held) >= 3 and not [one for one in held if one() is not None]


def test_prompts_are_those_of_training(models, settings, tmp_path):
    """The harness must write the prompt exactly as the chat template writes it for training."""
    from eaft_verl.data.encode import render
    from eaft_verl.data.synthesis import generate

    run = new_run(tmp_path / "run")
    evaluate_checkpoints(run, {4: models[4]}, EvaluateSettings(target=["sums"], limit=2), str(models[0]), tmp_path, 1)
    tokenizer = AutoTokenizer.from_pretrained(models[4])
    for sample, row in zip(run.samples(4, "sums"), generate("sums_heldout"), strict=False):
        assert sample["id"] == row["id"]
        assert sample["prompt"] == render(tokenizer, [{"role": "user", "content": row["prompt"]}], generate=True)


def test_a_date_in_the_template_is_the_one_of_training(models, tmp_path):
    from eaft_verl.data.encode import render

    folder = shutil.copytree(models[4], tmp_path / "dated")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
    tokenizer.save_pretrained(folder)
    settings = EvaluateSettings(max_length=512)
    model, tokenizer = loading.load_model(folder, settings)
    message = [{"role": "user", "content": "Hi"}]
    language = harness.language_model(model, tokenizer, settings)
    assert language.apply_chat_template(message) == render(tokenizer, message, generate=True)


def test_the_base_run_has_not_drifted(models, settings, tmp_path):
    run = new_run(tmp_path / "base", "base")
    evaluate_checkpoints(run, {0: models[0]}, settings, str(models[0]), tmp_path / "work", 1)
    metrics = run.evals()[0]["drift"]["metrics"]
    assert (metrics["kl"]["score"], metrics["agreement"]["score"]) == (0.0, 1.0)
    assert set(run.evals()[0]) == {"heldout", "drift", "drift_task", "sums", "gcd"}
    assert json.loads((run.path / "eval" / "noise.json").read_text())["task"]["kl"] < 1e-6


def test_a_killed_evaluation_goes_on_where_it_stopped(models, settings, tmp_path):
    run = new_run(tmp_path / "run")
    arguments = ({4: models[4]}, settings, str(models[0]), tmp_path / "work", 1)
    evaluate_checkpoints(run, *arguments)
    before = run.evals()[4]
    folder = run.path / "eval" / "step_000004"
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "drift.json").unlink()
    (folder / "gcd.json").unlink()
    evaluate_checkpoints(run, *arguments)
    after = run.evals()[4]
    kept = {name for name, stamp in times.items() if (folder / name).stat().st_mtime_ns == stamp}
    assert kept == {"sums.json", "heldout.json", "drift_task.json"}
    for name in ("drift", "gcd"):
        assert {**after[name], "seconds": 0} == {**before[name], "seconds": 0}


def test_nothing_is_loaded_when_nothing_is_left(models, settings, tmp_path):
    run = new_run(tmp_path / "run")
    few = EvaluateSettings(heldout=settings.heldout, max_length=512)
    evaluate_checkpoints(run, {4: models[4]}, few, str(models[0]), tmp_path, 1)
    # A base model that does not exist would be an error, were it looked at.
    evaluate_checkpoints(run, {4: models[4]}, few, str(tmp_path / "gone"), tmp_path, 1)


def test_a_failing_benchmark_is_named(models, tmp_path, monkeypatch):
    def fails(text: str) -> None:
        raise DataError("answer 'two'")

    monkeypatch.setattr("eaft_verl.evaluation.scorers.final_number", fails)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    settings = EvaluateSettings(target=[{"task": "gsm8k", "data": str(rows)}], max_length=512)
    with pytest.raises(RunError, match=r"'gsm8k' failed at step 4: DataError: answer 'two'"):
        evaluate_checkpoints(new_run(tmp_path / "run"), {4: models[4]}, settings, str(models[0]), tmp_path, 1)


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
        evaluate_checkpoints(new_run(tmp_path / "run"), {4: "org/no-such-model"}, settings, "org/base", tmp_path, 1)


def test_unknown_metrics_are_found_before_a_model_is_loaded(tmp_path):
    settings = EvaluateSettings(target=[{"task": "sums", "metric": "f1"}])
    with pytest.raises(ConfigError, match="has no metric 'f1'; choose one of accuracy, format_rate"):
        evaluate_checkpoints(new_run(tmp_path / "run"), {4: "org/no-such-model"}, settings, "org/base", tmp_path, 1)


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
    evaluate_checkpoints(run, {4: models[4]}, settings, str(models[0]), tmp_path, 1)
    records = run.evals()[4]
    primary = {name: record["metric"] for name, record in records.items()}
    assert primary == {"gsm8k": "accuracy", "mmlu": "acc", "cluewsc": "acc", "aime24": "exact_match"}
    assert records["mmlu"]["metrics"]["choice_logprob"]["score"] < 0
    assert set(run.samples(4, "mmlu")[0]["logprobs"]) == {"A", "B", "C", "D"}


def test_a_model_that_is_the_base_is_measured_all_the_same(models, settings, tmp_path):
    """That nothing has been trained is said by the run, not concluded from files that look like the base's."""
    run = new_run(tmp_path / "run")
    few = EvaluateSettings(drift=settings.drift, max_length=512)
    evaluate_checkpoints(run, {4: models[0]}, few, str(models[0]), tmp_path / "work", 1)
    copied = run.evals()[4]["drift"]["metrics"]
    assert abs(copied["kl"]["score"]) < 1e-6 and copied["agreement"]["score"] == 1.0
    moved = shutil.copytree(models[0], tmp_path / "moved")
    from safetensors.torch import load_file, save_file

    weights = load_file(moved / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] += 0.5
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    evaluate_checkpoints(run, {8: moved}, few, str(models[0]), tmp_path / "work", 1)
    assert run.evals()[8]["drift"]["metrics"]["kl"]["score"] > 0.01
    assert not (run.path / "eval" / "noise.json").exists()


def test_the_base_run_measures_its_own_noise(models, settings, tmp_path):
    run = new_run(tmp_path / "base", "base")
    arguments = ({0: models[0]}, settings, str(models[0]), tmp_path / "work", 1)
    evaluate_checkpoints(run, *arguments)
    path = run.path / "eval" / "noise.json"
    found = json.loads(path.read_text())
    assert 0 <= found["kl"] < 1e-6 and found["agreement"] == 1.0 and 0 <= found["nll"] < 1e-6
    assert found["accuracy"] == {
        "sums": {"changed": 0, "n": 3, "difference": 0.0},
        "gcd": {"changed": 0, "n": 2, "difference": 0.0},
    }
    assert found["questions"] == 32
    assert set(run.evals()) == {0} and "noise" not in run.evals()[0]
    path.unlink()  # killed before it was written: nothing else is measured again
    stamps = {file: file.stat().st_mtime_ns for file in run.path.rglob("step_*/*")}
    evaluate_checkpoints(run, *arguments)
    assert json.loads(path.read_text()) == found
    assert stamps == {file: file.stat().st_mtime_ns for file in run.path.rglob("step_*/*")}


def test_noise_of_answers_that_do_change_is_counted(models, settings, tmp_path, monkeypatch):
    """The second time the model is another one, as if batches made all the difference."""
    real = harness.language_model
    asked: list[int | None] = []

    def language_model(model, tokenizer, settings, batch_size=None):
        asked.append(batch_size)
        chosen = loading.load_model(models[8], settings)[0] if batch_size else model
        return real(chosen, tokenizer, settings, batch_size)

    monkeypatch.setattr(harness, "language_model", language_model)
    (tmp_path / "rows.jsonl").write_text((json.dumps(LOCAL_ROWS["mmlu"][0]) + "\n") * 2)
    task = {"task": "mmlu", "data": str(tmp_path / "rows.jsonl"), "metric": "choice_logprob"}
    run = new_run(tmp_path / "base", "base")
    evaluate_checkpoints(run, {0: models[0]}, EvaluateSettings(target=[task]), str(models[0]), tmp_path, 1)
    found = json.loads((run.path / "eval" / "noise.json").read_text())
    assert found["kl"] is None and found["nll"] is None
    other = new_run(tmp_path / "other")
    evaluate_checkpoints(other, {8: models[8]}, EvaluateSettings(target=[task]), str(models[0]), tmp_path, 1)
    scores = [of.evals()[step]["mmlu"]["metrics"]["choice_logprob"]["score"] for of, step in ((run, 0), (other, 8))]
    expected = {"changed": 2, "n": 2, "difference": pytest.approx(abs(scores[0] - scores[1]), rel=1e-5)}
    assert found["accuracy"]["mmlu"] == expected and asked == [None, 8, None]


def test_benchmarks_are_run_at_the_last_points_only(models, tmp_path):
    run = new_run(tmp_path / "run")
    rows = prepared(write_sums(tmp_path / "heldout.jsonl", 2, seed=2), models[0])
    settings = EvaluateSettings(target=["sums"], general=["gcd"], heldout=rows, limit=1, max_length=512)
    checkpoints = dict.fromkeys((1, 2, 4, 8, 11), models[4])
    names = module._pending(run, checkpoints, settings, 2)
    assert names == {
        1: ["heldout"], 2: ["heldout"], 4: ["heldout"], 8: ["heldout", "sums"], 11: ["heldout", "sums", "gcd"],
    }  # fmt: skip


def test_prepared_turns_are_scored_once_each(models, tmp_path):
    """Split at its turns, a conversation of three becomes three examples; not six, which is what its prefixes hold."""
    turns = [{"role": role, "content": text * 3} for text in "abc" for role in ("user", "assistant")]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    rows = prepared(tmp_path / "chat.jsonl", models[0], turns="split")
    run = new_run(tmp_path / "run")
    evaluate_checkpoints(run, {4: models[4]}, EvaluateSettings(heldout=rows), str(models[0]), tmp_path, 1)
    record = run.evals()[4]["heldout"]
    assert record["n"] == 3
    import torch
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(models[4]), AutoTokenizer.from_pretrained(models[4])
    losses = []
    for end in (2, 4, 6):
        prompt = tokenizer.apply_chat_template(turns[: end - 1], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt)["input_ids"]
        whole = torch.tensor([ids + tokenizer(turns[end - 1]["content"] + "<|im_end|>")["input_ids"]])
        with torch.no_grad():
            logp = model(whole).logits[0].double().log_softmax(-1)
        losses += [-logp[place - 1, whole[0, place]].item() for place in range(len(ids), whole.shape[1])]
    assert record["metrics"]["nll"]["score"] == pytest.approx(math.fsum(losses) / len(losses), abs=1e-5)


def test_rows_that_are_not_prepared_are_no_held_out_data(models, tmp_path):
    raw = str(write_sums(tmp_path / "heldout.jsonl", 2, seed=2))
    with pytest.raises(DataError, match="is not prepared data: .*run `eaft prepare`"):
        evaluate_checkpoints(
            new_run(tmp_path / "run"), {4: "org/none"}, EvaluateSettings(heldout=raw), "org/b", tmp_path, 1
        )


def language_and_tasks(models, rows: list[dict], tmp_path: Path, max_length: int) -> tuple:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = EvaluateSettings(max_length=max_length)
    language = harness.language_model(*loading.load_model(models[4], settings), settings)
    return language, load_benchmark(Entry("aime24", data=str(path)))


def test_answers_get_what_the_longest_prompt_leaves(models, tmp_path):
    rows = [{"id": number, "problem": "P" * (1 + 40 * number), "answer": "2"} for number in range(3)]
    language, benchmark = language_and_tasks(models, rows, tmp_path, 250)
    harness.give_room(language, benchmark)
    [(record, samples)] = harness.run_benchmarks(language, [benchmark])
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
        evaluate_checkpoints(run, {4: models[4]}, settings, str(models[0]), tmp_path, 1)
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
    language = harness.language_model(*loading.load_model(models[4], settings), settings)
    for limit, ids in (
        (3, ["aime24:0", "aime24:1", "aime25:0"]),
        (9, ["aime24:0", "aime24:1", "aime24:2", "aime25:0"]),
    ):
        benchmark = whole.first(limit)
        harness.give_room(language, benchmark)
        [(record, samples)] = harness.run_benchmarks(language, [benchmark])
        assert [sample["id"] for sample in samples] == ids and record["n"] == len(ids)


def test_vllm_has_a_process_of_its_own(models, settings, tmp_path, monkeypatch):
    """Without vLLM: what would run there runs in a spawned process, and its error comes back."""
    run = new_run(tmp_path / "run")
    session = module.Session(run, EvaluateSettings(target=["sums"], backend="vllm"), models[0], tmp_path)
    session.model(models[4])
    *seen, process = module._apart(_process, session, 7)
    assert seen == [7, str(run.path), {}] and process != os.getpid()
    assert session.loaded is None  # the GPUs are free when the engine comes
    with pytest.raises(RunError, match="'sums' failed at step 3"):
        module._apart(_fail, session)
    assert not psutil.pid_exists(module._apart(_leave_idle, session))  # and this returned


def _leave_idle(session):
    """An engine that is not told to stop: a child that would be waited for."""
    child = multiprocessing.Process(target=time.sleep, args=(600,))
    child.start()
    return child.pid


def _process(session, number):
    return number, str(session.run.path), session.benchmarks, os.getpid()


def _fail(session):
    with module._named("sums", 3):
        raise ValueError("no")


def test_the_engine_of_each_checkpoint_is_asked_for_all_its_tasks(models, settings, tmp_path, monkeypatch):
    """vLLM's engine replaced by transformers: what the spawned process does, done here."""
    started = []

    def engine(path, settings):
        started.append(path)
        return harness.language_model(*loading.load_model(path, settings), settings)

    monkeypatch.setattr(harness, "vllm_model", engine)
    monkeypatch.setattr("eaft_verl.evaluation.settings.EvaluateSettings.absent", lambda self, **_: [])
    monkeypatch.setattr(module, "_apart", lambda work, session, *rest: work(replace(session, benchmarks={}), *rest))
    run = new_run(tmp_path / "base", "base")
    vllm = replace(settings, backend="vllm")
    evaluate_checkpoints(run, {0: models[0]}, vllm, str(models[0]), tmp_path / "work", 1)
    assert started == [models[0], models[0]]  # once to measure, once to measure its noise
    records = run.evals()[0]
    assert {name: record["backend"] for name, record in records.items()} == {
        "heldout": "hf", "drift": "hf", "drift_task": "hf", "sums": "vllm", "gcd": "vllm",
    }  # fmt: skip
    assert json.loads((run.path / "eval" / "noise.json").read_text())["accuracy"]["sums"]["changed"] == 0
