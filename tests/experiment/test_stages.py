"""An evaluation beside the next training: what overlaps, what is said, how failures and signals end both. No Ray."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from eaft_verl.errors import LOST, Interrupted
from eaft_verl.experiment import compare, stages
from eaft_verl.experiment.stages import Stage
from eaft_verl.planning.arm_plan import ArmPlan
from eaft_verl.planning.machine import AWAKE, FREED_IS_KEPT

# argv: the log of events, label, run directory, field and value that say it is done, an event to wait for, seconds
# after it, exit code
WORK = """
import json, os, pathlib, signal, sys, time
log, label, run, field, value, event, seconds, code = sys.argv[1:]
def say(what):
    with open(log, "a") as events: events.write(f"{what} {label}\\n")
    with open(log + ".times", "a") as times: times.write(f"{time.time()}\\n")
def told(number, frame):
    say("told")
    sys.exit(75 if "train" in label else 128 + number)
signal.signal(signal.SIGTERM, told); signal.signal(signal.SIGINT, told)
print("said by", label, flush=True)
say("begin")
latest = time.time() + 60
while event not in pathlib.Path(log).read_text().splitlines() + [""]:
    if time.time() > latest: sys.exit(f"{event} did not happen")
    time.sleep(0.01)
end = time.time() + float(seconds)
while time.time() < end: time.sleep(0.01)
if code == "0":
    pathlib.Path(run).mkdir(exist_ok=True)
    file = pathlib.Path(run, "run.json")
    info = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({"status": "finished", **info, field: json.loads(value)}))
elif os.environ.get("EAFT_CAUSE_FILE"):
    pathlib.Path(os.environ["EAFT_CAUSE_FILE"]).write_text(f"cause of {label}")
say("end")
sys.exit(int(code))
"""


class World:
    """Stages that are small processes: each lasts until the event that a test wants, and some seconds more."""

    def __init__(self, folder: Path, arms: str = "a b c") -> None:
        self.folder, self.log = folder, folder / "events"
        self.until: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.codes: dict[str, int] = {}
        self.base = Stage("base: evaluate", folder / "base", ("evaluated", True), ["evaluate"])
        self.configs: list[Any] = [SimpleNamespace(arm=arm, seed=0) for arm in arms.split()]
        self.stages = [
            (
                Stage(f"{arm}: train", folder / arm, ("status", "finished"), ["train"]),
                Stage(f"{arm}: evaluate", folder / arm, ("evaluated", True), ["evaluate"]),
            )
            for arm in arms.split()
        ]

    def command(self, stage: Stage) -> list[str]:
        field, value = stage.done_when
        self.log.touch()
        words = [str(self.log), stage.label, str(stage.run), field, json.dumps(value), self.until.get(stage.label, "")]
        numbers = [str(self.seconds.get(stage.label, 0.3)), str(self.codes.get(stage.label, 0))]
        return [sys.executable, "-c", WORK, *words, *numbers]

    def run(self, *, alone: bool = False) -> dict[str, str] | None:
        return compare._run_arms(self.base, self.configs, self.stages, 0, alone=alone)

    @property
    def events(self) -> list[str]:
        return self.log.read_text().splitlines()

    def when(self, event: str) -> float:
        return float(Path(f"{self.log}.times").read_text().split()[self.events.index(event)])

    def beside(self, arm: str) -> Any:
        return json.loads((self.folder / arm / "run.json").read_text()).get("beside")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    monkeypatch.setattr(stages, "_command", made.command)
    monkeypatch.setattr(compare, "fits_beside", lambda config: True)
    monkeypatch.setattr(compare, "_not_now", lambda config, training, failed: None)
    return made


def send_when(world: World, condition: str, number: int) -> subprocess.Popen[bytes]:
    """A process that sends this one the signal half a second after the condition holds of the `events`."""
    code = f"""
import os, pathlib, time
log, events = pathlib.Path({str(world.log)!r}), ""
while not ({condition}):
    time.sleep(0.01)
    events = log.read_text() if log.exists() else ""
