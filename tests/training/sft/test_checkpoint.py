"""States of an SFT arm: whole or not there, verified before use; the progress line and the workers' environment."""

import io
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from eaft_verl.cluster.session import worker_environment
from eaft_verl.errors import RunError
from eaft_verl.files import json_text
from eaft_verl.planning.machine import AWAKE, waiting_threads
from eaft_verl.runs import Run
from eaft_verl.training import states
from eaft_verl.training.progress import Progress
from eaft_verl.training.resume import starting_point
from eaft_verl.training.schedule import SaveClock
from eaft_verl.training.sft import checkpoint


class FakeGroup:
    """A worker group whose state is two files, described as the workers describe theirs."""

    def __init__(self, world_size: int = 2, nonfinite: str | None = None) -> None:
        self.world_size, self.nonfinite, self.loaded = world_size, nonfinite, ""

    def save_checkpoint(self, path: str, hdfs: None, step: int, keep: None) -> None:
        folder = Path(path)
        folder.mkdir(parents=True)
        for name in ("a.safetensors", "b.safetensors"):
            (folder / name).write_bytes(f"{name} {step}".encode() * 50)
        files = {file.name: states.describe(file) for file in folder.iterdir()}
        (folder / states.SHARDS).write_text(json.dumps({"files": files, "nonfinite": self.nonfinite}))

    def load_checkpoint(self, path: str) -> None:
        self.loaded = Path(path).name


@pytest.fixture
def run(tmp_path: Path) -> Run:
    info = {"kind": "arm", "status": "failed", "keys": {"model": "m"}, "objective": {"name": "sft"}}
    return Run.create(tmp_path / "run", info=info, config="a: 1", env={})


def save(run: Run, *steps: int, keep: int | None = None, **state: Any) -> None:
    for step in steps:
        assert checkpoint.save(run, FakeGroup(), step, {"step": step, **state}, keep)


def log(run: Run, *steps: int) -> None:
    for step in steps:
        run.log({"split": "train", "step": step, "loss": 1.0})


def folders(run: Run) -> list[str]:
    return sorted(folder.name for folder in (run.path / "resume").iterdir())


def test_the_newest_state_is_restored(run: Run) -> None:
    assert states.newest_sound(run, strict=False) is None
    save(run, 2, 4, 1000000, tokens=10, tau=None)
    found = states.newest_sound(run, strict=True)
    assert found and found.step == 1000000 == checkpoint.newest(run)
    group = FakeGroup(world_size=3)  # any number of workers may load what two have saved
    assert checkpoint.restore(found, group, {"name": "sft"}) == {"step": 1000000, "tokens": 10, "tau": None}
    assert group.loaded == "step_1000000"


def test_the_manifest_says_what_was_saved(run: Run) -> None:
    save(run, 4, epoch=0.5, samples=16)
    manifest = json.loads((run.path / "resume" / "step_000004" / "manifest.json").read_text())
    assert manifest["step"] == manifest["number"] == 4 and manifest["world_size"] == 2
    assert manifest["state"] == {"step": 4, "epoch": 0.5, "samples": 16}
    assert manifest["keys"] == {"model": "m"} and manifest["objective"] == {"name": "sft"}
    assert manifest["versions"]["verl"] == "0.9.1" and len(manifest["config"]) == 16
    assert sorted(manifest["files"]) == ["a.safetensors", "b.safetensors", "shards.json"]
    assert manifest["files"]["a.safetensors"]["bytes"] == len(b"a.safetensors 4") * 50


def test_numbers_come_back_as_numbers(run: Run) -> None:
    """A median loss that was not finite came back as text, and the next step compared text with a number."""
    save(run, 2, tau=math.nan, seconds=math.inf, tokens=3)
    found = states.newest_sound(run, strict=True)
    assert found and math.isnan(found.manifest["state"]["tau"])
    assert found.manifest["state"]["seconds"] == math.inf and found.manifest["state"]["tokens"] == 3


