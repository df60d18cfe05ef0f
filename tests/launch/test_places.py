"""What `eaft launch` hands to whom: commands, files, names, and what it refuses before anything is started."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from config_fixtures import composed_once  # noqa: F401

from eaft_verl.cli import main
from eaft_verl.errors import ConfigError
from eaft_verl.launch.files import kuberay_job, skypilot_job, slurm_job
from eaft_verl.launch.places import PLACES, job_id, launch
from eaft_verl.launch.request import Launch
from eaft_verl.recipe.file import read_recipe, recipe_hash
from eaft_verl.recipe.resolve import load_recipe, resolve

ROOT = Path(__file__).parents[2]
LAUNCHERS = ROOT / "eaft_verl" / "launch" / "launchers"
RECIPE = """
model: Qwen/Qwen2.5-32B-Instruct
data: {train: org/data, max_length: 16384}
evaluate: {target: [sums]}
verl: {trainer: {nnodes: 4, n_gpus_per_node: 8}}
arms:
  sft: {objective: {name: sft}}
  eaft: {objective: {name: eaft}}
"""
MY_OWN = """
extends: base.yaml
name: "1e-5"  # a name, no number
output: ${oc.env:EAFT_DATA,/shared}/über
data: {rows: 7}
verl: {optim: {lr: 1e-5}}
arms: {sft: null}
"""
PLACED = ("device=cuda", "output=/shared/runs/q")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, current; nothing of the caller's environment that travels."""
    (tmp_path / "q.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("NCCL_", "EAFT_GPU", "EAFT_IMAGE", "EAFT_DATA", "OMP_", "HF_HUB", "RAY_AUTH", "VLLM_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def wanted(*overrides: str, arm: str | None = "eaft", **more: object) -> Launch:
    return Launch("q.yaml", arm, overrides=(*PLACED, *overrides), **more)


def resolved(asked: Launch) -> object:
    return resolve(load_recipe(asked.recipe), asked.arm or "sft", asked.overrides)


def test_words_are_the_arguments_that_make_the_same_launch() -> None:
    asked = wanted("verl.optim.lr=2e-5", arm=None, seeds="0,1", wait=30.0)
    assert asked.words() == ["q.yaml", "--compare", "--seeds", "0,1", "--wait", "30", *PLACED, "verl.optim.lr=2e-5"]
    assert wanted().words()[:3] == ["q.yaml", "--arm", "eaft"]


def test_job_names_are_unique_and_names_everywhere() -> None:
    names = {job_id("math_qwen2_5", "eaft_2") for _ in range(50)}
    assert len(names) == 50
    assert all(re.fullmatch(r"math-qwen2-5-eaft-2-\d{8}-\d{6}-[0-9a-f]{6}", name) for name in names)


def test_slurm_gets_sizes_on_its_command_line_and_the_script_of_the_examples() -> None:
    asked = wanted()
    name, text, command = slurm_job(asked, resolved(asked), "job-1")
    assert name == "job-1.sbatch" and text == (LAUNCHERS / "slurm.sbatch").read_text()
    assert command[:4] == ["sbatch", "--job-name=job-1", "--nodes=4", "--output=/shared/runs/q/job-1-%j.log"]
    assert command[4:] == ["--gpus-per-node=8", "FILE", *asked.words()]


def test_kuberay_gets_one_pod_per_node_with_the_gpus_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAFT_IMAGE", "registry/eaft:1")
    monkeypatch.setenv("EAFT_DATA", "/shared/data")
    asked = wanted()
    long = "a-recipe-with-a-name-of-some-length-eaft-20261124-010203-abcdef"
    _, text, command = kuberay_job(asked, resolved(asked), long)
    job = yaml.safe_load(text)
    cluster = job["spec"]["rayClusterSpec"]
    pod = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert command == ["kubectl", "create", "-f", "FILE"]
    assert job["metadata"]["name"].endswith("20261124-010203-abcdef") and len(job["metadata"]["name"]) <= 47
    assert shlex.split(job["spec"]["entrypoint"]) == [
        *("eaft", "launch", *asked.words(), "--on", "local", "--wait", "600")
    ]
    assert pod["image"] == "registry/eaft:1" and pod["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert cluster["workerGroupSpecs"][0]["replicas"] == 3, "the head is the fourth node"
    assert cluster["workerGroupSpecs"][0]["template"] == cluster["headGroupSpec"]["template"]
    assert cluster["authOptions"] == {"mode": "token"}
    variables = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert variables["EAFT_DATA"] == "/shared/data" and int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) >= 300
    assert all(type(value) is str for value in variables.values())


def test_kuberay_waits_as_long_as_is_asked() -> None:
    asked = wanted(wait=30.0)
    entrypoint = yaml.safe_load(kuberay_job(asked, resolved(asked), "job-1")[1])["spec"]["entrypoint"]
    assert entrypoint.count("--wait") == 1 and "--wait 30 " in entrypoint


@pytest.mark.parametrize(
    ("file", "taken", "usual"), [("slurm.sbatch", "set -- {}", 300), ("skypilot.yaml", "arguments=({})", 600)]
)
def test_the_scripts_wait_as_long_as_is_asked(file: str, taken: str, usual: int) -> None:
    """Their own number of seconds would be a second --wait, which is refused."""
    text = (LAUNCHERS / file).read_text()
    lines = [line for line in text.splitlines() if '" --wait "' in line or "RAY_ADDRESS=$head" in line]
    for given, seconds in (("--wait 30", 30), ("--seeds 0", usual)):
        script = "\n".join(["eaft() { echo $*; }", taken.format(f"launch q.yaml {given}"), *lines, "wait"])
        out = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
        assert out.count("--wait") == 1 and f"--wait {seconds}" in out


def test_kuberay_on_cpu_asks_for_no_gpu() -> None:
    asked = wanted("device=cpu", "verl.model.override_config.attn_implementation=sdpa")
    _, text, _ = kuberay_job(asked, resolved(asked), "job-1")
    assert "nvidia.com/gpu" not in text


def test_skypilot_gets_the_arguments_as_one_variable_that_the_task_splits_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EAFT_GPU", "H100-80GB")
    monkeypatch.setenv("EAFT_DATA", "/shared/data")
    asked = Launch("my recipe.yaml", "eaft", overrides=(*PLACED, "data.train=/shared/it's mine.jsonl"))
    _, text, command = skypilot_job(asked, resolved(wanted()), "job-1")
    assert command[:6] == ["sky", "launch", "-y", "-c", "job-1", "--num-nodes"] and command[6] == "4"
    assert command[command.index("--gpus") + 1] == "H100-80GB:8" and "EAFT_DATA=/shared/data" in command
    variable = next(word for word in command if word.startswith("EAFT_ARGUMENTS="))
    line = next(line for line in yaml.safe_load(text)["run"].splitlines() if line.startswith("declare"))
    script = f'{line}; printf "%s\\n" "${{arguments[@]}}"'
    environ = {**os.environ, "EAFT_ARGUMENTS": variable.partition("=")[2]}
    done = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == asked.words()


@pytest.mark.parametrize("place", ["slurm", "kuberay", "skypilot", "ray"])
def test_a_dry_run_prints_what_would_run_and_writes_nothing(
    place: str, project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "q.yaml", "--arm", "eaft", "--on", place, "--dry-run", "output=/shared/runs/q"]) == 0
    out = capfd.readouterr().out
    commands = {"slurm": "sbatch --job-name", "kuberay": "kubectl create -f", "skypilot": "sky launch -y"}
    assert commands.get(place, "command: python -m eaft_verl.cli launch q.yaml --arm eaft") in out
    assert "device=cuda" in out, "auto is decided there, not by the machine that submits"
    assert "plan for 4 x 8 A100, 80 GiB each" in out
    assert [path.name for path in project.iterdir()] == ["q.yaml"]


