"""What travels with a job: the files of the working folder and the environment of its processes."""

import fnmatch
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from eaft_verl.errors import ConfigError

MAX_UPLOAD = 100 << 20  # bytes; Ray's dashboard refuses a larger request body with status 413
EXCLUDES = (  # a leading slash: in the top folder only; a trailing one: a folder
    *("/runs/", "/data/", "/outputs/", "/checkpoints/", "/build/", "/wandb/", ".git/", ".venv/", "__pycache__/"),
    *(".*_cache/", ".hypothesis/", "*.egg-info/", "*.safetensors", "*.bin", "*.pt", "*.gguf", "*.parquet"),
    *(".env", ".ray/", "*.token", "*.pem", "*.key"),  # secrets do not travel with code
)
SETTINGS = (  # settings of the caller that hold on the cluster too; EAFT_DATA: where the recipes look for data
    *("NCCL_*", "GLOO_*", "TORCH_NCCL_*", "VLLM_*", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "WANDB_MODE"),
    *("RAY_AUTH_MODE", "EAFT_DATA"),
)
_SECRET = re.compile(r"(?i)key|token|secret|passw|cred")
JOB_ENV = {
    "RAY_JOB_STOP_WAIT_TIME_S": "600",  # a stopped run is saved first; Ray kills after 3 s otherwise
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the driver evaluates, so it must see its node's GPUs
    "TOKENIZERS_PARALLELISM": "false",
}


def build_runtime_env(
    environ: Mapping[str, str],
    *,
    job: Mapping[str, Any] | None = None,
    defaults: Mapping[str, str] | None = None,
    asked: Mapping[str, str] | None = None,
    working_dir: str | None = None,
) -> dict[str, Any]:
    """The runtime_env of a job (`job` None) or of the driver inside one (`job`: what the job was submitted with).

    Later wins: `defaults`, what `environ` holds of SETTINGS, what is `asked` for by name. Ray refuses a variable that
    job and driver both set, even to the same value, so the driver leaves out every one the job has: the job wins.
    Names that look like secrets never travel by pattern: job variables are shown in the dashboard.
    Raises ConfigError for a value that is not text.
    """
    variables = dict(defaults or {})
    for name in sorted(environ):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in SETTINGS) and not _SECRET.search(name):
            variables[name] = environ[name]
    variables |= asked or {}
    if wrong := [name for name, value in variables.items() if not isinstance(value, str)]:
        raise ConfigError(f"environment variable {wrong[0]}={variables[wrong[0]]!r} must be text; quote it")
    if job is not None:
        taken = job.get("env_vars") or {}
        variables = {name: value for name, value in variables.items() if name not in taken}
    built: dict[str, Any] = {"env_vars": variables} if variables else {}
    return {**built, "working_dir": working_dir} if working_dir else built


def asked_variables(words: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """`NAME=VALUE` as written, `NAME` with its value here; ConfigError when it has none."""
    found = {}
    for word in words:
        name, given, value = word.partition("=")
        if not name or (not given and name not in environ):
            raise ConfigError(f"--env {word!r} must be NAME=VALUE, or the name of a variable that is set here")
        found[name] = value if given else environ[name]
    return found


def package(folder: Path, archive: Path, *, needed: str) -> Path:
    """Write what a job needs of `folder` into the zip `archive`; equal contents give equal bytes.

    Raises ConfigError when it is larger than Ray takes, naming the largest files, or without the file `needed`.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    sizes = {}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in package_files(folder):
            name = file.relative_to(folder).as_posix()
            info = zipfile.ZipInfo(name)  # of 1980: a time stamp would make every upload a new package
            info.external_attr = (file.stat().st_mode & 0o777) << 16
            sizes[name] = file.stat().st_size
            if sum(sizes.values()) > 10 * MAX_UPLOAD:
                break
            packed.writestr(info, file.read_bytes(), zipfile.ZIP_DEFLATED)
    if Path(needed).as_posix() not in sizes:
        raise ConfigError(f"{needed} does not travel with the job: {folder}'s {', '.join(EXCLUDES[:5])} ... stay here")
    if archive.stat().st_size > MAX_UPLOAD or sum(sizes.values()) > 10 * MAX_UPLOAD:
        archive.unlink()
        largest = ", ".join(f"{name} ({sizes[name] >> 20} MiB)" for name in sorted(sizes, key=lambda n: -sizes[n])[:3])
        raise ConfigError(
            f"{folder} is larger than the {MAX_UPLOAD >> 20} MiB that Ray takes with a job; largest: {largest}. Move "
            "data to the shared file system, or start from a folder that holds only code and recipes"
        )
    return archive


def package_files(folder: Path) -> Iterator[Path]:
    """Files under `folder` that no pattern of EXCLUDES names, in order."""
    for root, folders, files in os.walk(folder):
        here = PurePosixPath(Path(root).relative_to(folder))
        folders[:] = sorted(name for name in folders if not excluded(here / name, is_folder=True))
        yield from (
            Path(root, name)
            for name in sorted(files)
            if not excluded(here / name, is_folder=False) and Path(root, name).is_file()
        )


def excluded(path: PurePosixPath, *, is_folder: bool) -> bool:
    """Whether a pattern of EXCLUDES names this relative path."""
    return any(
        fnmatch.fnmatchcase(path.name, pattern.strip("/"))
        for pattern in EXCLUDES
        if pattern.endswith("/") == is_folder and (not pattern.startswith("/") or len(path.parts) == 1)
    )
