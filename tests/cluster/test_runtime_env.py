"""What travels with a job: variables by precedence, files by exclusion, and the size limit of Ray's dashboard."""

import os
import shutil
import subprocess
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from eaft_verl.cluster import runtime_env
from eaft_verl.cluster.runtime_env import (
    JOB_ENV,
    asked_variables,
    build_runtime_env,
    excluded,
    held_back,
    package,
    package_files,
    untracked,
)
from eaft_verl.errors import ConfigError


def variables(environ: dict[str, str], **how: object) -> dict[str, str]:
    return build_runtime_env(environ, **how).get("env_vars", {})


def test_a_setting_of_the_caller_travels_and_other_variables_do_not() -> None:
    environ = {"NCCL_DEBUG": "INFO", "EAFT_DATA": "/shared/data", "PATH": "/bin", "HOME": "/root", "EDITOR": "vi"}
    assert variables(environ) == {"EAFT_DATA": "/shared/data", "NCCL_DEBUG": "INFO"}


@pytest.mark.parametrize("name", ["VLLM_API_KEY", "WANDB_API_KEY", "HF_TOKEN", "NCCL_SECRET", "RAY_AUTH_TOKEN"])
def test_a_secret_never_travels_by_pattern(name: str) -> None:
    assert build_runtime_env({name: "x"}) == {}


def test_precedence_defaults_then_caller_then_asked_for_by_name() -> None:
    defaults = {"NCCL_DEBUG": "default", "OMP_NUM_THREADS": "default", "A": "default"}
    environ = {"NCCL_DEBUG": "caller", "OMP_NUM_THREADS": "caller"}
    found = variables(environ, defaults=defaults, asked={"NCCL_DEBUG": "asked"})
    assert found == {"NCCL_DEBUG": "asked", "OMP_NUM_THREADS": "caller", "A": "default"}


def test_the_driver_leaves_out_what_the_job_has_even_at_equal_values() -> None:
    job = {"env_vars": {"NCCL_DEBUG": "INFO"}, "working_dir": "gcs://package.zip"}
    environ = {"NCCL_DEBUG": "INFO", "NCCL_ALGO": "Ring"}
    assert build_runtime_env(environ, job=job) == {"env_vars": {"NCCL_ALGO": "Ring"}}
    assert build_runtime_env({"NCCL_DEBUG": "WARN"}, job=job) == {}
    assert build_runtime_env(environ, job={}) == {"env_vars": {"NCCL_ALGO": "Ring", "NCCL_DEBUG": "INFO"}}


def test_the_defaults_of_a_job_are_text_and_give_a_stopped_run_minutes_to_save() -> None:
    assert all(type(value) is str for value in JOB_ENV.values())
    assert int(JOB_ENV["RAY_JOB_STOP_WAIT_TIME_S"]) >= 300


def test_a_number_as_value_is_refused_before_ray_refuses_it() -> None:
    with pytest.raises(ConfigError, match="A=1 must be text"):
        build_runtime_env({}, asked={"A": 1})


def test_variables_asked_for() -> None:
    assert asked_variables(["A=1", "B=", "C=x=y", "D"], {"D": "here"}) == {"A": "1", "B": "", "C": "x=y", "D": "here"}
    for word in ("NOWHERE", "=1"):
        with pytest.raises(ConfigError, match="must be NAME=VALUE"):
            asked_variables([word], {})