def test_a_place_whose_command_is_not_installed_is_an_error_that_keeps_the_file(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(project))
    with pytest.raises(ConfigError, match="sbatch is not installed on this machine"):
        launch(Launch("q.yaml", "eaft", overrides=("output=/shared/runs/q",)), "slurm", dry_run=False)
    assert list((project / "runs" / "launched").glob("*.sbatch"))


# what runs is what was checked


def test_what_is_handed_over_names_the_recipe_that_was_checked(capfd: pytest.CaptureFixture[str]) -> None:
    found = recipe_hash(Path("q.yaml"))
    for place in ("slurm", "kuberay", "skypilot", "ray"):
        launch(Launch("q.yaml", "eaft", overrides=PLACED), place, dry_run=True)
        assert f"--recipe-hash {found}" in capfd.readouterr().out, place
    assert launch(Launch("q.yaml", "eaft", overrides=PLACED, recipe_hash=found), "slurm", dry_run=True) == 0


def test_another_recipe_of_that_name_is_refused_where_the_job_runs(capsys: pytest.CaptureFixture[str]) -> None:
    Path("base.yaml").write_text(RECIPE)
    Path("q.yaml").write_text("extends: base.yaml\n")
    checked = recipe_hash(Path("q.yaml"))
    Path("base.yaml").write_text(RECIPE + "# a remark says nothing\n")
    assert recipe_hash(Path("q.yaml")) == checked
    Path("base.yaml").write_text(RECIPE.replace("16384", "8192"))
    words = ["launch", "q.yaml", "--arm", "eaft", "--on", "local", "output=/shared/q", "--recipe-hash", checked]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "recipe q.yaml is not the one that was checked" in error and checked in error and error.count("\n") == 1
    assert not Path("/shared/q").exists()


