"""Which code a run says it is from: the package's own commit, never that of a repository that merely surrounds it."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from eaft_verl.experiment.environment import describe, environment_differences, note_change
from eaft_verl.experiment.source import BUILT, ROOT, UNKNOWN, code_hash, commit
from eaft_verl.runs import Run

IDENTITY = ["-c", "user.name=a", "-c", "user.email=a@b.c"]


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *IDENTITY, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository of a package `eaft_verl`, everything committed."""
    package = tmp_path / "checkout" / "eaft_verl"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package.parent / "pyproject.toml").write_text("")
    (package.parent / "README.md").write_text("")
    git(package.parent, "init", "-q")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-qm", "one")
    return package.parent


def test_a_checkout_has_its_commit_and_says_what_differs(checkout: Path) -> None:
    package, head = checkout / "eaft_verl", git(checkout, "rev-parse", "HEAD")
    assert commit(package) == {"commit": head, "dirty": False, "diff": ""}
    (checkout / "README.md").write_text("x")
    (checkout / "mine.yaml").write_text("x")
    assert commit(package)["dirty"] is False, "no file of the package"
    (package / "__init__.py").write_text("x = 1")
    (package / "new.py").write_text("")
    assert commit(package) == {"commit": head, "dirty": True, "diff": "M eaft_verl/__init__.py\n?? eaft_verl/new.py"}


def test_a_repository_around_an_installed_package_is_not_its_commit(checkout: Path, tmp_path: Path) -> None:
    installed = checkout / ".venv" / "lib" / "site-packages" / "eaft_verl"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert commit(installed) == UNKNOWN
    git(checkout, "add", "-f", ".")
    git(checkout, "commit", "-qm", "even committed with everything else")
    assert commit(installed) == UNKNOWN
    beside = checkout / "vendor"  # a package at the top of a repository that does not hold it
    git(checkout, "init", "-q", str(beside))
    (beside / "eaft_verl").mkdir()
    (beside / "eaft_verl" / "__init__.py").write_text("")
    assert commit(beside / "eaft_verl") == UNKNOWN
    built = {"commit": "c" * 40, "dirty": False, "diff": ""}
    (installed / BUILT).write_text(json.dumps(built))
    assert commit(installed) == built
    (installed / BUILT).write_text('{"commit": 1}')
    assert commit(installed) == UNKNOWN
    assert commit(tmp_path) == UNKNOWN


def test_variables_of_git_lead_nowhere_else(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    other = checkout.parent / "other"
    git(checkout, "clone", "-q", str(checkout), str(other))
    git(other, "commit", "-q", "--allow-empty", "-m", "two")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert commit(checkout / "eaft_verl")["commit"] == head
    monkeypatch.setenv("PATH", "")
    assert commit(checkout / "eaft_verl") == UNKNOWN, "no git"


def test_the_hash_is_of_names_and_bytes(checkout: Path) -> None:
    package = checkout / "eaft_verl"
    first = code_hash(package)
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.pyc").write_text("x")
    (package / BUILT).write_text("{}")
    assert code_hash(package) == first
    (package / "a.yaml").write_text("")
    assert code_hash(package) != first
    (package / "a.yaml").rename(package / "b.yaml")
    assert len({first, code_hash(package)}) == 2
    assert len(code_hash()) == 16 and code_hash() == code_hash(ROOT)


def test_differences_are_named_by_kind() -> None:
    now = describe()
    assert environment_differences(now, now) == {}
    before = {**now, "packages": {**now["packages"], "torch": "2.0"}, "cpus": 64, "code": "0" * 16, "commit": "c"}
    before["installed"] = {name: version for name, version in now["installed"].items() if name != "numpy"}
    found = environment_differences(before, now)
    assert found["versions"] == [f"packages.torch=2.0 (now {now['packages']['torch']})"]
    assert found["hardware"] == [f"cpus=64 (now {now['cpus']})"]
    assert found["other packages"] == [f"installed.numpy=(absent) (now {now['installed']['numpy']})"]
    assert [line.partition("=")[0] for line in found["code"]] == ["code", "commit"]
    assert environment_differences({**now, "commit": "c", "dirty": None}, now) == {}, "the same code"
    old = {"commit": "c", "dirty": False, "packages": now["packages"]}  # an earlier version wrote no hash
    assert list(environment_differences(old, now)) == ["code"]


def test_a_run_notes_each_change_once(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", info={"kind": "arm"}, config="a: 1", env=describe())
    note_change(run, "evaluate")
    assert "environments" not in run.info
    moved = Run.create(tmp_path / "moved", info={"kind": "arm"}, config="a: 1", env={**describe(), "cpus": 64})
    note_change(moved, "evaluate")
    note_change(moved, "evaluate")
    found = {"hardware": [f"cpus=64 (now {os.cpu_count()})"]}
    assert moved.info["environments"] == [{"stage": "evaluate", "attempt": 0, "found": found}]


@pytest.mark.slow
def test_a_wheel_and_a_wheel_from_a_source_distribution_carry_the_commit(tmp_path: Path) -> None:
    checkout = tmp_path / "clone"
    git(ROOT.parent, "clone", "-q", str(ROOT.parent), str(checkout))
    head = git(checkout, "rev-parse", "HEAD")
    build = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"

    def built(kind: str, folder: Path) -> Path:
        words = [sys.executable, "-c", build, kind, str(tmp_path)]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
        return tmp_path / done.stdout.split()[-1]

    unpacked = tmp_path / "unpacked"
    source = built("build_sdist", checkout)
    subprocess.run(["tar", "-xzf", str(source), "--one-top-level=unpacked"], cwd=tmp_path, check=True)
    for folder in (checkout, next(unpacked.iterdir())):
        with zipfile.ZipFile(built("build_wheel", folder)) as wheel:
            assert json.loads(wheel.read(f"eaft_verl/{BUILT}")) == {"commit": head, "dirty": False, "diff": ""}
            assert {"eaft_verl/reporting/paper.json", "eaft_verl/recipe/defaults.yaml"} <= set(wheel.namelist())
    assert git(checkout, "status", "--porcelain", "--", "eaft_verl") == "", "nothing is left in the checkout"
