"""What travels with a job: the files of the working folder and the environment of its processes."""

import fnmatch
import os
import re
import subprocess
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from eaft_verl.errors import ConfigError

MAX_UPLOAD = 100 << 20  # bytes; Ray's dashboard refuses a larger request body with status 413
EXCLUDES = (  # a leading slash: in the top folder only; a trailing one: a folder
    *("/runs/", "/data/", "/outputs/", "/checkpoints/", "/build/", "/wandb/", ".git/", ".venv/", "__pycache__/"),
    *(".*_cache/", ".hypothesis/", "*.egg-info/", "*.safetensors", "*.bin", "*.pt", "*.gguf", "*.parquet"),
    # secrets do not travel with code, where git lists them neither
    *(".env", ".env.*", "*.token", "*.pem", "*.key", "*.p12", "*.pfx", ".netrc", "_netrc", ".pypirc", ".npmrc"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*credentials", "*credentials*.json"),
    *(".ray/", ".ssh/", ".aws/", ".gnupg/", ".kube/", ".docker/"),
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
) -> dict[str, Any]:
    """The runtime_env of a job (`job` None) or of the driver inside one (`job`: what the job was submitted with).

    Later wins: `defaults`, what `environ` holds of SETTINGS, what is `asked` for by name. Ray refuses a variable that
    job and driver both set, even to the same value, so the driver leaves out every one the job has: the job wins.
    Names that look like secrets never travel by pattern: job variables are shown in the dashboard.
    Raises ConfigError for a value that is not text.
    """
    settings = {
        name: environ[name] for name in sorted(environ) if _matches(name, SETTINGS) and not _SECRET.search(name)
    }
    variables = {**(defaults or {}), **settings, **(asked or {})}
    if wrong := [name for name, value in variables.items() if not isinstance(value, str)]:
        raise ConfigError(f"environment variable {wrong[0]}={variables[wrong[0]]!r} must be text; quote it")
    taken = (job or {}).get("env_vars") or {}
    variables = {name: value for name, value in variables.items() if name not in taken}
    return {"env_vars": variables} if variables else {}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def asked_variables(words: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """`NAME=VALUE` as written, `NAME` with its value here; ConfigError when it has none."""
    found = {}
    for word in words:
        name, given, value = word.partition("=")
        if not name or (not given and name not in environ):
            raise ConfigError(f"--env {word!r} must be NAME=VALUE, or the name of a variable that is set here")
        found[name] = value if given else environ[name]
    return found


def package(folder: Path, archive: Path, *, needed: Sequence[str]) -> Path:
    """Write what a job needs of `folder` into the zip `archive`; equal contents give equal bytes.

    Ours and not Ray's `working_dir`: that one takes patterns of what stays, no list of what goes, and learns only from
    the dashboard's refusal that a package is too large.
    Raises ConfigError without a `needed` file, and for more than Ray takes, naming the largest folders and files.
    """
    sizes = {name: (folder / name).stat().st_size for name in package_files(folder, needed)}
    if absent := [name for name in needed if name not in sizes]:
        kept = ", ".join(EXCLUDES[:5])
        raise ConfigError(f"{absent[0]} does not travel with the job: {folder}'s {kept} ... stay here")
    archive.parent.mkdir(parents=True, exist_ok=True)
    if small := sum(sizes.values()) <= 10 * MAX_UPLOAD:
        with zipfile.ZipFile(archive, "w") as packed:
            for name in sizes:
                info = zipfile.ZipInfo(name)  # of 1980: a time stamp would make every upload a new package
                info.external_attr = ((folder / name).stat().st_mode & 0o777) << 16
                packed.writestr(info, (folder / name).read_bytes(), zipfile.ZIP_DEFLATED)
    if not small or archive.stat().st_size > MAX_UPLOAD:
        archive.unlink(missing_ok=True)
        raise ConfigError(
            f"{folder} is larger than the {MAX_UPLOAD >> 20} MiB that Ray takes with a job; largest: {_largest(sizes)}"
            ". Move data to the shared file system, or start from a folder that holds only code and recipes"
        )
    return archive


def _largest(sizes: Mapping[str, int]) -> str:
    """The three largest top folders, then the three largest files."""
    folders: Counter[str] = Counter()
    for name, size in sizes.items():
        if "/" in name:
            folders[name.partition("/")[0] + "/"] += size
    return ", ".join(
        f"{name} ({size >> 20} MiB)" for name, size in (*folders.most_common(3), *Counter(sizes).most_common(3))
    )


def package_files(folder: Path, needed: Sequence[str] = ()) -> list[str]:
    """What travels, relative, in order: where git knows the folder what it lists and `needed`, else everything; without
    what EXCLUDES names."""
    listed = _git_lists(folder, "--recurse-submodules")
    names = {*listed, *needed} if listed else {path.relative_to(folder).as_posix() for path in _walk(folder)}
    return sorted(name for name in names if not _stays(PurePosixPath(name)) and (folder / name).is_file())


def left_behind(folder: Path) -> list[str]:
    """Files of a checkout that neither git nor its .gitignore knows: somebody's own module may be among them."""
    names = _git_lists(folder, "--others", "--exclude-standard") if _git_lists(folder) else []
    return [name for name in names if not _stays(PurePosixPath(name))]


def _git_lists(folder: Path, *options: str) -> list[str]:
    """Nothing where git is absent or does not know the folder; a name that is no UTF-8 is not found and stays."""
    git = ["git", "-C", str(folder), "ls-files", "-z", *options]
    try:
        return subprocess.run(git, capture_output=True, check=True).stdout.decode(errors="replace").split("\0")[:-1]
    except (OSError, subprocess.CalledProcessError):
        return []


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        here = PurePosixPath(Path(root).relative_to(folder))
        folders[:] = [name for name in folders if not excluded(here / name, is_folder=True)]
        yield from (Path(root, name) for name in files)


def _stays(path: PurePosixPath) -> bool:
    parents = list(path.parents)[:-1]
    return excluded(path, is_folder=False) or any(excluded(parent, is_folder=True) for parent in parents)


def excluded(path: PurePosixPath, *, is_folder: bool) -> bool:
    """Whether a pattern of EXCLUDES names this relative path."""
    kind = (pattern for pattern in EXCLUDES if pattern.endswith("/") == is_folder)
    return _matches(path.name, (p.strip("/") for p in kind if not p.startswith("/") or len(path.parts) == 1))
