"""Saves, run files and resumption: damaged, missing, from elsewhere, or asked for in another way."""

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny

from .matrix import STEPS, Lab, Outcome, Seen, fault

OLDER, NEWER = 4, 8  # what an interrupted run of the laboratory has saved; it was killed after step 10


def _state(lab: Lab, step: int = NEWER) -> Path:
    return lab.run / "resume" / f"step_{step:06d}"


def _shard(lab: Lab, step: int = NEWER) -> Path:
    return next(_state(lab, step).glob("*.safetensors"))


def _exact_from(lab: Lab, seen: Seen, step: int, *said: str) -> Outcome:
    """The command went on from `step` to the end, and every row is the uninterrupted run's."""
    assert seen.code == 0, seen.said
    assert f"resuming at step {step} of {STEPS}" in seen.said, seen.said
    for text in said:
        assert text in seen.said, seen.said
    lab.assert_exact()
    return Outcome(f"resumed at step {step}, every row equal", lost=10 - step)


def _refused(seen: Seen, *said: str) -> str:
    assert seen.code == 2 and "Traceback" not in seen.said, seen.said
    for text in said:
        assert text in seen.last_line, seen.said
    return f"exit 2: {seen.last_line}"


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 1000):
        data[place] ^= 1
    path.write_bytes(data)


def _bomb(path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (path.parents[3] / "ran",)

    path.write_bytes(pickle.dumps(Bomb()))


def _forget_keys(path: Path) -> None:
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({name: manifest[name] for name in ("step", "state")}))


