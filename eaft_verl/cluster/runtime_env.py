"""What travels with a job: the files of the working folder and the environment of its processes."""

import fnmatch
import importlib.metadata
import os
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from packaging.requirements import Requirement

from eaft_verl.boundary import holds_password, looks_secret
from eaft_verl.errors import ConfigError

MAX_UPLOAD = 100 << 20  # bytes; Ray's dashboard refuses a larger request body with status 413
_SAID = ("credentials", "secret", "service_account", "service-account", "password", "api_key", "apikey")
CREDENTIALS = (  # by name, in small letters; a trailing slash: a folder
    *(
        ".env",
        ".env.*",
        "*.env",
        ".envrc",
        "*.token",
        "auth_token",
        "*.pem",
        "*.key",
        "*.p12",
        "*.pfx",
        "*.jks",
        "*.ppk",
    ),
    *(
        ".netrc*",
        "_netrc",
        "*.netrc*",
        ".pypirc",
        ".npmrc",
        ".pgpass",
        ".git-credentials",
        ".htpasswd",
        "*.kdbx",
        "*.ovpn",
    ),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*credentials", "kubeconfig*", "*.kubeconfig", "*.keytab"),
    *(
        f"*{what}*.{kind}"
        for what in _SAID
        for kind in ("json", "yaml", "yml", "toml", "ini", "cfg", "txt", "csv", "xml")
    ),
    *(".ray/", ".ssh/", ".aws/", ".azure/", ".gcloud/", ".gnupg/", ".kube/", ".docker/", ".sky/", ".huggingface/"),
)
_BULK = (  # a leading slash: in the top folder only
    *("/runs/", "/data/", "/outputs/", "/checkpoints/", "/build/", "/wandb/", ".git/", ".venv/", "__pycache__/"),
    *(".*_cache/", ".hypothesis/", "*.egg-info/", "*.safetensors", "*.bin", "*.pt", "*.gguf", "*.parquet"),
)
EXCLUDES = (*_BULK, *CREDENTIALS)  # secrets do not travel with code, where git lists them neither
_NEW = ("--others", "--exclude-standard")  # options of git ls-files
SETTINGS = (  # settings of the caller that hold on the cluster too; EAFT_DATA: where the recipes look for data
    *("NCCL_*", "GLOO_*", "TORCH_NCCL_*", "VLLM_*", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "WANDB_MODE"),
    *("RAY_AUTH_MODE", "EAFT_DATA"),
)
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
    settings = {name: environ[name] for name in sorted(environ) if _matches(name, SETTINGS) and not looks_secret(name)}
    variables = {**(defaults or {}), **settings, **(asked or {})}
    _refuse_passwords(settings)
    if wrong := [name for name, value in variables.items() if not isinstance(value, str)]:
        raise ConfigError(f"environment variable {wrong[0]}={variables[wrong[0]]!r} must be text; quote it")
    taken = (job or {}).get("env_vars") or {}
    variables = {name: value for name, value in variables.items() if name not in taken}
    return {"env_vars": variables} if variables else {}


def _refuse_passwords(settings: Mapping[str, str]) -> None:
    for name in settings:
        if holds_password(settings[name]):
            raise ConfigError(
                f"{name} holds a password in its URL, which the job's list would show; set it on the nodes"
            )


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
    check_modules(sizes)
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
    """What travels, relative, in order: where git knows the folder what it lists, what is new and not ignored, and
    `needed`; else everything. Without what EXCLUDES names, and without links that lead out of the folder."""
    return sorted(name for name in _candidates(folder, needed) if not _stays(PurePosixPath(name), EXCLUDES))


def held_back(folder: Path) -> list[str]:
    """Files that would travel and stay because of names that credentials have."""
    return sorted(name for name in _candidates(folder, ()) if _stays(PurePosixPath(name), CREDENTIALS))


def untracked(folder: Path) -> list[str]:
    """Files of a checkout that travel although git does not track them."""
    return sorted({*package_files(folder)} & {*_git_lists(folder, *_NEW)}) if _git_lists(folder) else []


def _candidates(folder: Path, needed: Sequence[str]) -> Iterator[str]:
    """Names of the files there are, before any is left out for its name."""
    listed, inside = _git_lists(folder, "--recurse-submodules"), folder.resolve()
    names = {*listed, *_git_lists(folder, *_NEW), *needed} if listed else _walk(folder)
    for name in names:
        target = (folder / name).resolve()
        if target.is_file() and target.is_relative_to(inside):
            yield name


def check_modules(names: Iterable[str]) -> None:
    """ConfigError for a module among what travels that would be run in place of Python's or of a package of ours: Ray
    puts the folder of a job first on the path of its processes."""
    required = {Requirement(line).name for line in importlib.metadata.requires("eaft-verl") or []}
    taken = sys.stdlib_module_names | {name.replace("-", "_") for name in required}
    for name in names:
        top, _, rest = name.partition("/")
        if top.removesuffix(".py") in taken and (rest == "__init__.py" or (not rest and top.endswith(".py"))):
            raise ConfigError(
                f"{name} would be run in place of Python's own or an installed module `{top.removesuffix('.py')}`, "
                "because the job's folder comes first on its path; rename it, or start from another folder"
            )


def _git_lists(folder: Path, *options: str) -> list[str]:
    """Nothing where git is absent or does not know the folder; a name that is no UTF-8 is not found and stays."""
    git = ["git", "-C", str(folder), "ls-files", "-z", *options]
    try:
        return subprocess.run(git, capture_output=True, check=True).stdout.decode(errors="replace").split("\0")[:-1]
    except (OSError, subprocess.CalledProcessError):
        return []


def _walk(folder: Path) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        here = PurePosixPath(Path(root).relative_to(folder))
        # folders of credentials are gone through: what stays of them is said
        folders[:] = [name for name in folders if not excluded(here / name, is_folder=True, patterns=_BULK)]
        yield from ((here / name).as_posix() for name in files)


def _stays(path: PurePosixPath, patterns: Sequence[str]) -> bool:
    parents = list(path.parents)[:-1]
    return excluded(path, is_folder=False, patterns=patterns) or any(
        excluded(parent, is_folder=True, patterns=patterns) for parent in parents
    )


def excluded(path: PurePosixPath, *, is_folder: bool, patterns: Sequence[str] = EXCLUDES) -> bool:
    """Whether one of the patterns names this relative path."""
    kind = (pattern for pattern in patterns if pattern.endswith("/") == is_folder)
    return _matches(path.name.lower(), (p.strip("/") for p in kind if not p.startswith("/") or len(path.parts) == 1))