def test_the_kuberay_job_brings_the_recipe_it_was_launched_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipes").mkdir()
    Path("recipes/base.yaml").write_text(RECIPE)
    Path("recipes/my own.yaml").write_text(MY_OWN)
    here = read_recipe(Path("recipes/my own.yaml"))
    checked = recipe_hash(Path("recipes/my own.yaml"))
    asked = Launch("recipes/my own.yaml", "eaft", overrides=PLACED, recipe_hash=checked)
    _, text, _ = kuberay_job(asked, resolved(asked), "job-1")
    variables = yaml.safe_load(yaml.safe_load(text)["spec"]["runtimeEnvYAML"])["env_vars"]
    assert not re.search("[$`'\"\\\\]", "".join(variables.values())), "nothing that a shell on the way would change"
    image = tmp_path / "image"
    (image / "recipes").mkdir(parents=True)
    (image / "recipes" / "my own.yaml").write_text(RECIPE)  # the image's own of that name
    monkeypatch.chdir(image)
    monkeypatch.setenv("EAFT_RECIPE", variables["EAFT_RECIPE"])
    launch(asked, "local", dry_run=True)
    assert (
        read_recipe(image / "recipes" / "my own.yaml") == here and recipe_hash(Path("recipes/my own.yaml")) == checked
    )
    assert "eaft train 'recipes/my own.yaml' --arm eaft" in capfd.readouterr().out
    shutil.rmtree(image / "recipes")
    (image / "recipes").write_text("")
    with pytest.raises(ConfigError, match="recipe recipes/my own.yaml cannot be written in this image"):
        launch(asked, "local", dry_run=True)


