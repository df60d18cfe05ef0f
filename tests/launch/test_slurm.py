"""A real Slurm of one node, started here where Debian's slurmctld, slurmd and munge are installed."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

BIN = Path(sys.executable).parent
DAEMONS = ("slurmctld", "slurmd", "munged")
SEARCH = f"{os.environ['PATH']}:/usr/sbin"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(shutil.which(name, path=SEARCH) for name in DAEMONS) or os.geteuid() != 0,
        reason="no Slurm here, or not root: apt-get install slurmctld slurmd slurm-client munge",
    ),
]
RECIPE = """
model: {model}
device: cpu
data: {{train: {train}, heldout: {heldout}, max_length: 256}}
evaluate: {{points: 1}}
verl:
  data: {{train_batch_size: 4, max_token_len_per_gpu: 256}}
  trainer: {{nnodes: 1, n_gpus_per_node: 1, total_epochs: 1}}
arms:
  sft: {{objective: {{name: sft}}}}
"""
CONF = """
ClusterName=eaft
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthInfo=socket={here}/munge.socket
SlurmUser=root
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd.pid
SlurmctldLogFile={here}/slurmctld.log
SlurmdLogFile={here}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return found


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands find this one."""
    here = Path(tempfile.mkdtemp(prefix="slurm"))
    for name in ("state", "spool", "home"):
        (here / name).mkdir()
    (here / "munge.key").write_bytes(os.urandom(1024))
    (here / "munge.key").chmod(0o400)
    text = CONF.format(here=here, host=socket.gethostname().partition(".")[0], ports=free_ports(2), cpus=os.cpu_count())
    (here / "slurm.conf").write_text(text)
    environ = {
        **os.environ,
        "SLURM_CONF": str(here / "slurm.conf"),
        "PATH": f"{BIN}:{SEARCH}",
        "HOME": str(here / "home"),
    }
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    munge = [f"--{option}={here / name}" for option, name in files.items()]
    commands = [
        ["munged", "-F", "--force", f"--log-file={here}/munge.log", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    ]
    running = []
    try:
        for command in commands:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": (here / f"{command[0]}.err").open("w")}
            running.append(subprocess.Popen(command, env=environ, start_new_session=True, **quiet))
            time.sleep(1)
        until = time.monotonic() + 120
        while "idle" not in (seen := shown(environ, "sinfo", "-h", "-o", "%T")):
            errors = "\n".join(file.read_text()[-800:] for file in here.glob("*.err"))
            assert time.monotonic() < until, f"{seen}\n{errors}"
            time.sleep(0.5)
        yield environ
    finally:
        for daemon in reversed(running):
            daemon.terminate()
            daemon.wait(120)
        shutil.rmtree(here, ignore_errors=True)


def shown(environ: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False).stdout


@pytest.fixture
def project(tmp_path: Path, tiny_model_path: Path) -> Path:
    train = tiny.write_sums(tmp_path / "train.jsonl", 8, seed=1)
    heldout = tiny.write_sums(tmp_path / "heldout.jsonl", 4, seed=2)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_model_path, train=train, heldout=heldout))
    return tmp_path


def launched(project: Path, environ: dict[str, str], seconds: float) -> tuple[str, str]:
    """(state, log) of a job once it has ended."""
    words = ["launch", "recipe.yaml", "--arm", "sft", "--on", "slurm", f"output={project / 'shared' / 'out'}"]
    command = [sys.executable, "-m", "eaft_verl.cli", *words]
    done = subprocess.run(command, env=environ, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    job = done.stdout.rpartition("Submitted batch job ")[2].split()[0]
    until, state = time.monotonic() + seconds, "?"
    while state not in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"):
        log = "\n".join(file.read_text() for file in (project / "shared" / "out").glob("*.log"))
        assert time.monotonic() < until, f"{state}\n{log}"
        time.sleep(1)
        state = shown(environ, "scontrol", "show", "job", job).partition("JobState=")[2].partition(" ")[0]
    (log_file,) = (project / "shared" / "out").glob("*.log")
    return state, log_file.read_text()


def test_a_ray_that_does_not_start_ends_the_job_and_leaves_no_token(project: Path, slurm: dict[str, str]) -> None:
    (project / "ray").write_text("#!/bin/sh\necho no ray today >&2\nexit 1\n")
    (project / "ray").chmod(0o755)
    state, log = launched(project, {**slurm, "PATH": f"{project}:{slurm['PATH']}"}, 60)
    assert state == "FAILED" and "no ray today" in log and "ray start has ended" in log
    assert not list((Path(slurm["HOME"]) / ".ray").glob("*.token"))


def test_another_recipe_than_the_one_that_was_checked_is_refused(project: Path, slurm: dict[str, str]) -> None:
    edited = f'#!/bin/sh\nsed -i s/256/128/ {project / "recipe.yaml"}\nexec {shutil.which("sbatch")} "$@"\n'
    (project / "sbatch").write_text(edited)
    (project / "sbatch").chmod(0o755)
    state, log = launched(project, {**slurm, "PATH": f"{project}:{slurm['PATH']}"}, 120)
    assert state == "FAILED" and "is not the one that was checked" in log


def test_a_job_trains_and_reports_on_a_cpu(project: Path, slurm: dict[str, str]) -> None:
    state, log = launched(project, slurm, 300)
    assert state == "COMPLETED", log
    assert "pass  resources" in log and (project / "shared" / "out" / "report" / "report.html").exists()
