"""A real Ray cluster of two nodes: a job submitted, followed, stopped, resubmitted; and what is refused before it."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny

from eaft_verl.runs import Run

RECIPE = """
model: {model}
device: cpu
data: {{train: {train}, heldout: {heldout}, max_length: 256}}
evaluate: {{points: 1}}
verl:
  engine: {{mixed_precision: {{param_dtype: fp32, reduce_dtype: fp32}}}}
  optim: {{lr: 1.0e-3}}
  data: {{train_batch_size: 4, max_token_len_per_gpu: 256}}
  trainer: {{nnodes: 2, n_gpus_per_node: 1, total_epochs: 10}}
arms:
  eaft: {{objective: {{name: eaft}}}}
  again: {{objective: {{name: eaft}}}}
"""
STEPS = 40
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Cluster:
    """Where the cluster is, the environment that reaches it, and a folder with a recipe to launch from."""

    address: str
    dashboard: str
    environ: dict[str, str]
    project: Path

    def launch(self, *words: str) -> list[str]:
        return [*self.eaft("launch", "recipe.yaml", "--compare", "--on", "ray"), *words]

    def eaft(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "eaft_verl.cli", *words]

    def run(self, command: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
        environ = {**self.environ, **environ}
        return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environ, cwd=self.project)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what} within {seconds:.0f} s"
        time.sleep(0.1)


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Iterator[Cluster]:
    """Two nodes of one CPU each, so that two workers must spread."""
    project = tmp_path_factory.mktemp("project")
    train = tiny.write_sums(project.parent / "train.jsonl", 16, seed=1)
    heldout = tiny.write_sums(project.parent / "heldout.jsonl", 6, seed=2)
    (project / "recipe.yaml").write_text(RECIPE.format(model=tiny_model_path, train=train, heldout=heldout))
    with two_nodes(project, cpus=1) as found:
        yield found


@contextlib.contextmanager
def two_nodes(project: Path, cpus: int) -> Iterator[Cluster]:
    """Ray on two nodes with so many CPUs and one slot for a worker each; with token authentication."""
    scratch = Path(tempfile.mkdtemp(prefix="ray"))  # short: Ray's socket paths have a limit
    port, dashboard = free_port(), free_port()
    environ = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_TMPDIR": str(scratch), "HOME": str(scratch)}
    environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    environ |= {"OMP_NUM_THREADS": "1", "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    small = [
        "--num-cpus",
        str(cpus),
        "--num-gpus",
        "1",
        "--object-store-memory",
        "100000000",
        "--disable-usage-stats",
        "--block",
    ]
    head = ["--head", "--port", str(port), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    # nodes of one host must not share the folder in which each unpacks a job's package: the second deletes the first's
    second = ["--address", f"127.0.0.1:{port}", "--temp-dir", str(scratch / "2")]
    log = (scratch / "ray.log").open("w")
    nodes = []
    try:
        for words, ready in ((head, dashboard), (second, port)):
            own = ["--node-ip-address", "127.0.0.1", "--dashboard-agent-listen-port", str(free_port())]
            command = [str(BIN / "ray"), "start", *words, *own, *small]
            nodes.append(subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True))
            wait_until(lambda ready=ready: answers(ready), 300, "ray start answers")
        yield Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environ, project)
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in reversed(nodes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
        shutil.rmtree(scratch, ignore_errors=True)


def test_a_cluster_too_small_is_refused_within_seconds(cluster: Cluster, tmp_path: Path) -> None:
    wanted = [f"output={tmp_path / 'out'}", "verl.trainer.nnodes=3", "verl.data.train_batch_size=6"]
    started = time.monotonic()
    done = cluster.run(cluster.launch(*wanted))
    assert done.returncode == 2 and "follow: " not in done.stdout
    assert time.monotonic() - started < 300  # most of it is starting; nodes that join are waited for twice as long
    assert "needs 3 node(s) with 1 CPUs; 2 of 3 found" in done.stderr
    done = cluster.run(cluster.eaft("train", "recipe.yaml", "--arm", "eaft", *wanted), RAY_ADDRESS=cluster.address)
    assert done.returncode == 2
    assert "needs 3 node(s) with 1 CPUs; 2 of 3 found" in done.stderr


def test_doctor_asks_every_node(cluster: Cluster, tmp_path: Path) -> None:
    words = ["doctor", "recipe.yaml", f"output={tmp_path / 'out'}"]
    done = cluster.run(cluster.eaft(*words), RAY_ADDRESS=cluster.address)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is seen by 2 node(s)" in done.stdout and "2 node(s) reach the driver's node" in done.stdout
    assert "2 placement group(s) ready" in done.stdout
    health = cluster.run([str(BIN / "ray"), "health-check", "--address", cluster.address])
    assert health.returncode == 0, "docker/compose.yaml asks the same: " + health.stdout + health.stderr


@pytest.mark.slow
def test_grpo_connects_inside_a_job_that_sets_its_variables(cluster: Cluster) -> None:
    code = (
        "import ray, os; from eaft_verl.training.grpo.session import grpo_session\n"
        "@ray.remote\n"
        "def seen(): return [os.environ[name] for name in ('NCCL_DEBUG', 'TOKENIZERS_PARALLELISM', 'VERL_PLATFORM')]\n"
        "with grpo_session('cpu', 2, '/dev/null'): print('worker:', *ray.get(seen.remote()))"
    )
    variables = {"NCCL_DEBUG": "INFO", "TOKENIZERS_PARALLELISM": "true"}  # verl and we would set both
    submit = [
        "job",
        "submit",
        "--address",
        cluster.dashboard,
        "--runtime-env-json",
        json.dumps({"env_vars": variables}),
    ]
    done = cluster.run([str(BIN / "ray"), *submit, "--", "python", "-c", code])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "worker: INFO true cpu" in done.stdout


@pytest.mark.slow
def test_a_stopped_job_goes_on_as_if_it_had_not_been(cluster: Cluster, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = [f"output={output}"]
    followed = tmp_path / "followed.log"
    with followed.open("w") as stream:
        first = subprocess.Popen(cluster.launch(*words), env=cluster.environ, cwd=cluster.project, stdout=stream)
    arm = output / "eaft-seed0"

    def reached(condition: Callable[[], bool]) -> bool:
        assert first.poll() is None, followed.read_text()
        return condition()

    try:
        wait_until(lambda: reached((arm / "run.json").exists), 600, "the first arm begins")
        refused = cluster.run(cluster.launch(*words))
        assert refused.returncode == 2 and f"writes into {output}" in refused.stderr
        metrics = arm / "metrics.jsonl"
        wait_until(lambda: reached(lambda: metrics.exists() and metrics.read_text().count("\n") > 2), 600, "training")
        stop(cluster, followed.read_text())
        first.wait(300)
    finally:
        first.kill()
    log = followed.read_text()
    assert first.returncode == 75, log
    assert "2 placement group(s) ready" in log and "[eaft-seed0: train]" in log, "the log was followed"
    run = Run(output / "eaft-seed0")
    stopped_at = run.metrics()[-1]["step"]
    assert run.info["status"] == "interrupted" and "SIGTERM" in run.info["error"] and 2 < stopped_at < STEPS
    assert (run.path / "resume" / f"step_{stopped_at:06d}" / "manifest.json").exists()

    done = cluster.run(cluster.launch("--env", "NCCL_DEBUG=INFO", *words), NCCL_DEBUG="WARN")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(worker_nodes(cluster, "EaftWorker")) == 2
    whole, resumed = Run(output / "again-seed0"), run
    assert resumed.info["attempt"] == 2 and resumed.info["workers"] == whole.info["workers"] == 2
    assert [row["step"] for row in resumed.metrics()] == list(range(1, STEPS + 1))
    for name in ("loss", "nll", "grad_norm", "lr", "tokens"):
        expected = pytest.approx([row[name] for row in whole.metrics()], rel=1e-6)
        assert [row[name] for row in resumed.metrics()] == expected, name
    assert (output / "report" / "report.html").exists()


def stop(cluster: Cluster, followed: str) -> None:
    """What `ray job stop` sends, without its seconds of start-up: a tiny arm would be over by then."""
    job = followed.partition("job: ")[2].split()[0]
    request = urllib.request.Request(f"{cluster.dashboard}/api/jobs/{job}/stop", method="POST")
    request.add_header("Authorization", f"Bearer {cluster.environ['RAY_AUTH_TOKEN']}")
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200


def worker_nodes(cluster: Cluster, name: str) -> set[str]:
    """Nodes on which actors of this name have lived."""
    code = (
        "import json, sys; from ray.util.state import list_actors; "
        "print(json.dumps([actor.node_id for actor in list_actors(address=sys.argv[1], detail=True) "
        "if sys.argv[2] in actor.class_name]))"
    )
    done = cluster.run([sys.executable, "-c", code, cluster.dashboard, name])
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))
