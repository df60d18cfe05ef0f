"""Run directories: never overwritten, atomic, readable after a kill, held by one process."""

from pathlib import Path

import pytest

from eaft_verl.errors import RunError
from eaft_verl.files import read_json, read_jsonl, write_json, write_jsonl
from eaft_verl.runs import Run, cause_of, infos_in


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", info={"kind": "arm"}, config="a: 1\n", env={"python": "3"})


def test_a_run_is_created_once(run: Run) -> None:
    assert run.info["status"] == "created" and run.config == {"a": 1} and run.env == {"python": "3"}
    with pytest.raises(RunError, match="never overwritten"):
        Run.create(run.path, info={}, config="", env={})
    with pytest.raises(RunError, match="not a run directory"):
        Run(run.path.parent)


def test_metrics_survive_a_torn_line_and_are_rewound(run: Run) -> None:
    for step in (1, 2, 3):
        run.log({"split": "train", "step": step, "loss": float("nan") if step == 2 else 1.0})
    with (run.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"split": "train", "st')
    assert [row["step"] for row in run.metrics()] == [1, 2, 3] and run.metrics()[1]["loss"] == "nan"
    run.rewind_metrics(2)
    run.log({"split": "train", "step": 3, "loss": 5.0})
    assert [row["step"] for row in run.metrics()] == [1, 2, 3] and run.metrics()[2]["loss"] == 5.0


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{\n{"a": 2}\n')
    for read, name in ((read_json, "a.json"), (read_jsonl, "a.jsonl")):
        with pytest.raises(RunError, match=name):
            read(tmp_path / name)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    with pytest.raises(TypeError):
        write_jsonl(tmp_path / "b.jsonl", [{"a": object()}])
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("damage", ["", "[]", '{"a": ', "\x00\x00", "a: [", None])
@pytest.mark.parametrize("name", ["run.json", "env.json", "config.yaml"])
def test_a_damaged_description_is_read_from_its_copy(
    run: Run, capsys: pytest.CaptureFixture[str], name: str, damage: str | None
) -> None:
    run.update(status="running")
    before = (run.path / name).read_text()
    if damage is None:
        (run.path / name).unlink()
    else:
        (run.path / name).write_text(damage)
    found = Run(run.path)  # a run by its copy alone
    assert found.info["status"] == "running" and found.env == {"python": "3"} and found.config == {"a": 1}
    assert f"{name} was damaged or missing; its copy is used" in capsys.readouterr().err
    assert (run.path / name).read_text() == before, "and it is whole again"
    assert found.info and not capsys.readouterr().err


def test_a_description_without_a_sound_copy_is_an_error_that_says_what_to_do(run: Run) -> None:
    for name in ("config.yaml", ".config.yaml"):
        (run.path / name).write_text("")
    with pytest.raises(RunError, match=r"config.yaml is damaged or missing, and its copy .config.yaml too; put one"):
        _ = run.config
    assert list(infos_in(run.path.parent)) == [run.info]
    for name in ("run.json", ".run.json"):
        (run.path / name).write_text("[")
    assert list(infos_in(run.path.parent)) == []
    assert Run.describe(run.path, status="failed", rebuilt=True).info["rebuilt"]


def test_what_a_kill_left_of_a_creation_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.x8d2").write_text("half")
    assert Run.create(tmp_path / "run", info={}, config="a: 1", env={}).info["status"] == "created"


def test_evaluations_and_checkpoints_are_found_by_step(run: Run) -> None:
    run.write_eval(16, "sums", {"n": 1}, [{"id": "a", "scores": {"accuracy": 1.0}}])
    run.write_eval(4, "sums", {"n": 1}, [])
    assert list(run.evals()) == [4, 16] and run.samples(16, "sums")[0]["id"] == "a"
    for name, files in (
        ("step_000016", ["config.json"]),
        ("step_000004", []),
        (".step_000020.partial", ["config.json"]),
    ):
        folder = run.path / "checkpoints" / name
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).touch()
    assert list(run.checkpoints()) == [16]


def test_a_run_is_held_by_one_process(run: Run) -> None:
    with run.locked(), pytest.raises(RunError, match="in use by another process"), Run(run.path).locked():
        pass
    with run.locked():
        pass


def test_the_cause_of_a_failure_is_its_message() -> None:
    assert cause_of(RunError("step 3: loss nan")) == "RunError: step 3: loss nan"
    assert cause_of(ValueError("first\nsecond")) == "ValueError: first\nsecond"
    assert len(cause_of(ValueError("x" * 9000))) == 2000


def test_the_cause_of_a_workers_failure_stands_at_the_end_of_its_traceback() -> None:
    frames = "".join(f'  File "/x/{number}.py", line 3, in f\n    ^^^^\n' for number in range(200))
    head = "\x1b[36mray::Worker.train_batch()\x1b[39m (pid=1)\nOSError: earlier\n"
    text = f"{head}{frames}RuntimeError: out of memory\nat 3"
    assert cause_of(RuntimeError(text)) == "RuntimeError: RuntimeError: out of memory\nat 3"
