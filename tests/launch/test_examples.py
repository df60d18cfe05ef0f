"""The scripts of examples/: short, without hyperparameters, clean, and what they would run."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BIN = Path(sys.executable).parent
FILES = sorted(path for path in EXAMPLES.iterdir() if path.is_file() and path.suffix != ".md")
RUNS = [
    *(("math_qwen2_5_32b", arm) for arm in ("eaft", "compare", "grpo")),
    *((recipe, arm) for recipe in ("math_qwen3_4b", "math_glm4_9b") for arm in ("eaft", "compare")),
]
LAUNCH = "launch recipes/math_qwen2_5_32b.yaml --arm eaft"
YAMLLINT = "{extends: default, rules: {line-length: {max: 140}, document-start: disable}}"


def dry_run(command: list[str], cwd: Path = ROOT, **environ: str) -> str:
    """What it prints with DRY_RUN=1."""
    environ = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "DRY_RUN": "1", **environ}
    done = subprocess.run(command, env=environ, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_script_is_short_and_says_nothing_a_recipe_should_say(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 30
    assert not re.search(r"verl\.(optim|data|engine|model|actor)|learning_rate|\blr=|batch_size|epochs", text)


@pytest.mark.skipif(not shutil.which("shellcheck", path=str(BIN)), reason="no shellcheck here")
@pytest.mark.parametrize(
    "path", [path for path in FILES if path.suffix in (".sh", ".sbatch")], ids=lambda path: path.name
)
def test_shellcheck(path: Path) -> None:
    command = [str(BIN / "shellcheck"), "--shell=bash", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not shutil.which("shellcheck", path=str(BIN)), reason="no shellcheck here")
def test_shellcheck_of_the_skypilot_task(tmp_path: Path) -> None:
    script = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())["run"]
    # `declare -a "name=(...)"`, the only way to split words as the shell does, hides the name from shellcheck
    (tmp_path / "run.sh").write_text(f"arguments=()\n{script}")
    command = [str(BIN / "shellcheck"), "--shell=bash", str(tmp_path / "run.sh")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not shutil.which("yamllint", path=str(BIN)), reason="no yamllint here")
@pytest.mark.parametrize("path", ["examples/rayjob.yaml", "examples/skypilot.yaml", "docker/compose.yaml"])
def test_yamllint(path: str) -> None:
    command = [str(BIN / "yamllint"), "--strict", "-d", YAMLLINT, str(ROOT / path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_here_a_dry_run_checks_plans_and_prints_every_stage() -> None:
    out = dry_run(["bash", "examples/run_eaft_qwen2_5_32b.sh"], OUTPUT="/tmp/eaft-no-such-folder/q")
    assert "plan for 1 x 8 A100, 80 GiB each" in out and "driver " in out, "what this machine lacks is said"
    assert "would run: eaft launch recipes/math_qwen2_5_32b.yaml --arm eaft output=/tmp/eaft-no-such-folder/q" in out
    assert "eaft train recipes/math_qwen2_5_32b.yaml --arm eaft output=/tmp/eaft-no-such-folder/q seed=0" in out
    assert "eaft report /tmp/eaft-no-such-folder/q/base /tmp/eaft-no-such-folder/q/eaft-seed0" in out
    assert not Path("/tmp/eaft-no-such-folder").exists()


@pytest.mark.parametrize(
    ("recipe", "arm", "place"),
    [(*run, place) for run, place in zip(RUNS, itertools.cycle(("ray", "slurm", "kuberay", "skypilot")), strict=False)],
)
def test_the_run_script_hands_any_recipe_to_any_place(recipe: str, arm: str, place: str) -> None:
    words = ["bash", "examples/run.sh", f"recipes/{recipe}.yaml", arm]
    out = dry_run(words, ON=place, OUTPUT="/shared/runs/q", EAFT_DATA="/shared/data")
    what = "--compare" if arm == "compare" else f"--arm {arm}"
    assert f"recipes/{recipe}.yaml {what} output=/shared/runs/q" in out and "plan for 1 x 8 A100" in out
    command = {"ray": "command: python", "slurm": "sbatch", "kuberay": "kubectl create", "skypilot": "sky launch"}
    assert command[place] in out


def test_a_run_of_another_recipe_with_arguments_added() -> None:
    words = ["bash", "examples/run_eaft_qwen2_5_32b.sh", "verl.trainer.nnodes=2"]
    variables = {"RECIPE": "recipes/math_qwen3_4b.yaml", "ON": "slurm", "OUTPUT": "/shared/runs/q"}
    out = dry_run(words, **variables, EAFT_DATA="/shared/data")
    assert "recipes/math_qwen3_4b.yaml --arm eaft output=/shared/runs/q verl.trainer.nnodes=2" in out
    assert "--nodes=2" in out


def test_a_ray_job_of_any_recipe() -> None:
    words = ["recipes/quickstart.yaml", "--arm", "eaft", "device=cpu", "output=/shared/runs/q"]
    out = dry_run(["bash", "examples/ray_job.sh", *words])
    assert "command: python -m eaft_verl.cli launch recipes/quickstart.yaml --arm eaft device=cpu" in out
    assert "address: http://127.0.0.1:8265" in out and "RAY_JOB_STOP_WAIT_TIME_S" in out


@pytest.fixture
def printed(tmp_path: Path) -> dict[str, str]:
    """A PATH on which `eaft` prints its arguments."""
    (tmp_path / "eaft").write_text('#!/usr/bin/env bash\necho "$@"\n')
    (tmp_path / "eaft").chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_the_slurm_script_launches_its_arguments(tmp_path: Path, printed: dict[str, str]) -> None:
    out = dry_run(["bash", str(EXAMPLES / "slurm.sbatch"), *LAUNCH.split()[1:], "a='b c'"], tmp_path, **printed)
    assert out.split() == [*LAUNCH.split(), "a='b", "c'", "--on", "local", "--dry-run"]


def test_the_rayjob_runs_what_its_comment_says(tmp_path: Path, printed: dict[str, str]) -> None:
    job = yaml.safe_load((EXAMPLES / "rayjob.yaml").read_text())["spec"]
    out = dry_run(["bash", "-c", job["entrypoint"]], tmp_path, **printed).strip()
    assert out == f"{LAUNCH} --on local --wait 600 output=/shared/runs/math_qwen2_5_32b --dry-run"
    pods = [job["rayClusterSpec"]["headGroupSpec"], *job["rayClusterSpec"]["workerGroupSpecs"]]
    assert all(
        {"name": "shm", "mountPath": "/dev/shm"} in p["template"]["spec"]["containers"][0]["volumeMounts"] for p in pods
    )


def test_the_skypilot_task_launches_its_arguments(tmp_path: Path, printed: dict[str, str]) -> None:
    task = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    assert task["secrets"] == {"RAY_AUTH_TOKEN": None} and task["envs"]["RAY_AUTH_MODE"] == "token"
    out = dry_run(["bash", "-c", task["run"]], tmp_path, EAFT_ARGUMENTS=LAUNCH.partition(" ")[2], **printed)
    assert out.strip() == f"{LAUNCH} --on local --dry-run"


@pytest.mark.parametrize(
    ("resolved", "interfaces", "head"),
    [
        ("10.0.0.7 STREAM n1", "10.0.0.7", "10.0.0.7"),
        ("127.0.1.1 STREAM n1", "fd00::2 192.0.2.7 172.17.0.1", "192.0.2.7"),  # Debian's /etc/hosts; IPv6 first
        ("127.0.0.1 STREAM n1", "fd00::2", "127.0.0.1"),  # one node alone
    ],
)
def test_the_slurm_script_gives_workers_an_address_and_ends_when_ray_does(
    tmp_path: Path, resolved: str, interfaces: str, head: str
) -> None:
    fakes = {
        "scontrol": "echo n1",
        "srun": 'while [ "$1" != -w ]; do shift; done; shift 2; exec "$@"',
        "getent": f"echo '{resolved}'",
        "hostname": f"[ $# = 0 ] && echo n1 || echo '{interfaces}'",
        "ray": 'echo "ray $*"; exit 1',
        "python": 'case $3 in *secrets*) echo token;; *) exit 1;; esac',
    }  # fmt: skip
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "SLURM_JOB_ID": "7"}
    environ |= {"SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_ON_NODE": "2"}
    command = ["bash", str(EXAMPLES / "slurm.sbatch"), "recipe.yaml"]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1 and "ray start has ended on n1" in done.stderr, done.stderr
    assert f"ray start --head --node-ip-address {head} --port 20007" in done.stdout
    assert not list((tmp_path / ".ray").iterdir()), "no token is left"
