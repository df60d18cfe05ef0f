"""What surrounds a command: the folder it is in, its standard output, links, room for files, other commands."""

import shlex
import subprocess
import sys
from pathlib import Path

from .matrix import Lab, Outcome, Seen, fault

sys.path.insert(0, str(Path(__file__).parents[1] / "reporting"))
import fake_runs

FULL = 5


def shell(lab: Lab, script: str) -> Seen:
    """What a shell says of a script in which $eaft is the command."""
    command = ["sh", "-c", script.replace("$eaft", " ".join(lab.command()))]
    done = subprocess.run(command, cwd=lab.folder, env=lab.environ(), capture_output=True, text=True, check=False)
    return Seen(done.returncode, done.stdout + done.stderr)


@fault("the current folder is gone", "one line that says so")
def _no_folder(lab: Lab) -> Outcome:
    seen = shell(lab, "mkdir gone && cd gone && rmdir ../gone && exec $eaft plan")
    told = seen.refused("the current folder does not exist any more")
    return Outcome(f"exit 2: {told}")


@fault("standard output is closed, or full", "closed: as if nobody read; full: exit 5 and one line")
def _no_output(lab: Lab) -> Outcome:
    closed = shell(lab, "exec $eaft recipes >&-")
    assert closed.code == 0 and not closed.said, closed.said
    full = shell(lab, "exec $eaft recipes >/dev/full")
    assert full.code == FULL and full.said == "eaft: error: writing: No space left on device\n", full.said
    return Outcome("exit 0; exit 5")


@fault("a link that leads back to itself as recipe or run", "one line that names it")
def _loops(lab: Lab) -> Outcome:
    for name in ("loop", "loop.yaml"):
        (lab.folder / name).symlink_to(name)
    lab.eaft("train", "loop.yaml", "--arm", "eaft").refused("loop.yaml: a link that leads back to itself")
    lab.eaft("checkpoints", "loop").refused("loop: a link that leads back to itself")
    return Outcome("exit 2, the link is named")


@fault("a link that leads back to itself as model, data or output of `prepare`", "one line that names it", slow=True)
def _loops_of_data(lab: Lab) -> Outcome:
    for name in ("loop", "loop.jsonl", "loop.parquet"):
        (lab.folder / name).symlink_to(name)
    loop = lab.folder / "loop"
    lab.train(f"model={loop}").refused("loop' is not a folder here")
    lab.train(f"data.train={loop}.jsonl").refused("loop.jsonl")
    lab.eaft("prepare", "train.jsonl", "loop.parquet", "--model", lab.model).refused("loop.parquet")
    assert (lab.folder / "loop.parquet").is_symlink()
    return Outcome("exit 2, the link is named")


@fault(
    "no room while `prepare`, `report` and `analyze` write (RLIMIT_FSIZE)",
    "exit 5, the file named; nothing half is left, the same command works",
    slow=True,
)
def _no_room(lab: Lab) -> Outcome:
    base, *arms = fake_runs.make_runs(lab.folder / "runs")
    for made, words in (
        ("p.parquet", ("prepare", "train.jsonl", "p.parquet", "--model", lab.model)),
        ("report/report.json", ("report", base, *arms, "--out", "report")),
        ("seen", ("analyze", lab.model, "train.jsonl", "--out", "seen", "data.max_length=256")),
    ):
        command = shlex.join(map(str, words))
        seen = shell(lab, f"ulimit -f 6; exec $eaft {command}")  # of 512 bytes each
        assert seen.code == FULL and "Traceback" not in seen.said, seen.said
        assert made in seen.last_line and not (lab.folder / made).is_file(), seen.last_line
        again = lab.eaft(*words)
        assert again.code == 0 and (lab.folder / made).exists(), again.said
    return Outcome("exit 5, three times")
