"""Small benchmarks asked in one batch: their records and samples are those of each by itself."""

import json
from pathlib import Path

import pytest
from tiny import tiny_model

from eaft_verl.evaluation import harness, loading
from eaft_verl.evaluation.benchmarks import asked_together, load_benchmark
from eaft_verl.evaluation.checkpoints import EvaluateSettings, evaluate_checkpoints
from eaft_verl.evaluation.tasks import Entry
from eaft_verl.runs import Run

pytest.importorskip("reasoning_gym")
NAMES = ("gcd", "lcm", "products")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), hidden=32, seed=4)


def evaluated(path: Path, model: Path, batch_size: int) -> Run:
    entries = [{"task": name, "limit": 3} for name in NAMES]
    arguments = {"backend_args": {"batch_size": batch_size}, "max_length": 512}
    run = Run.create(path, info={"kind": "arm", "arm": "sft"}, config="", env={})
    settings = EvaluateSettings(target=["sums"], general=entries, limit=3, **arguments)
    evaluate_checkpoints(run, {4: model}, settings, str(model), path / "work", 1)
    return run


def test_records_are_those_of_each_by_itself(model, tmp_path, monkeypatch, capsys):
    asked: list[int] = []
    original = harness._Prompted._model_generate

    def counted(self, context, *args, **kwargs):
        asked.append(len(context))
        return original(self, context, *args, **kwargs)

    monkeypatch.setattr(harness._Prompted, "_model_generate", counted)
    apart = evaluated(tmp_path / "apart", model, 3)
    assert asked == [3, 3, 3, 3]
    alone = capsys.readouterr().out
    asked.clear()
    together = evaluated(tmp_path / "together", model, 12)
    assert asked == [3, 9]  # the target's are the same at a checkpoint that is asked nothing else
    said = capsys.readouterr().out
    assert "at once" not in alone and said.count("s for 9 at once)") == 3 and said.count("(n=3, ") == 4
    for name, record in together.evals()[4].items():
        other = apart.evals()[4][name]
        assert {**record, "seconds": 0} == {**other, "seconds": 0}
        assert together.samples(4, name) == apart.samples(4, name)
    seconds = [together.evals()[4][name]["seconds"] for name in NAMES]
    assert seconds[0] > 0 and len(set(seconds)) == 1  # as many questions each


def test_what_does_not_fit_one_batch_is_asked_by_itself(model, tmp_path):
    settings = EvaluateSettings(max_length=512)
    language = harness.language_model(*loading.load_model(model, settings), settings)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": n, "problem": "P", "answer": "2"}) + "\n" for n in range(3)))
    entries = [Entry(name, limit=3) for name in ("gcd", "lcm")]
    entries += [Entry("aime24", data=str(rows)), Entry("products", limit=3), Entry("letter_counting", limit=3)]
    loaded = [load_benchmark(entry) for entry in entries]
    for one in loaded:
        harness.give_room(language, one)

    def names(batch_size: object, benchmarks=loaded) -> list[list[str]]:
        return [[one.name for one in together] for together in asked_together(benchmarks, batch_size)]

    apart = [["gcd"], ["lcm"], ["aime24"], ["products"], ["letter_counting"]]
    assert names(6) == names(99) == [["gcd", "lcm"], ["aime24"], ["products", "letter_counting"]]  # it has more room
    assert names(5) == names("auto") == apart
    assert names(99, [loaded[0], loaded[0]]) == [["gcd"], ["gcd"]]  # equal names: the results could not be told apart
    loaded[1].tasks["lcm"].set_config("generation_kwargs", {"do_sample": True}, update=True)
    loaded[0].tasks["gcd"].set_config("generation_kwargs", {"do_sample": True}, update=True)
    assert names(99)[:2] == [["gcd"], ["lcm"]]  # draws would depend on what is asked beside
    assert names(99, []) == []