@pytest.mark.parametrize(
    ("path", "is_folder", "stays"),
    [
        ("runs", True, True),
        ("eaft_verl/data", True, False),  # a leading slash means: in the top folder only
        ("data", True, True),
        ("data", False, False),  # a pattern for folders spares a file of that name
        ("eaft_verl/__pycache__", True, True),
        (".git", True, True),
        ("sub/.venv", True, True),
        ("model/weights.safetensors", False, True),
        ("recipes/math.yaml", False, False),
        ("deep/.env", False, True),
        ("keys/server.pem", False, True),
        (".netrc", False, True),
        ("home/id_rsa", False, True),
        ("id_ed25519.pub", False, True),
        ("certificate.p12", False, True),
        (".git-credentials", False, True),
        ("gcp-credentials-7.json", False, True),
        ("deploy/.aws", True, True),
        ("eaft_verl/tokens/stats.py", False, False),
        ("credentials.py", False, False),
    ],
)
def test_exclusion(path: str, is_folder: bool, stays: bool) -> None:
    assert excluded(PurePosixPath(path), is_folder=is_folder) is stays


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    for name, text in (
        ("recipes/mine.yaml", "arms: {}"),
        ("prog.py", "print()"),
        ("runs/old/model.json", "{}"),
        (".git/config", "secret"),
        ("weights.pt", "0"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "prog.py").chmod(0o755)
    return folder


def test_the_package_holds_code_and_recipes_with_their_modes(project: Path, tmp_path: Path) -> None:
    archive = package(project, tmp_path / "out" / "code.zip", needed=["recipes/mine.yaml"])
    with zipfile.ZipFile(archive) as packed:
        assert packed.namelist() == ["prog.py", "recipes/mine.yaml"]
        assert packed.read("recipes/mine.yaml") == b"arms: {}"
        assert packed.getinfo("prog.py").external_attr >> 16 == 0o755


def test_equal_contents_give_equal_bytes_so_that_ray_uploads_once(project: Path, tmp_path: Path) -> None:
    first = package(project, tmp_path / "1.zip", needed=["prog.py"]).read_bytes()
    os.utime(project / "prog.py", (0, 0))
    assert package(project, tmp_path / "2.zip", needed=["prog.py"]).read_bytes() == first


def test_a_recipe_that_would_stay_behind_is_refused(project: Path, tmp_path: Path) -> None:
    (project / "runs" / "mine.yaml").write_text("arms: {}")
    with pytest.raises(ConfigError, match="runs/mine.yaml does not travel with the job"):
        package(project, tmp_path / "code.zip", needed=["runs/mine.yaml"])


def test_a_package_larger_than_ray_takes_is_refused_with_the_largest_files(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runtime_env.MAX_UPLOAD == 104_857_600, "the dashboard's limit, from its own 413 message"
    monkeypatch.setattr(runtime_env, "MAX_UPLOAD", 2 << 20)
    (project / "noise.dat").write_bytes(os.urandom(3 << 20))  # random: it does not compress
    with pytest.raises(ConfigError, match=r"larger than the 2 MiB.*largest: .*noise.dat \(3 MiB\)"):
        package(project, tmp_path / "code.zip", needed=["prog.py"])
    assert not (tmp_path / "code.zip").exists()
    for part in range(5):  # no file is large, the folder is
        (project / "samples" / "deep").mkdir(parents=True, exist_ok=True)
        (project / "samples" / "deep" / f"{part}.json").write_bytes(os.urandom(1 << 20))
    with pytest.raises(ConfigError, match=r"largest: samples/ \(5 MiB\), recipes/ \(0 MiB\), noise.dat \(3 MiB\)"):
        package(project, tmp_path / "code.zip", needed=["prog.py"])


def test_of_a_git_checkout_what_git_lists_or_would_list_travels_but_credentials(project: Path, tmp_path: Path) -> None:
    shutil.rmtree(project / ".git")
    for name in ("notes.txt", "my.netrc.bak", "recipes/new.yaml", "id_rsa", "with space ü.py", "ignored.csv"):
        (project / name).write_text(name)
    (project / ".gitignore").write_text("*.csv\n")
    for words in (["init", "-q"], ["add", "prog.py", "recipes/mine.yaml", "id_rsa", "with space ü.py"]):
        subprocess.run(["git", "-C", str(project), *words], check=True)
    (project / "recipes" / "mine.yaml").write_text("arms: {a: {}}")  # changed and not committed
    found = package_files(project, ["ignored.csv"])
    tracked = ["prog.py", "recipes/mine.yaml", "with space ü.py"]
    assert found == sorted([".gitignore", "ignored.csv", "notes.txt", "recipes/new.yaml", *tracked])
    with zipfile.ZipFile(package(project, tmp_path / "code.zip", needed=["recipes/new.yaml"])) as packed:
        assert packed.read("recipes/mine.yaml") == b"arms: {a: {}}"
    assert untracked(project) == [".gitignore", "notes.txt", "recipes/new.yaml"]
    assert held_back(project) == ["id_rsa", "my.netrc.bak"]
    (project / "prog.py").unlink()  # git still lists it
    assert "prog.py" not in package_files(project)
    assert package_files(project / "recipes") == ["mine.yaml", "new.yaml"], "a folder of a checkout"


def test_outside_git_what_stays_for_its_name_is_said(project: Path) -> None:
    names = (".aws/config", "deep/.env", "server.PEM", "client_secret.json", ".ssh/config", "token.py", "secrets.md")
    for name in names:
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("x")
    kept = [".aws/config", ".ssh/config", "client_secret.json", "deep/.env", "server.PEM"]
    assert held_back(project) == kept and untracked(project) == []
    assert not {*kept} & {*package_files(project)} and "secrets.md" in package_files(project)


def test_a_link_that_leads_out_of_the_folder_does_not_travel(project: Path, tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("key")
    (project / "notes.md").symlink_to(tmp_path / "id_rsa")
    (project / "same.yaml").symlink_to(project / "recipes" / "mine.yaml")
    assert package_files(project) == ["prog.py", "recipes/mine.yaml", "same.yaml"]


@pytest.mark.parametrize("name", ["random.py", "torch.py", "json/__init__.py", "lm_eval.py"])
def test_a_module_that_would_replace_an_installed_one_is_refused(project: Path, tmp_path: Path, name: str) -> None:
    (project / name).parent.mkdir(exist_ok=True)
    (project / name).write_text("")
    with pytest.raises(ConfigError, match=rf"{name} would be run in place of"):
        package(project, tmp_path / "code.zip", needed=["prog.py"])


def test_a_setting_with_a_password_is_refused() -> None:
    with pytest.raises(ConfigError, match="EAFT_DATA holds a password"):
        build_runtime_env({"EAFT_DATA": "s3://me:pw@host/x"})