@pytest.mark.parametrize(("keep", "left"), [(1, [4, 6]), (2, [4, 6]), (3, [2, 4, 6]), (None, [1, 2, 4, 6])])
def test_retention_reads_the_disk_and_never_goes_below_two(run: Run, keep: int | None, left: list[int]) -> None:
    save(run, 1, 2, 4)  # by an earlier attempt that kept all
    save(run, 6, keep=keep)
    assert folders(run) == [f"step_{step:06d}" for step in left]
    states.remove(run.path)
    assert not (run.path / "resume").exists()


def test_a_value_that_is_not_finite_is_not_saved(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    save(run, 2)
    assert not checkpoint.save(run, FakeGroup(nonfinite="model.head.weight"), 4, {}, 2)
    assert "step 4 is not saved: model.head.weight is not finite" in capsys.readouterr().err
    assert folders(run) == ["step_000002"]


def test_workers_that_write_elsewhere_are_found_out(run: Run) -> None:
    class Elsewhere(FakeGroup):
        def save_checkpoint(self, path: str, hdfs: None, step: int, keep: None) -> None:
            super().save_checkpoint(path, hdfs, step, keep)
            (Path(path) / "b.safetensors").unlink()  # it is on another node's disk

    with pytest.raises(RunError, match=r"b.safetensors: a worker wrote 750 bytes .* all nodes share"):
        checkpoint.save(run, Elsewhere(), 2, {}, 2)
    assert folders(run) == []


class SlowGroup(FakeGroup):
    """Workers that have begun to write when they return, and are done when somebody waits for it."""

    fails = ""

    def save_checkpoint(self, path: str, hdfs: None, step: int, keep: None) -> None:
        Path(path).mkdir(parents=True)
        (Path(path) / "a.safetensors").write_bytes(b"half")
        self.begun = Path(path), step

    def save_finished(self, wait: bool) -> list[bool]:
        if wait and self.fails:
            raise OSError(self.fails)
        if wait:
            path, step = self.begun
            shutil.rmtree(path)
            super().save_checkpoint(str(path), None, step, None)
        return [True, wait]


def test_in_the_background_the_manifest_comes_after_the_last_byte(run: Run) -> None:
    save(run, 2)
    saver, state = checkpoint.Saver(run, SlowGroup(), 2, background=True), {"step": 4, "seen": [1]}
    saver.save(4, state)
    state["seen"].append(2)  # training goes on
    for _ in range(2):
        saver.settle(wait=False)
        assert checkpoint.newest(run) == 2, "what is being written does not count"
    assert folders(run) == [".step_000004.partial", "step_000002"]
    saver.save(6, {"step": 6})  # waits for the one before
    found = states.newest_sound(run, strict=True)
    assert found and found.step == 4 and found.manifest["state"] == {"step": 4, "seen": [1]}
    assert folders(run) == ["step_000002", "step_000004"], "what a dead process has begun is gone"


def test_a_failure_in_the_background_is_raised_and_gives_its_room_back(run: Run) -> None:
    save(run, 2)
    group = SlowGroup()
    group.fails = "no space left"
    saver = checkpoint.Saver(run, group, 2, background=True)
    saver.save(4, {"step": 4})
    with pytest.raises(OSError, match="no space left"):
        saver.settle(wait=True)
    assert folders(run) == ["step_000002"]


# a crash after each write


class Crash(BaseException):
    """The end of the process."""


def _writes(monkeypatch: pytest.MonkeyPatch, allowed: int) -> Iterator[None]:
    """Let `allowed` of the calls that change the disk through, then crash before the next one and every later one."""
    left = allowed

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash
            return call(*args, **kwargs)

        return wrapped

    for module, name in (
        (os, "replace"),
        (os, "fsync"),
        (shutil, "rmtree"),
        (Path, "write_bytes"),
        (Path, "write_text"),
    ):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    yield
    monkeypatch.undo()


def test_after_a_crash_at_any_write_the_newest_whole_state_loads(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, point, finished = run.path.parent / "kept", 0, False
    save(run, 2, 4)
    shutil.copytree(run.path / "resume", kept)
    found: list[int] = []
    while not finished:
        shutil.rmtree(run.path / "resume")
        shutil.copytree(kept, run.path / "resume")
        with pytest.MonkeyPatch.context() as patched:
            crashing = _writes(patched, point)
            next(crashing)
            try:
                checkpoint.save(run, FakeGroup(), 6, {"step": 6}, 2)
                finished = True
            except Crash:
                pass
        saved = states.newest_sound(run, strict=True)  # none is damaged: what is cut off has another name
        assert saved is not None and states.problem(saved.folder) == ""
        found.append(saved.step)
        point += 1
    assert found == sorted(found) and set(found) == {4, 6} and len(found) > 10


# damage


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _edit(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text()) | changes
        manifest = {name: value for name, value in manifest.items() if value is not ... and name != "digest"}
        manifest["digest"] = xxhash.xxh3_128_hexdigest(json_text(manifest, exact=True).encode())
        path.write_text(json.dumps(manifest))

    return edit


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bit": (lambda at: _flip(at / "a.safetensors"), "a.safetensors is not as it was written"),
    "cut": (lambda at: os.truncate(at / "b.safetensors", 9), "b.safetensors is not as it was written: {'bytes': 9"),
    "empty": (lambda at: (at / "a.safetensors").write_bytes(b""), "a.safetensors is not as it was written"),
    "gone": (lambda at: (at / "a.safetensors").unlink(), "a.safetensors is missing"),
    "grown": (lambda at: (at / "b.safetensors").open("ab").write(b"x"), "b.safetensors is not as it was written"),
    "swapped": (
        lambda at: shutil.copy(at.with_name("step_000002") / "a.safetensors", at / "a.safetensors"),
        "a.safetensors is not as it was written",
    ),
    "foreign": (lambda at: (at / "c.safetensors").write_bytes(b"x"), "c.safetensors was not there when it was saved"),
    "no manifest": (lambda at: (at / "manifest.json").unlink(), "manifest.json is missing"),
    "empty manifest": (lambda at: (at / "manifest.json").write_text(""), "manifest.json cannot be read"),
    "binary manifest": (lambda at: (at / "manifest.json").write_bytes(b"\xff\xfe\x00"), "manifest.json cannot be read"),
    "list": (lambda at: (at / "manifest.json").write_text("[]"), "manifest.json lacks 'step'"),
    "no keys": (_edit(world_size=...), "manifest.json lacks 'world_size'"),
    "text for a number": (_edit(step="4"), "manifest.json lacks 'step', or holds no int there"),
    "no files": (_edit(files={}), "a.safetensors was not there when it was saved"),
    "a number of the manifest": (
        lambda at: (at / "manifest.json").write_text(
            (at / "manifest.json").read_text().replace('"tokens": 7', '"tokens": 8')
        ),
        "manifest.json is not as it was written",
    ),
    "another step": (_edit(number=2), "manifest.json is that of step 2"),
    "another run": (_edit(keys={"model": "other"}), "manifest.json names another model"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_older_state_is_taken(run: Run, capsys: pytest.CaptureFixture[str], name: str) -> None:
    damage, said = DAMAGE[name]
    save(run, 2, 4, tokens=7)
    damage(run.path / "resume" / "step_000004")
    with pytest.raises(RunError) as refused:
        states.newest_sound(run, strict=True)
    assert said in str(refused.value) and "resume=strict" in str(refused.value)
    found = states.newest_sound(run, strict=False)
    assert found is not None and found.step == 2
    told = capsys.readouterr().err
    assert said in told and "step_000004" in told
    assert folders(run) == ["step_000002", "step_000004.damaged"], "it counts no more, and is not deleted"


def test_random_damage_is_never_taken_for_a_state(run: Run) -> None:
    """200 random changes of a random file: bits, length, name, content of the other state."""
    save(run, 2, 4)
    folder, draw = run.path / "resume" / "step_000004", random.Random(0)
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}
    for _ in range(200):
        name = draw.choice(sorted(kept))
        data = bytearray(kept[name])
        match draw.randrange(4):
            case 0:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            case 1:
                del data[draw.randrange(len(data)) :]
            case 2:
                data += draw.randbytes(draw.randint(1, 40))
            case 3:
                data = bytearray((folder.with_name("step_000002") / name).read_bytes())
        (folder / name).write_bytes(data)
        assert states.problem(folder) or bytes(data) == kept[name], name
        (folder / name).write_bytes(kept[name])
    assert states.problem(folder) == ""


def test_a_pickle_in_a_state_is_not_read(run: Run) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {run.path}/ran",)

    save(run, 2, 4)
    for name in ("a.safetensors", ".metadata", "manifest.json"):
        (run.path / "resume" / "step_000004" / name).write_bytes(pickle.dumps(Bomb()))
    found = states.newest_sound(run, strict=False)
    assert found is not None and found.step == 2 and not (run.path / "ran").exists()


# where an arm begins


def test_a_new_run_begins_at_step_one(run: Run) -> None:
    assert starting_point(run, "fallback") is None and starting_point(run, "strict") is None


def test_rows_without_a_state_are_not_thrown_away(run: Run) -> None:
    log(run, 1, 2, 3)
    states.retain(run.path, 2)  # there was one
    for mode in ("fallback", "strict", "changed"):
        with pytest.raises(RunError, match=r"has reached step 3 and no state is left .* add resume=restart"):
            starting_point(run, mode)
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]


def test_what_ended_before_its_first_state_begins_anew_and_keeps_its_rows(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    log(run, 1, 2, 3)
    with pytest.raises(RunError, match="has reached step 3"):
        starting_point(run, "strict")
    assert starting_point(run, "fallback") is None and not run.metrics()
    said = capsys.readouterr().err
    assert "it ended at step 3, before its first state was saved: begins at step 1; what was there is in" in said
    kept = (run.path / "before_restart_1" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept] == [1, 2, 3]
    log(run, 1)
    (run.path / "resume" / ".step_000001.partial").mkdir(parents=True)  # cut off while it was written
    assert starting_point(run, "fallback") is None
    log(run, 1)
    (run.path / "resume" / "step_000001.damaged").mkdir(parents=True)
    (run.path / "resume" / "step_000001.damaged" / "manifest.json").touch()
    with pytest.raises(RunError, match="has reached step 1 .* are damaged"):
        starting_point(run, "fallback")


def test_an_export_without_a_state_is_not_thrown_away(run: Run) -> None:
    states.remove(run.path)  # as at the end of a run, which may have been too short for a state
    export = run.path / "checkpoints" / "step_000008"
    export.mkdir(parents=True)
    (export / "config.json").touch()
    with pytest.raises(RunError, match="has reached step 8"):
        starting_point(run, "fallback")
    assert starting_point(run, "restart") is None
    assert not run.checkpoints() and (run.path / "before_restart_1" / "checkpoints" / "step_000008").exists()
    assert run.info["restarts"] == ["before_restart_1"]


def test_restart_is_of_no_effect_where_a_state_is_left(run: Run) -> None:
    """Told once and left in the command of a job that is queued again, it must not begin again every time."""
    log(run, 1, 2, 3)
    save(run, 2)
    found = starting_point(run, "restart")
    assert found is not None and found.step == 2 and len(run.metrics()) == 3


def test_all_states_damaged_is_said_with_their_names(run: Run) -> None:
    log(run, 1, 2)
    save(run, 2)
    _flip(run.path / "resume" / "step_000002" / "a.safetensors")
    with pytest.raises(RunError, match=r"reached step 2 .* those in resume/ are damaged \(step_000002.damaged\)"):
        starting_point(run, "fallback")


@pytest.mark.parametrize(
    ("lines", "damaged", "lost"),
    [
        ([1, 2, 3, 4], [], ""),
        ([1, "{", 3, 4], [2], "lacks 1 of the steps up to 4 (from step 2)"),
        ([1, "\ufffd[]", 3, 4], [2], "lacks 1 of"),
        ([1, '{"split": "train"}', 3, 4], [2], "lacks 1 of"),
        ([1, 2], [], "lacks 2 of the steps up to 4 (from step 3)"),
        ([], [], "lacks 4 of the steps up to 4 (from step 1)"),
    ],
)
def test_what_is_lost_of_the_metrics_is_said_and_noted(
    run: Run, capsys: pytest.CaptureFixture[str], lines: list[int | str], damaged: list[int], lost: str
) -> None:
    save(run, 4)
    path = run.path / "metrics.jsonl"
    for line in lines:
        row = line if isinstance(line, str) else json.dumps({"split": "train", "step": line})
        with path.open("ab") as stream:
            stream.write(row.replace("\ufffd", "").encode() + (b"\xff\n" if "\ufffd" in row else b"\n"))
    found = starting_point(run, "fallback")
    assert found is not None and found.step == 4
    said, noted = capsys.readouterr().err, run.info.get("lost_metrics", [])
    assert lost in said and len(noted) == bool(damaged) + bool(lost) and (not lost or lost in noted[-1])
    assert [row["step"] for row in run.metrics()] == [line for line in lines if isinstance(line, int)]
    assert path.with_name("metrics.jsonl.damaged").exists() == bool(damaged)


def test_a_state_is_due_before_it_would_be_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    clock = SaveClock(minutes=15)
    for at, step_s, due in ((1800.0, 60.0, False), (1840.0, 60.0, True), (1000.0, 900.0, True), (1899.0, 0.5, False)):
        now = at
        assert clock.due(step_s) == due
    now = 1900.0
    clock.restart()
    assert not clock.due(60.0)


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
    waiting = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    for name in ("OMP_NUM_THREADS", *waiting, "PYTHONPATH", "VERL_PLATFORM", "VERL_ENGINE_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("eaft_verl.cluster.session.cpus_here", lambda: 8)
    for bound, waits in ((4, AWAKE), (64, "0")):  # the second one's container has a quota
        monkeypatch.setattr("eaft_verl.planning.machine.cpus_here", lambda: 4)
        monkeypatch.setattr("eaft_verl.planning.machine._bound", lambda bound=bound: bound)
        assert waiting_threads() == {"GOMP_SPINCOUNT": waits}
    monkeypatch.setattr("eaft_verl.planning.machine._bound", lambda: 4)
    found = worker_environment("cpu", workers=3)
    assert (found["VERL_PLATFORM"], found["VERL_ENGINE_DEVICE"], found["OMP_NUM_THREADS"]) == ("cpu", "cuda", "2")
    assert worker_environment("cpu", workers=64)["OMP_NUM_THREADS"] == "1"
    assert "PYTHONPATH" not in found and found["GOMP_SPINCOUNT"] == AWAKE
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    chosen = worker_environment("cpu", workers=3)
    assert chosen["OMP_WAIT_POLICY"] == "passive" and "GOMP_SPINCOUNT" not in chosen
    assert not {"VERL_PLATFORM", "VERL_ENGINE_DEVICE", "OMP_NUM_THREADS"} & worker_environment("cuda", 8).keys()


def test_values_already_set_win_and_the_python_path_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    found = worker_environment("cpu", workers=2)
    assert (found["OMP_NUM_THREADS"], found["PYTHONPATH"]) == ("7", "/somewhere")
