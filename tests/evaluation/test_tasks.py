"""Which entries are accepted, and what is said of the others; none of it may need torch or lm_eval."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eaft_verl.errors import ConfigError
from eaft_verl.evaluation.settings import EvaluateSettings, evaluation_key
from eaft_verl.evaluation.tasks import LOCAL_VARIANTS, OWN_TASKS, TASK_FILES, Entry, parse_entries


def test_names_and_mappings():
    parsed = parse_entries(["sums", {"task": "gcd", "limit": 5, "metric": "accuracy"}, "mmlu_pro"])
    assert parsed == [Entry("sums"), Entry("gcd", limit=5, metric="accuracy"), Entry("mmlu_pro")]
    assert parsed[0].own is OWN_TASKS["sums"]
    assert parsed[2].own is None


def test_data_selects_the_local_variant(tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    assert parse_entries([{"task": "gsm8k", "data": str(rows)}])[0].own is LOCAL_VARIANTS["gsm8k"]
    assert parse_entries(["gsm8k"])[0].own is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("sum", "did you mean 'sums'"),
        ("letter_count", "did you mean 'letter_counting'"),
        ("no such task!", "any lm-evaluation-harness task; `eaft tasks` says"),
        ("heldout", "set evaluate.heldout"),
        ("drift", "set evaluate.drift"),
        ("cluewsc", "needs data"),
        (7, "allowed: a task name or a mapping"),
        ({"data": "x"}, "allowed: a task name or a mapping"),
        ({"task": "sums", "limits": 3}, "unknown key 'limits'"),
        ({"task": "sums", "limit": 0}, "positive number"),
        ({"task": "sums", "limit": True}, "positive number"),
        ({"task": "sums", "metric": 3}, "expected text"),
        ({"task": "mmlu_pro", "data": "x.jsonl"}, "reads its own data set"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(entry: object, message: str):
    with pytest.raises(ConfigError, match=message):
        parse_entries([entry])


def test_the_message_names_the_place_and_the_choices():
    with pytest.raises(ConfigError, match=r"evaluate.target\[1\].*products.*letter_counting"):
        parse_entries(["sums", "product"], "evaluate.target")


def test_a_task_may_stand_once_only():
    with pytest.raises(ConfigError, match="sums more than once"):
        parse_entries(["sums", {"task": "sums", "limit": 3}])
    with pytest.raises(ConfigError, match="both name gcd"):
        EvaluateSettings(target=["gcd"], general=["gcd"]).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "evaluate.limit"),
        ({"max_length": None}, "evaluate.max_length"),
        ({"drift": {"row": 3}}, "allowed: a mapping with data, rows, new_tokens"),
        ({"drift": {"rows": 0}}, "evaluate.drift.rows"),
        ({"backend": "sglang"}, "allowed: hf, vllm"),
        ({"backend_args": {"tensor_parallel_size": 2}}, "backend hf does not take"),
    ],
)
def test_settings_are_checked(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        EvaluateSettings(**settings).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target": [{"task": "gsm8k", "data": "missing.jsonl"}]},
            r"evaluate.target\[0\].data='missing.jsonl' does not .* as grade_school_math/data/test.jsonl",
        ),
        ({"general": ["gcd", "bfcl_v3"]}, r"evaluate.general\[1\]: bfcl_v3 .*bash examples/setup_bfcl.sh"),
    ],
)
def test_what_is_absent_stops_a_run_and_not_a_dry_run(
    settings: dict, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("EAFT_BFCL_PYTHON", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=message):
        EvaluateSettings(**settings).check()
    EvaluateSettings(**settings).check(dry_run=True)
    assert len(EvaluateSettings(**settings).absent()) == 1


def test_elsewhere_files_need_absolute_paths():
    settings = EvaluateSettings(target=[{"task": "gsm8k", "data": "x.jsonl"}], general=["sums"], backend="vllm")
    assert settings.absent(elsewhere=True) == ["evaluate.target[0].data='x.jsonl' must be an absolute path there"]
    there = EvaluateSettings(target=[{"task": "gsm8k", "data": "/x.jsonl"}], backend="vllm")
    assert there.absent(elsewhere=True) == []


def test_every_task_is_listed_with_its_data_metric_and_shots(capsys: pytest.CaptureFixture[str]):
    from eaft_verl.cli import main

    assert main(["tasks"]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.split("\n\n")[0].splitlines()[1:]}
    assert set(lines) == {*OWN_TASKS, *LOCAL_VARIANTS, "bfcl_v3"}
    assert lines["aime24_boxed"] == ["aime24_boxed", "accuracy", "0", "HuggingFaceH4/aime_2024"]
    assert lines["two_shot_sums"][1:3] == ["accuracy", "2"] and lines["truthfulqa"][1] == "mc2"


def test_a_longer_name_is_another_task_and_no_slip():
    assert parse_entries(["truthfulqa_mc1"])[0].own is None
    with pytest.raises(ConfigError, match="did you mean 'truthfulqa'"):
        parse_entries(["truthfullqa"])


def test_every_task_has_its_file_and_nothing_else_lies_there():
    named = {task.file.name for task in [*OWN_TASKS.values(), *LOCAL_VARIANTS.values()]}
    assert {path.name for path in TASK_FILES.glob("*.yaml")} == named | {
        "last_number.yaml",
        "chat.yaml",
        "medical_chat.yaml",
    }


def test_evaluation_key_covers_settings_and_data_but_not_the_place_of_the_data(tmp_path: Path):
    row = json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n"
    keys = []
    for name, text in (("a", row), ("b", row), ("c", row * 2)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(text)
        keys.append(evaluation_key(EvaluateSettings(target=[{"task": "gsm8k", "data": str(path)}])))
    assert keys[0] == keys[1] != keys[2]
    assert evaluation_key(EvaluateSettings()) != evaluation_key(EvaluateSettings(drift={}))
    assert evaluation_key(EvaluateSettings(drift={})) == evaluation_key(EvaluateSettings(drift={"rows": 48}))
    cut = [EvaluateSettings(target=[{"task": "sums", "new_tokens": most}]) for most in (None, 8, 9)]
    assert len({evaluation_key(settings) for settings in cut}) == 3
    assert evaluation_key(cut[0]) == evaluation_key(EvaluateSettings(target=["sums"]))
    assert evaluation_key(EvaluateSettings(limit=3)) != evaluation_key(EvaluateSettings(limit=4))


def test_the_check_needs_neither_torch_nor_the_harness():
    code = (
        "import sys; import eaft_verl.models; from eaft_verl.evaluation import settings; "
        "settings.EvaluateSettings(target=['sums']).check(); "
        "assert not {'torch', 'lm_eval', 'transformers', 'datasets'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_evaluation_key_says_what_graded_boxed_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    boxed = EvaluateSettings(target=[{"task": "aime24_boxed", "data": str(rows)}])
    keys = {}
    for present in (True, False):
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, seen=present: object() if seen or name != "math_verify" else None
        )
        monkeypatch.setattr("importlib.metadata.version", lambda name: "same")
        keys[present] = evaluation_key(boxed)
    assert keys[True] != keys[False]


MINE = """task: capitals
tasks: {{capitals: {{fields: [question, answer], data: {data}}}}}
include: base.yaml
process_results: !function scorer.score
"""
BASE = """output_type: generate_until
test_split: test
num_fewshot: 0
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], do_sample: false, max_gen_toks: 8}
metric_list: [{metric: starts, aggregation: mean, higher_is_better: true}]
metadata: {version: 3.0}
"""


def own_benchmark(folder: Path) -> Path:
    """A benchmark of the user's: a task file, what it includes, its scorer and its rows."""
    (folder / "rows.jsonl").write_text(json.dumps({"question": "Capital of France?", "answer": "Paris"}) + "\n")
    (folder / "base.yaml").write_text(BASE)
    scorer = "def score(doc, results):\n    return {'starts': results[0].startswith(doc['answer'])}\n"
    (folder / "scorer.py").write_text(scorer)
    (folder / "mine.yaml").write_text(MINE.format(data=folder / "rows.jsonl"))
    return folder / "mine.yaml"