def test_slurm_gets_a_folder_for_its_log_before_it_is_asked(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "sbatch").write_text(
        '#!/bin/sh\nfor word; do case $word in --output=*) : >"${word#--output=}";; esac; done\n'
    )
    (project / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{project}:{os.environ['PATH']}")
    output = project / "shared" / "runs"
    assert launch(Launch("q.yaml", "eaft", overrides=(f"output={output}",)), "slurm", dry_run=False) == 0
    assert [path.suffix for path in output.iterdir()] == [".log"]
    (project / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made here"):
        launch(Launch("q.yaml", "eaft", overrides=(f"output={project / 'file' / 'x'}",)), "slurm", dry_run=False)


def test_a_cpu_job_asks_slurm_for_no_gpu() -> None:
    asked = Launch("q.yaml", "eaft", overrides=("device=cpu", "output=/shared/q", "verl.data.train_batch_size=32"))
    _, text, command = slurm_job(asked, resolved(asked), "job-1")
    assert "gpus" not in " ".join(command) and not re.search(r"^#SBATCH.*gpu", text, re.MULTILINE)


# refusals


@pytest.mark.parametrize("place", [place for place in PLACES if place != "local"])
@pytest.mark.parametrize("output", [(), ("output=runs/mine",)])
def test_a_relative_output_is_refused_on_a_cluster(place: str, output: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="relative: on a cluster it must be an absolute path"):
        launch(Launch("q.yaml", "eaft", overrides=output), place, dry_run=True)


def test_a_recipe_outside_the_folder_that_travels_is_refused(project: Path) -> None:
    for path in (str(project / "q.yaml"), f"../{project.name}/q.yaml"):
        with pytest.raises(ConfigError, match="must lie under the current folder"):
            launch(Launch(path, "eaft", overrides=PLACED), "ray", dry_run=True)


@pytest.mark.parametrize("place", ["ray", "skypilot"])
def test_what_a_recipe_extends_must_travel_with_it(place: str, project: Path, tmp_path_factory: object) -> None:
    outside = tmp_path_factory.mktemp("elsewhere") / "base.yaml"
    outside.write_text(RECIPE)
    (project / "x.yaml").write_text(f"extends: {os.path.relpath(outside, project)}\n")
    with pytest.raises(ConfigError, match=r"base.yaml, which x.yaml extends, must lie under the current folder"):
        launch(Launch("x.yaml", "eaft", overrides=PLACED), place, dry_run=True)
    (project / "x.yaml").write_text(f"extends: {outside}\n")
    with pytest.raises(ConfigError, match="which x.yaml extends, must lie under the current folder"):
        launch(Launch("x.yaml", "eaft", overrides=PLACED), place, dry_run=True)
    assert launch(Launch("x.yaml", "eaft", overrides=PLACED), "slurm", dry_run=True) == 0, "one file system"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--on", "lsf"], "--on 'lsf' is not one of local, ray, slurm, kuberay, skypilot"),
        (["--on", "slurm", "--env", "A=1"], "--env is for --on ray"),
        (["--on", "slurm", "--seeds", "a"], "--seeds 'a' must be whole numbers"),
        (["--on", "ray", "verl.optim.lr=0"], "arm eaft: verl.optim.lr=0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "q.yaml", "--arm", "eaft", *words, "output=/shared/q"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_unknown_arm_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no arm 'nope'; its arms are sft, eaft"):
        launch(wanted(arm="nope"), "ray", dry_run=True)


def test_a_ray_that_does_not_answer_is_refused_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; from eaft_verl.launch import ray_jobs; from eaft_verl.errors import ConfigError\n"
        "ray_jobs.CONNECT_TIMEOUT_S = 0.5\n"
        "for address in ('http://192.0.2.250:8265', 'head:8265'):\n"
        "    try: ray_jobs.connect(address)\n"
        "    except ConfigError as error: print(error)\n"
        "import os; os.environ.pop('RAY_AUTH_MODE', None); os.environ.pop('RAY_AUTH_TOKEN', None)\n"
        "import socket; server = socket.create_server(('127.0.0.1', 0))\n"
        "try: ray_jobs.connect(f'http://127.0.0.1:{server.getsockname()[1]}')\n"
        "except ConfigError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    silent, wrong, token = done.stdout.splitlines()[0], done.stdout.splitlines()[1], done.stdout
    assert "does not answer within" in silent and "ssh -L" in silent
    assert "must be http://HOST:PORT" in wrong
    assert "no token for 127.0.0.1" in token