DAMAGE: dict[str, tuple[Callable[[Lab], Any], str]] = {
    "1000 flipped bits in the newest shard": (lambda lab: _flip(_shard(lab)), "is not as it was written"),
    "the newest shard cut in half": (
        lambda lab: os.truncate(_shard(lab), _shard(lab).stat().st_size // 2),
        "is not as it was written",
    ),
    "the newest shard missing": (lambda lab: _shard(lab).unlink(), "is missing"),
    "the newest shard empty": (lambda lab: _shard(lab).write_bytes(b""), "is not as it was written"),
    "a shard of step 4 in the folder of step 8": (
        lambda lab: shutil.copy(_shard(lab, OLDER), _shard(lab)),
        "is not as it was written",
    ),
    "the whole folder of step 4 under the name of step 8": (
        lambda lab: (shutil.rmtree(_state(lab)), shutil.copytree(_state(lab, OLDER), _state(lab))),
        "manifest.json is that of step 4",
    ),
    "random states of another step": (
        lambda lab: shutil.copy(_state(lab, OLDER) / "rank-00000.json", _state(lab) / "rank-00000.json"),
        "rank-00000.json is not as it was written",
    ),
    "the newest manifest empty": (
        lambda lab: (_state(lab) / "manifest.json").write_text(""),
        "manifest.json cannot be read",
    ),
    "the newest manifest without its keys": (
        lambda lab: _forget_keys(_state(lab) / "manifest.json"),
        "manifest.json lacks",
    ),
    "the newest manifest missing": (lambda lab: (_state(lab) / "manifest.json").unlink(), "manifest.json is missing"),
    "a pickle that runs code in place of the newest shard": (
        lambda lab: _bomb(_shard(lab)),
        "is not as it was written",
    ),
    "a pickle that runs code beside the shards": (
        lambda lab: _bomb(_state(lab) / ".metadata"),
        ".metadata was not there when it was saved",
    ),
}


TRAINED = (  # all pass the same guard; these are driven to the end besides, one of them with resume=strict first
    "1000 flipped bits in the newest shard",
    "the newest manifest without its keys",
    "a pickle that runs code in place of the newest shard",
)


def _damaged(name: str, damage: Callable[[Lab], Any], said: str) -> None:
    @fault(f"{name}, listed", "named by `eaft checkpoints`, the older state sound")
    def _quick(lab: Lab) -> Outcome:
        _fake_run(lab)
        damage(lab)
        listed = lab.eaft("checkpoints", lab.run)
        assert listed.code == 0 and "DAMAGED" in listed.said and said in listed.said, listed.said
        assert "complete: step 4" in listed.said and not list(lab.folder.rglob("ran"))
        return Outcome(f"DAMAGED: {said}; step 4 complete")

    if name not in TRAINED:
        return

    @fault(name, "the file named, exact from the older state", slow=True)
    def _whole(lab: Lab) -> Outcome:
        lab.interrupt()
        damage(lab)
        if name == TRAINED[0]:
            _refused(lab.train("resume=strict"), "step_000008 is damaged", said)
        outcome = _exact_from(lab, lab.train(), OLDER, "step_000008 is damaged", said)
        assert not list(lab.folder.rglob("ran")), "a pickle was run"
        return outcome


def _fake_run(lab: Lab) -> None:
    """A run with two states as the workers write them, made without workers."""
    from eaft_verl.runs import Run
    from eaft_verl.training import states

    run = Run.create(lab.run, info={"kind": "arm", "status": "failed", "keys": {}}, config="a: 1", env={})
    for step in (OLDER, NEWER):
        folder = _state(lab, step)
        folder.mkdir(parents=True)
        for name in ("shard-00001-model-00001-of-00001.safetensors", "rank-00000.json"):
            (folder / name).write_bytes(f"{name} {step}".encode() * 100)
        files = {file.name: states.describe(file) for file in folder.iterdir()}
        (folder / states.SHARDS).write_text(json.dumps({"files": files, "nonfinite": None}))
        states.seal(folder, run, step, step, {}, 1)


for _name, (_damage, _said) in DAMAGE.items():
    _damaged(_name, _damage, _said)


@fault("all states damaged", "refused with a remedy, nothing deleted", slow=True)
def _all_damaged(lab: Lab) -> Outcome:
    lab.interrupt()
    for step in (OLDER, NEWER):
        _flip(_shard(lab, step))
    rows = lab.rows()
    seen = _refused(lab.train(), "reached step", "resume=restart", "damaged")
    assert lab.rows() == rows and len(list((lab.run / "resume").glob("*.damaged"))) == 2
    return Outcome(seen, lost=0)


@fault("resume/ deleted, ten rows of metrics", "never from step 1 unasked; asked, the old rows are kept", slow=True)
def _no_states(lab: Lab) -> Outcome:
    lab.interrupt()
    shutil.rmtree(lab.run / "resume")
    rows = lab.rows()
    seen = _refused(lab.train(), "no state is left to go on from", "resume=restart")
    assert lab.rows() == rows
    again = lab.train("resume=restart")
    assert again.code == 0, again.said
    lab.assert_exact()
    assert (lab.run / "before_restart_1" / "metrics.jsonl").exists()
    return Outcome(f"{seen}; with resume=restart exact", lost=10)


@fault("metrics.jsonl deleted", "goes on exactly, says and notes what is lost", slow=True)
def _no_metrics(lab: Lab) -> Outcome:
    lab.interrupt()
    (lab.run / "metrics.jsonl").unlink()
    seen = lab.train()
    assert seen.code == 0 and "metrics.jsonl lacks 8 of the steps up to 8 (from step 1)" in seen.said, seen.said
    whole = lab.whole()[NEWER:]
    assert [(row["step"], row["loss"]) for row in lab.rows()] == [(row["step"], row["loss"]) for row in whole]
    assert "lacks 8" in json.loads((lab.run / "run.json").read_text())["lost_metrics"][0]
    return Outcome("said, noted in run.json, steps 9 to 20 exact", lost=2)


@fault("a damaged line in the middle of metrics.jsonl", "said before a model is loaded, goes on exactly", slow=True)
def _damaged_line(lab: Lab) -> Outcome:
    lab.interrupt()
    path = lab.run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[4] = lines[4][:20] + b"\xff\xfe"
    path.write_bytes(b"\n".join(lines))
    seen = lab.train()
    assert seen.code == 0 and "metrics.jsonl had damaged lines" in seen.said, seen.said
    assert seen.said.index("damaged lines") < seen.said.index("resuming at step 8")
    theirs = [row for row in lab.whole() if row["step"] != _step_of(lab, path, 5)]
    assert [row["loss"] for row in lab.rows()] == [row["loss"] for row in theirs]
    return Outcome("line left out and named; the rest exact", lost=2)


def _step_of(lab: Lab, path: Path, number: int) -> int:
    """Step of a line of the damaged file: the one that the mended file lacks."""
    there = {row["step"] for row in lab.rows()}
    return next(step for step in range(1, STEPS + 1) if step not in there)


def _harm_both(lab: Lab) -> None:
    os.truncate(lab.run / "run.json", 200)
    (lab.run / "config.yaml").write_text("")


RUN_FILES: dict[str, Callable[[Lab], Any]] = {
    "run.json cut in half, config.yaml empty": _harm_both,
    "run.json and its copy deleted": lambda lab: [(lab.run / name).unlink() for name in ("run.json", ".run.json")],
}


@fault("run.json is cut in half, deleted or [], listed", "its copy is used, with a warning")
def _copy_of_run_json(lab: Lab) -> Outcome:
    _fake_run(lab)
    file = lab.run / "run.json"
    for damage in (lambda: os.truncate(file, 20), file.unlink, lambda: file.write_text("[]")):
        damage()
        listed = lab.eaft("checkpoints", lab.run)
        assert listed.code == 0 and "was damaged or missing; its copy is used" in listed.said, listed.said
        assert listed.said.count("complete: step") == 2, listed.said
    return Outcome("the copy is used, both states are listed")


def _described(name: str, damage: Callable[[Lab], Any]) -> None:
    @fault(name, "mended with a warning, exact from the newest state", slow=True)
    def _mended(lab: Lab) -> Outcome:
        lab.interrupt()
        damage(lab)
        return _exact_from(lab, lab.train(), NEWER, "was damaged or missing" if "copy" not in name else "written anew")


for _name, _harm in RUN_FILES.items():
    _described(_name, _harm)


HARMLESS = ("verl.trainer.save_freq=3", "verl.trainer.test_freq=5", "verl.trainer.max_ckpt_to_keep=3", "save_minutes=1")


@fault(
    "resumed with another save_freq, test_freq, max_ckpt_to_keep, save_minutes and spelling of the recipe's path",
    "goes on exactly",
    slow=True,
)
def _harmless_changes(lab: Lab) -> Outcome:
    lab.interrupt()
    seen = lab.eaft("train", os.path.relpath(lab.recipe, lab.folder), "--arm", "eaft", *HARMLESS)
    return _exact_from(lab, seen, NEWER)


@fault("begun with 2 workers, killed, resumed with 1, killed, resumed with 3", "goes on to rounding", slow=True)
def _other_world(lab: Lab) -> Outcome:
    tiny.write_sums(lab.folder / "train.jsonl", 24, seed=1)
    words = ("verl.data.train_batch_size=6", "verl.trainer.total_epochs=3")  # 12 steps of rows for 1, 2 and 3 workers
    assert (seen := lab.train(*words)).code == 0, seen.said
    whole = lab.rows()
    shutil.rmtree(lab.out)
    for workers, step in ((2, OLDER + 1), (1, NEWER + 1)):
        asked = (*words, f"verl.trainer.n_gpus_per_node={workers}")
        with lab.started("train", lab.recipe, "--arm", "eaft", *asked) as process:
            lab.wait_for_step(process, step)
            os.killpg(process.pid, signal.SIGKILL)
    seen = lab.train(*words, "verl.trainer.n_gpus_per_node=3")
    assert seen.code == 0 and f"resuming at step {NEWER} of 12" in seen.said, seen.said
    names = ("loss", "nll", "grad_norm")
    pairs = [(mine[name], theirs[name]) for mine, theirs in zip(lab.rows(), whole, strict=True) for name in names]
    worst = max(abs(mine - theirs) / abs(theirs) for mine, theirs in pairs)
    assert len(whole) == 12 and worst < 1e-5, worst  # twelve updates of float32
    return Outcome(f"2, 1, 3 workers; losses and norms within {worst:.1e}", lost=2)


@fault("a lower rate after a divergence", "refused with the way; with resume=changed goes on and says so", slow=True)
def _lower_rate(lab: Lab) -> Outcome:
    lab.interrupt()
    lower = "verl.optim.lr=1e-4"
    seen = _refused(lab.train(lower), "verl.optim.lr=0.001 (now 0.0001)", "resume=changed")
    again = lab.train(lower, "resume=changed")
    assert again.code == 0 and f"resuming at step {NEWER} of {STEPS}" in again.said, again.said
    whole, mine = lab.whole(), lab.rows()
    assert [row["loss"] for row in mine[:9]] == [row["loss"] for row in whole[:9]]
    assert abs(mine[9]["lr"] / whole[9]["lr"] - 0.1) < 1e-9
    info = json.loads((lab.run / "run.json").read_text())
    assert info["changes"][0]["settings"] == ["verl.optim.lr=0.001 (now 0.0001)"]
    return Outcome(f"{seen}; noted in run.json", lost=2)


EPOCH = 4  # steps


@fault("killed at epoch boundaries, saved every 1 and 3 steps and after each epoch", "exact each time", slow=True)
def _boundaries(lab: Lab) -> Outcome:
    lab.whole()
    told = []
    for every, at in (("1", EPOCH), ("3", 3 * EPOCH), ("after_each_epoch", EPOCH)):
        shutil.rmtree(lab.out, ignore_errors=True)
        with lab.started("train", lab.recipe, "--arm", "eaft", f"verl.trainer.save_freq={every}") as process:
            lab.wait_for_step(process, at + 1)
            os.killpg(process.pid, signal.SIGKILL)
        seen = lab.train(f"verl.trainer.save_freq={every}")
        assert seen.code == 0 and "resuming at step" in seen.said, seen.said
        lab.assert_exact()
        told.append(seen.said.partition("resuming at step ")[2].split()[0])
    return Outcome(f"exact from steps {', '.join(told)}")


@fault("killed with save_freq off, states by time only", "goes on from a state of the last minutes", slow=True)
def _by_time(lab: Lab) -> Outcome:
    overrides = ("verl.trainer.save_freq=-1", "save_minutes=0.001")
    with lab.started("train", lab.recipe, "--arm", "eaft", *overrides) as process:
        lab.wait_for_step(process, 6)
        os.killpg(process.pid, signal.SIGKILL)
    seen = lab.train(*overrides)
    assert seen.code == 0 and "resuming at step" in seen.said, seen.said
    lab.assert_exact()
    return Outcome("exact", lost=1)


@fault("a state exported by `eaft checkpoints`", "byte for byte what training exported at that step", slow=True)
def _exported(lab: Lab) -> Outcome:
    lab.interrupt()
    listed = lab.eaft("checkpoints", lab.run)
    assert listed.code == 0 and "exports in checkpoints/ at steps: 1, 2, 4, 8" in listed.said, listed.said
    seen = lab.eaft("checkpoints", lab.run, "--export", NEWER)
    assert seen.code == 0, seen.said
    mine, theirs = lab.run / "exports" / "step_000008", lab.run / "checkpoints" / "step_000008"
    for file in sorted(theirs.iterdir()):
        assert (mine / file.name).read_bytes() == file.read_bytes(), file.name
    _refused(lab.eaft("checkpoints", lab.run, "--export", "5"), "has no state of step 5; it has 4, 8")
    _refused(lab.eaft("checkpoints", lab.run, "--export", NEWER), "is never overwritten")
    return Outcome("every file equal")