time.sleep(0.5)
os.kill({os.getpid()}, {int(number)})
"""
    return subprocess.Popen([sys.executable, "-c", code])


def most_at_once(events: list[str], kind: str) -> int:
    """The largest number of stages of a kind that had begun and not ended."""
    going, most = 0, 0
    for event in events:
        if event.endswith(kind):
            going += 1 if event.startswith("begin") else -1
            most = max(most, going)
    return most


# at the end of the last training all evaluations are still to be made, and each lasts until the next one begins
BUSY = {f"{one}: evaluate": f"begin {other}: evaluate" for one, other in (("base", "a"), ("a", "b"), ("b", "c"))}


def test_evaluations_go_on_beside_the_trainings(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.until = {
        "base: evaluate": "begin b: train",
        "b: train": "end base: evaluate",
        "a: evaluate": "begin c: train",
        "c: train": "end b: evaluate",
    }
    world.seconds = {"b: train": 5.0, "c: train": 1.0}
    begun = time.time()
    assert world.run() == {}
    events = world.events
    assert [event for event in events if event.startswith("begin") and "evaluate" in event] == [
        f"begin {name}: evaluate" for name in ("base", "a", "b", "c")
    ]
    assert most_at_once(events, "evaluate") == most_at_once(events, "train") == 1
    assert world.beside("a") == ["base: evaluate"] and world.beside("b")[0] == "base: evaluate"
    assert world.beside("c")[-2:] == ["a: evaluate", "b: evaluate"]
    said = capsys.readouterr().out
    took = {line.split("]")[0]: int(line.split()[-2]) for line in said.splitlines() if "] done, " in line}
    assert took["[base: evaluate"] < world.when("end b: train") - begun - 1  # before which nobody tells of it
    assert said.count("goes on beside other stages") == 3  # nothing is left that the last one could go on beside
    assert "[a: evaluate]\nsaid by a: evaluate\n[a: evaluate] done, " in said


def test_evaluations_are_looked_after_while_a_training_waits_for_its_restart(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eaft_verl.experiment.supervision.FIRST_PAUSE_S", 6.0)
    world.configs, world.stages = world.configs[:1], world.stages[:1]
    world.until = {"base: evaluate": "end a: train"}
    world.codes = {"a: train": LOST}
    begun = time.time()
    assert compare._run_arms(world.base, world.configs, world.stages, 1, alone=False) == {"a": "cause of a: train"}
    assert world.events.count("begin a: train") == 2
    again = float(Path(f"{world.log}.times").read_text().split()[-2]) - begun
    said = capsys.readouterr().out
    assert int(said.split("[base: evaluate] done, ")[1].split()[0]) < again - 2  # not when the pause was over


def test_a_training_that_leaves_no_room_waits_for_the_evaluations(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "fits_beside", lambda config: config.arm != "c")
    world.seconds = dict.fromkeys(("base: evaluate", "a: evaluate", "b: evaluate"), 1.0)
    assert world.run() == {}
    assert world.events.index("end b: evaluate") < world.events.index("begin c: train")
    assert world.beside("c") is None


def test_the_last_evaluations_go_on_two_at_a_time(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.until = BUSY
    assert world.run() == {}
    last = world.events.index("end c: train")
    assert most_at_once(world.events[:last], "evaluate") == 1 and most_at_once(world.events, "evaluate") == 2
    assert sum(event.startswith("end") and "evaluate" in event for event in world.events) == 4
    assert capsys.readouterr().out.count("] done, ") == 7


def test_the_last_one_has_all_cores_where_the_one_before_it_ends_soon(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.Lane, "free_soon", property(lambda lane: not lane.waiting))
    world.until = {"c: train": "begin b: evaluate", "b: evaluate": "end c: train"}
    world.seconds = {"b: evaluate": 1.0}
    assert world.run() == {}
    assert world.events[-3:] == ["end b: evaluate", "begin c: evaluate", "end c: evaluate"]


@pytest.mark.parametrize(
    ("passed", "waiting", "soon"),
    [
        ([], 0, True),
        ([60.0], 0, False),
        ([70.0], 0, True),
        ([70.0, 60.0], 0, False),
        ([70.0], 1, False),
        ([201.0], 0, False),
    ],
)  # the last one took 100 s; what takes twice as long may take any time
def test_one_ends_soon_when_two_thirds_of_what_the_last_one_took_are_over(
    world: World, monkeypatch: pytest.MonkeyPatch, passed: list[float], waiting: int, soon: bool
) -> None:
    monkeypatch.setattr(stages, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    lane = stages.Lane(world.base)
    lane.usual_s = 100.0
    lane.going = [SimpleNamespace(started=1000.0 - seconds) for seconds in passed]  # type: ignore[misc]
    lane.waiting.extend([world.base] * waiting)
    assert lane.free_soon is soon


def test_threads_of_stages_that_share_the_cores(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation beside others has half of the cores; nothing beside another waits awake; who is alone does."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", AWAKE)
    monkeypatch.setattr(stages, "cpus_here", lambda: 6)
    given: dict[str, tuple[Any, Any]] = {}
    popen = subprocess.Popen

    def noted(command: list[str], *, env: dict[str, str], **rest: Any) -> Any:
        given[command[4]] = env.get("OMP_NUM_THREADS"), env["GOMP_SPINCOUNT"]
        return popen(command, env=env, **rest)

    monkeypatch.setattr("eaft_verl.experiment.processes.subprocess.Popen", noted)
    world.until = BUSY
    assert world.run() == {}
    world.until = {}
    assert {given[f"{name}: evaluate"] for name in ("base", "a", "b", "c")} == {("3", "0")}
    assert given["b: train"] == (None, "0")
    assert world.run(alone=True) == {}
    shutil.rmtree(world.folder / "c")
    assert world.run() == {}
    assert given["c: train"] == given["c: evaluate"] == (None, AWAKE)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert stages._half() == {"OMP_NUM_THREADS": "5"}


def test_an_evaluation_has_the_memory_settings_of_its_stage(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    given = stages._environ(replace(world.base, environ=FREED_IS_KEPT), tmp_path)
    assert given["MALLOC_ARENA_MAX"] == "3" and given["MALLOC_MMAP_MAX_"] == "0"
    assert given["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert not FREED_IS_KEPT.keys() & stages._environ(world.base, tmp_path).keys()


@pytest.mark.parametrize(
    ("updates", "step_s", "fits"), [(100, 10.0, True), (100, 30.0, False), (None, 1.0, False), (1, 2400.0, True)]
)
def test_only_a_short_training_shares_the_cores(
    monkeypatch: pytest.MonkeyPatch, updates: int | None, step_s: float, fits: bool
) -> None:
    planned = ArmPlan(
        SimpleNamespace(updates=updates), "head", {}, {"all": 1.0}, {}, {"arithmetic": step_s}, 0.0, "fits"
    )  # type: ignore[arg-type]
    monkeypatch.setattr("eaft_verl.planning.arm_plan.plan_arm", lambda config, machine: planned)
    monkeypatch.setattr(stages, "machine_of", lambda config, gpus, node: None)
    monkeypatch.setattr(stages, "cpus_here", lambda: 2)
    shared = {"evaluate": SimpleNamespace(backend="hf"), "compare": SimpleNamespace(match="updates")}
    config: Any = SimpleNamespace(device="cpu", **shared)
    assert stages.fits_beside(config) is fits


def test_alone_one_after_the_other(world: World) -> None:
    assert world.run(alone=True) == {}
    assert [event.split(" ", 1)[0] for event in world.events] == ["begin", "end"] * 7
    assert [world.beside(arm) for arm in "abc"] == [None] * 3


def test_what_is_done_is_not_done_again(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.run() == {}
    before = world.events
    assert world.run() == {} and world.events == before
    assert capsys.readouterr().out.count("done already") == 7


def test_a_failed_evaluation_is_its_arms(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.codes = {"a: evaluate": 1}
    assert world.run() == {"a": "cause of a: evaluate"}
    assert "end c: evaluate" in world.events and "[a: evaluate] failed with exit code 1, " in capsys.readouterr().out


def test_a_failed_training_is_not_evaluated(world: World) -> None:
    world.codes = {"b: train": 6}
    failed = world.run()
    assert failed == {"b": "cause of b: train"}
    assert "begin b: evaluate" not in world.events and "end c: evaluate" in world.events


def test_what_went_on_beside_a_failed_attempt_is_kept(world: World) -> None:
    """Its seconds are part of the run's: the report must know of it, whatever goes on beside the next attempt."""
    world.codes, world.until = {"a: train": 6}, {"base: evaluate": "begin b: train"}
    (world.folder / "a").mkdir()
    (world.folder / "a" / "run.json").write_text(json.dumps({"status": "failed"}))
    world.run()
    assert world.beside("a") == ["base: evaluate"]
    world.codes = {}
    (world.folder / "a" / "run.json").write_text(json.dumps({"beside": world.beside("a"), "evaluated": False}))
    assert world.run(alone=True) == {}
    assert world.beside("a") == ["base: evaluate"] and world.beside("b") == ["base: evaluate"]


