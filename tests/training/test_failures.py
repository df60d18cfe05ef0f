"""Every way in which a worker can fail, in one line: what is said, the exit code, and the file with the rest."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayTaskError

from eaft_verl.errors import Diverged, RunError
from eaft_verl.runs import Run
from eaft_verl.training.failures import explained, on_device

TRACE = "Traceback (most recent call last):\n  File 'x.py', line 1\nValueError: out of bounds"


def config(
    *, dynamic: bool = True, rows: int = 1, limit: int = 4096, longest: int = 1000, sp: int = 1, one_unit: bool = False
) -> Any:
    data = SimpleNamespace(use_dynamic_bsz=dynamic, micro_batch_size_per_gpu=rows, max_token_len_per_gpu=limit)
    engine = SimpleNamespace(ulysses_sequence_parallel_size=sp, wrap_policy={"disable": one_unit})
    verl = SimpleNamespace(data=data, engine=engine, trainer=SimpleNamespace(n_gpus_per_node=2))
    return SimpleNamespace(data=SimpleNamespace(max_length=longest), verl=verl, model="m")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "worker-ab-01000000-77.err").write_text("the last words of 77\n")
    (logs / "raylet.out").write_text("\x1b[31mraylet line\x1b[0m\n")
    made = Run.create(tmp_path / "run", info={"kind": "arm"}, config="a: 1\n", env={})
    made.update(ray_logs=str(logs), attempt=3)
    return made


def raised(cause: Exception) -> RayTaskError:
    return RayTaskError("train_batch", TRACE, cause, pid=77).as_instanceof_cause()


def text(error: BaseException) -> str:
    return " ".join(str(error).split())


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            raised(torch.OutOfMemoryError("CUDA out of memory. Tried")),
            4,
            "on its GPU: a micro-batch has up to 4096",
        ),
        (raised(MemoryError()), 4, "2 worker(s) per node, a micro-batch has up to 4096 tokens"),
        (raised(RuntimeError("DefaultCPUAllocator: can't allocate memory: you")), 4, "ran out of memory: 2 worker(s)"),
        (OutOfMemoryError("Task was killed due to the node running low on memory."), 4, "Ray ended a worker"),
        (raised(OSError(errno.ENOSPC, "No space left on device", "/x/model.pt")), 5, "while writing /x/model.pt"),
        (raised(RuntimeError("basic_ios::clear: iostream error")), 5, "no space left while writing"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x/metrics.jsonl"), 5, "while writing /x/metrics.jsonl"),
        (
            raised(Diverged("1 weights are not finite in bfloat16, first w")),
            7,
            "1 weights are not finite in bfloat16, first w",
        ),
        (ActorDiedError(), 8, "a worker has died"),
        (NodeDiedError("the node 10.0.0.2 has died"), 8, "a worker has died: the node 10.0.0.2 has died"),
        (raised(ValueError("out of\nbounds")), 1, "a worker failed: ValueError: out of bounds"),
        (RayTaskError("run", TRACE, raised(ValueError("inner"))), 1, "a worker failed: ValueError: inner"),
        (raised(RunError("no such row")), 2, "no such row"),
    ],
)
def test_each_cause_has_its_line_and_code(error: BaseException, code: int, words: str, run: Run) -> None:
    found = explained(error, config(), run)
    assert isinstance(found, RunError) and found.code == code
    assert words in text(found) and "\n" not in str(found) and "Traceback" not in str(found), str(found)


def test_where_the_model_is_one_unit_layers_are_advised(run: Run) -> None:
    error, advice = raised(torch.OutOfMemoryError("CUDA out of memory")), "or verl.engine.wrap_policy.disable=false"
    assert advice in text(explained(error, config(one_unit=True), run))
    assert advice not in text(explained(error, config(), run))


def test_an_actor_killed_for_memory_is_out_of_memory(run: Run) -> None:
    died = ActorDiedError()
    died.error_msg = "The actor died unexpectedly.\n\tpid: 77\nTask was killed due to the node running low on memory."
    assert explained(died, config(), run).code == 4


def test_the_file_has_the_traceback_and_the_worker_s_last_words(run: Run) -> None:
    found = explained(raised(ValueError("x")), config(), run)
    file = run.path / "failures" / "attempt_3.txt"
    assert str(file) in str(found)
    kept = file.read_text()
    assert "line 1\nValueError: out of bounds" in kept and "the last words of 77" in kept
    assert "raylet line\n" in kept and "\x1b" not in kept


def test_a_disk_too_full_for_the_details_hides_no_cause(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("eaft_verl.cluster.ray_logs.write_text", full)
    lost = explained(ActorDiedError(), config(), run)
    assert "has died" in text(lost) and "details could not be written: No space left on device" in text(lost)
    assert "while writing" in text(explained(raised(RuntimeError("basic_ios::clear: iostream error")), config(), run))


def test_what_is_ours_or_unknown_stays_what_it_is(run: Run) -> None:
    for error in (RunError("told"), KeyError("x"), OSError(errno.ENOENT, "none", "x")):
        assert explained(error, config(), run) is error


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"limit": 4096, "longest": 1000}, "verl.data.max_token_len_per_gpu=2048"),
        ({"limit": 1500, "longest": 1000}, "verl.data.max_token_len_per_gpu=1000"),
        ({"limit": 1000, "longest": 1000, "sp": 2}, "verl.data.max_token_len_per_gpu=500"),
        ({"limit": 1000, "longest": 1000}, "data.max_length=500 data.over_long=drop"),
        (
            {"dynamic": False, "rows": 6, "longest": 100},
            "up to 600 tokens; try verl.data.micro_batch_size_per_gpu=3",
        ),
        ({"dynamic": False, "rows": 1, "longest": 100}, "verl.engine.offload_policy=true"),
    ],
)
def test_the_override_is_lower_and_still_holds_an_example(settings: dict[str, Any], advice: str) -> None:
    assert advice in on_device(config(**settings))
