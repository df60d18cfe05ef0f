"""Resumable checkpoints, the progress line and the workers' environment."""

import io
import math
from pathlib import Path

import pytest

from eaft_verl.cluster.session import worker_environment
from eaft_verl.errors import RunError
from eaft_verl.files import write_json
from eaft_verl.runs import Run
from eaft_verl.training.progress import Progress
from eaft_verl.training.sft import checkpoint


class FakeGroup:
    """A worker group whose state is one file."""

    def __init__(self, world_size: int = 2) -> None:
        self.world_size, self.loaded = world_size, ""

    def save_checkpoint(self, path: str, hdfs: None, step: int, keep: None) -> None:
        Path(path).mkdir(parents=True)
        (Path(path) / "model.pt").write_text(str(step), encoding="utf-8")

    def load_checkpoint(self, path: str) -> None:
        self.loaded = (Path(path) / "model.pt").read_text(encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", info={"kind": "arm"}, config="{}", env={})


def folders(run: Run) -> list[str]:
    return sorted(folder.name for folder in (run.path / "resume").iterdir())


def test_the_newest_checkpoint_is_loaded_with_its_state(run: Run) -> None:
    group = FakeGroup()
    assert checkpoint.load(run, group) is None
    for step in (2, 4, 1000000):
        checkpoint.save(run, group, step, {"tokens": step * 10, "tau": None}, keep=None)
    assert checkpoint.load(run, group) == {"step": 1000000, "world_size": 2, "tokens": 10000000, "tau": None}
    assert group.loaded == "1000000"


def test_numbers_come_back_as_numbers(run: Run) -> None:
    """A median loss that was not finite came back as text, and the next step compared text with a number."""
    state = {"tau": math.nan, "seconds": math.inf, "tokens": 3}
    checkpoint.save(run, FakeGroup(), 2, state, keep=None)
    found = checkpoint.load(run, FakeGroup())
    assert found is not None and math.isnan(found["tau"]) and found["seconds"] == math.inf and found["tokens"] == 3


def test_older_checkpoints_go_after_the_new_one_is_complete(run: Run) -> None:
    for step in (2, 4, 6):
        checkpoint.save(run, FakeGroup(), step, {}, keep=2)
    assert folders(run) == ["step_000004", "step_000006"]
    checkpoint.remove(run)
    assert not (run.path / "resume").exists()


def test_partial_folders_are_not_checkpoints(run: Run) -> None:
    group = FakeGroup()
    checkpoint.save(run, group, 2, {}, keep=2)
    (run.path / "resume" / "step_000008").mkdir()  # without its description
    write_json(run.path / "resume" / ".step_000009.partial" / checkpoint.STATE_FILE, {"step": 9, "world_size": 2})
    (run.path / "resume" / "step_x").mkdir()
    assert checkpoint.load(run, group)["step"] == 2
    assert group.loaded == "2"


def test_a_save_that_dies_leaves_the_previous_checkpoint(run: Run) -> None:
    class Dies(FakeGroup):
        def save_checkpoint(self, path: str, hdfs: None, step: int, keep: None) -> None:
            super().save_checkpoint(path, hdfs, step, keep)
            raise OSError("disk full")

    checkpoint.save(run, FakeGroup(), 2, {}, keep=1)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(run, Dies(), 4, {}, keep=1)
    assert checkpoint.load(run, FakeGroup())["step"] == 2
    checkpoint.save(run, FakeGroup(), 4, {}, keep=1)
    assert folders(run) == ["step_000004"]


def test_a_checkpoint_of_another_world_size_is_refused(run: Run) -> None:
    checkpoint.save(run, FakeGroup(2), 2, {}, keep=2)
    with pytest.raises(RunError, match=r"saved by 2 worker\(s\) and cannot be loaded by 4"):
        checkpoint.load(run, FakeGroup(4))


# progress and environment

ROW = {"loss": 1.0, "nll": 2.0, "weight_mean": 0.5, "grad_norm": 3.0, "tokens_per_s": 100.0}


def test_progress_writes_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    progress = Progress("eaft", total=4, start=2, stream=stream)
    progress.update(3, ROW)
    progress.update(3, ROW)  # within the interval
    progress.update(4, ROW)  # the last step is always told
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split(" loss")[0] for line in lines] == ["eaft step 3/4", "eaft step 4/4"]
    assert "loss 1.000 nll 2.000 weight 0.50 grad 3.00 tok/s 100 eta 0s" in lines[1]


def test_workers_on_a_cpu_get_the_platform_and_their_share_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTHONPATH", "VERL_PLATFORM", "VERL_ENGINE_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    found = worker_environment("cpu", workers=3)
    assert (found["VERL_PLATFORM"], found["VERL_ENGINE_DEVICE"], found["OMP_NUM_THREADS"]) == ("cpu", "cuda", "2")
    assert worker_environment("cpu", workers=64)["OMP_NUM_THREADS"] == "1"
    assert "PYTHONPATH" not in found
    assert not {"VERL_PLATFORM", "VERL_ENGINE_DEVICE", "OMP_NUM_THREADS"} & worker_environment("cuda", 8).keys()


def test_values_already_set_win_and_the_python_path_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    found = worker_environment("cpu", workers=2)
    assert (found["OMP_NUM_THREADS"], found["PYTHONPATH"]) == ("7", "/somewhere")