def test_where_the_base_fails_the_first_training_is_told_and_nothing_else_starts(world: World) -> None:
    world.codes, world.seconds = {"base: evaluate": 1}, {"a: train": 60.0}
    world.until = {"base: evaluate": "begin a: train"}
    begun = time.monotonic()
    assert world.run() is None
    assert time.monotonic() - begun < 30
    assert sorted(world.events) == ["begin a: train", "begin base: evaluate", "end base: evaluate", "told a: train"]


def test_a_base_that_fails_late_still_ends_it(world: World, tmp_path: Path) -> None:
    later = World(tmp_path, "a b")
    world.configs, world.stages = later.configs, later.stages
    world.codes, world.seconds = {"base: evaluate": 1}, {"b: train": 30.0}
    world.until = {"base: evaluate": "begin b: train"}
    assert world.run() is None
    assert not [event for event in world.events if event in ("begin b: evaluate", "begin a: evaluate")]


def test_a_signal_reaches_both_and_nothing_is_left(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.seconds = dict.fromkeys(("base: evaluate", "a: train"), 60.0)
    child = send_when(world, 'events.count("begin") == 2', signal.SIGTERM)
    with pytest.raises(Interrupted) as told:
        world.run()
    child.wait()
    assert told.value.code == 75
    assert sorted(world.events)[2:] == ["told a: train", "told base: evaluate"]
    assert not [one for one in psutil.Process().children() if "base: evaluate" in " ".join(one.cmdline())]
    assert "said by base: evaluate" in capsys.readouterr().out  # what it had said is not lost


def test_a_signal_while_only_the_evaluation_goes_on(world: World) -> None:
    world.configs, world.stages = world.configs[:1], world.stages[:1]
    world.seconds = {"base: evaluate": 60.0, "a: train": 0.1}
    child = send_when(world, '"end a: evaluate" in events', signal.SIGINT)
    with pytest.raises(Interrupted) as told:
        world.run()
    child.wait()
    assert told.value.code == 130 and world.events[-1] == "told base: evaluate"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_last_two_evaluations_once_each(world: World, number: int) -> None:
    world.until = BUSY
    world.seconds = {"b: evaluate": 60.0, "c: evaluate": 60.0}
    child = send_when(world, '"begin c: evaluate" in events', number)
    with pytest.raises(Interrupted):
        world.run()
    child.wait()
    assert sorted(event for event in world.events if event.startswith("told")) == [
        "told b: evaluate",
        "told c: evaluate",
    ]
    assert not [one for one in psutil.Process().children() if "evaluate" in " ".join(one.cmdline())]


def test_where_the_base_fails_after_the_training_the_other_evaluation_is_told(world: World) -> None:
    world.configs, world.stages = world.configs[:1], world.stages[:1]
    world.codes, world.seconds = {"base: evaluate": 1}, {"a: evaluate": 60.0}
    world.until = {"base: evaluate": "begin a: evaluate"}
    begun = time.monotonic()
    assert world.run() is None
    assert time.monotonic() - begun < 30 and world.events[-1] == "told a: evaluate"


def test_what_went_on_beside_an_attempt_that_was_told_to_stop_is_kept(world: World) -> None:
    world.seconds = dict.fromkeys(("base: evaluate", "a: train"), 60.0)
    (world.folder / "a").mkdir()
    (world.folder / "a" / "run.json").write_text(json.dumps({"status": "running"}))
    child = send_when(world, 'events.count("begin") == 2', signal.SIGTERM)
    with pytest.raises(Interrupted):
        world.run()
    child.wait()
    assert world.beside("a") == ["base: evaluate"]


def test_what_went_on_beside_an_attempt_whose_command_was_killed_is_kept(world: World) -> None:
    """Killed with -9 in the middle of the first training; the next call has all cores to itself."""
    world.seconds = dict.fromkeys(("base: evaluate", "a: train"), 60.0)
    (world.folder / "a").mkdir()
    (world.folder / "a" / "run.json").write_text(json.dumps({"status": "running"}))
    if not (killed := os.fork()):
        world.run()
        os._exit(0)
    send_when(world, 'events.count("begin") == 2', 0).wait()
    for process in psutil.Process(killed).children():
        process.kill()
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    world.seconds = {}
    assert world.run(alone=True) == {}
    assert world.beside("a") == ["base: evaluate"] and world.beside("b") is None
    assert not [path for path in world.folder.iterdir() if "beside" in path.name]
