"""An evaluation beside the next training: what overlaps, what is said, how failures and signals end both. No Ray."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from eaft_verl.errors import Interrupted
from eaft_verl.experiment import compare, stages
from eaft_verl.experiment.stages import Stage

# argv: the log of events, label, run directory, field and value that say it is done, seconds, exit code
WORK = """
import json, os, pathlib, signal, sys, time
log, label, run, field, value, seconds, code = sys.argv[1:]
def say(what):
    with open(log, "a") as events: events.write(f"{what} {label}\\n")
def told(number, frame):
    say("told")
    sys.exit(75 if "train" in label else 128 + number)
signal.signal(signal.SIGTERM, told); signal.signal(signal.SIGINT, told)
say("begin")
print("said by", label, flush=True)
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
    """Stages that are small processes, with the seconds and codes that a test wants."""

    def __init__(self, folder: Path, arms: str = "a b c") -> None:
        self.folder, self.log = folder, folder / "events"
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
        words = [str(self.log), stage.label, str(stage.run), field, json.dumps(value)]
        numbers = [str(self.seconds.get(stage.label, 0.3)), str(self.codes.get(stage.label, 0))]
        return [sys.executable, "-c", WORK, *words, *numbers]

    def run(self, *, alone: bool = False) -> dict[str, str] | None:
        return compare._run_arms(self.base, self.configs, self.stages, 0, alone=alone)

    @property
    def events(self) -> list[str]:
        return self.log.read_text().splitlines()

    def beside(self, arm: str) -> Any:
        return json.loads((self.folder / arm / "run.json").read_text()).get("beside")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    monkeypatch.setattr(stages, "_command", made.command)
    monkeypatch.setattr(compare, "fits_beside", lambda config: True)
    monkeypatch.setattr(compare, "_not_now", lambda config, training, failed: None)
    return made


def most_at_once(events: list[str], kind: str) -> int:
    """The largest number of stages of a kind that had begun and not ended."""
    going, most = 0, 0
    for event in events:
        if event.endswith(kind):
            going += 1 if event.startswith("begin") else -1
            most = max(most, going)
    return most


def test_evaluations_go_on_beside_the_trainings(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.seconds = {"base: evaluate": 2.0, "a: train": 0.2, "c: train": 3.0}
    assert world.run() == {}
    events = world.events
    assert events.index("begin b: train") < events.index("end base: evaluate")  # no training waits for an evaluation
    assert events.index("end b: evaluate") < events.index("end c: train")
    begun = [event for event in events if event.startswith("begin") and "evaluate" in event]
    assert begun == [f"begin {name}: evaluate" for name in ("base", "a", "b", "c")]
    assert most_at_once(events, "evaluate") == most_at_once(events, "train") == 1
    assert world.beside("a") == ["base: evaluate"] and world.beside("b")[0] == "base: evaluate"
    assert world.beside("c")[-2:] == ["a: evaluate", "b: evaluate"]
    said = capsys.readouterr().out
    took = {line.split("]")[0]: int(line.split()[-2]) for line in said.splitlines() if "] done, " in line}
    assert took["[base: evaluate"] in (2, 3) and took["[b: evaluate"] < 2  # its own seconds, whenever it was told of
    assert said.count("goes on beside the trainings") == 3  # nothing is left that the last one could go on beside
    assert "[a: evaluate]\nsaid by a: evaluate\n[a: evaluate] done, " in said


def test_a_training_that_leaves_no_room_waits_for_the_evaluations(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "fits_beside", lambda config: config.arm != "c")
    world.seconds = dict.fromkeys(("base: evaluate", "a: evaluate", "b: evaluate"), 1.0)
    assert world.run() == {}
    assert world.events.index("end b: evaluate") < world.events.index("begin c: train")
    assert world.beside("c") is None


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
    world.codes, world.seconds = {"a: train": 6}, {"base: evaluate": 1.0}
    (world.folder / "a").mkdir()
    (world.folder / "a" / "run.json").write_text(json.dumps({"status": "failed"}))
    world.run()
    assert world.beside("a") == ["base: evaluate"]
    world.codes = {}
    (world.folder / "a" / "run.json").write_text(json.dumps({"beside": world.beside("a"), "evaluated": False}))
    assert world.run(alone=True) == {}
    assert world.beside("a") == ["base: evaluate"] and world.beside("b") == ["base: evaluate"]


def test_where_the_base_fails_the_first_training_is_told_and_nothing_else_starts(world: World) -> None:
    world.codes, world.seconds = {"base: evaluate": 1}, {"a: train": 30.0}
    begun = time.monotonic()
    assert world.run() is None
    assert time.monotonic() - begun < 10
    assert sorted(world.events) == ["begin a: train", "begin base: evaluate", "end base: evaluate", "told a: train"]


@pytest.mark.parametrize("arms", ["a", "a b"])
def test_a_base_that_fails_late_still_ends_it(world: World, tmp_path: Path, arms: str) -> None:
    later = World(tmp_path, arms)
    world.configs, world.stages = later.configs, later.stages
    world.codes, world.seconds = {"base: evaluate": 1}, {"base: evaluate": 1.0, "a: train": 0.1, "b: train": 30.0}
    assert world.run() is None
    assert not [event for event in world.events if event in ("begin b: evaluate", "begin a: evaluate")]


def test_a_signal_reaches_both_and_nothing_is_left(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.seconds = dict.fromkeys(("base: evaluate", "a: train"), 60.0)
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"""
import os, signal, time
while not (os.path.exists({str(world.log)!r}) and open({str(world.log)!r}).read().count("begin") == 2): time.sleep(0.01)
os.kill({os.getpid()}, signal.SIGTERM)
""",
        ]
    )
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
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"""
import os, signal, time
while not (os.path.exists({str(world.log)!r}) and "end a: train" in open({str(world.log)!r}).read()): time.sleep(0.01)
time.sleep(0.5)
os.kill({os.getpid()}, signal.SIGINT)
""",
        ]
    )
    with pytest.raises(Interrupted) as told:
        world.run()
    child.wait()
    assert told.value.code == 130 and world.events[-1] == "told base: evaluate"