def test_a_benchmark_is_one_file_given_by_its_path(tmp_path: Path):
    from eaft_verl.evaluation.benchmarks import load_benchmark

    (entry,) = parse_entries([str(own_benchmark(tmp_path))])
    assert entry.task == "capitals"
    benchmark = load_benchmark(entry)
    task = benchmark.tasks["capitals"]
    (doc,) = task.eval_docs
    assert (benchmark.version, task.doc_to_text(doc)) == ("mine 3.0", "Capital of France?")
    assert [task.process_results(doc, [text])["starts"] for text in ("Paris.", "Lyon")] == [True, False]


@pytest.mark.parametrize("name", ["mine.yaml", "base.yaml", "scorer.py"])
def test_every_file_of_a_benchmark_is_part_of_its_key(name: str, tmp_path: Path):
    settings = EvaluateSettings(target=[str(own_benchmark(tmp_path))])
    before = evaluation_key(settings)
    (tmp_path / name).write_text((tmp_path / name).read_text() + "\n# another\n")
    assert evaluation_key(settings) != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("[1, 2]", "no task file"),
        ("a: [", "no task file"),
        ("output_type: generate_until", "serves nothing"),
        ("task: x y", "serves .'x y'."),
        ("tasks: {x: {filds: [a]}}", "filds"),
    ],
)
def test_a_file_that_is_no_task_is_refused(content: str | None, message: str, tmp_path: Path):
    if content is not None:
        (tmp_path / "t.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse_entries([str(tmp_path / "t.yaml")])
