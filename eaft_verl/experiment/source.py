"""Which code this is: the commit of the package's own checkout, or the one it was built from; a hash of its files.

Standard library only: building a wheel runs it too, see `wheel.py`.
"""

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILT = "built_from.json"  # in a wheel and a source distribution: what `commit_of` said where it was built
UNKNOWN = {"commit": "unknown", "dirty": None, "diff": ""}
_DIFF = 4000  # characters


def commit(package: Path = ROOT) -> dict[str, Any]:
    """{commit, dirty, diff}: of the checkout whose package this is, else of the build; commit 'unknown' for neither.

    A repository around the folder in which the package merely lies says nothing of it. dirty: whether files of the
    package, tracked or new, differ from the commit, `diff` names them; None where that is not known.
    """
    return commit_of(package.parent, package.name) or _built_from(package) or dict(UNKNOWN)


def commit_of(checkout: Path, package: str) -> dict[str, Any] | None:
    """As `commit`, of the repository whose top is `checkout` and which holds the package; None where there is none."""
    top = _git(checkout, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != checkout.resolve():
        return None
    if _git(checkout, "ls-files", "--error-unmatch", f"{package}/__init__.py", "pyproject.toml") is None:
        return None
    head = _git(checkout, "rev-parse", "HEAD")
    changed = _git(checkout, "status", "--porcelain", "--untracked-files=all", "--", package)
    return None if not head or changed is None else {"commit": head, "dirty": bool(changed), "diff": changed[:_DIFF]}


def code_hash(package: Path = ROOT) -> str:
    """sha256 (16 hex digits) of names and bytes of the package's files: equal, equal code, whatever was committed."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*")):
        name = file.relative_to(package).as_posix()
        if file.is_file() and "__pycache__" not in name and name != BUILT:
            digest.update(f"{name}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _built_from(package: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((package / BUILT).read_text(encoding="utf-8"))
        return {key: found[key] for key in UNKNOWN}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _git(folder: Path, *words: str) -> str | None:
    """What git prints, in that folder whatever GIT_DIR says; None where it fails."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False, env=clean
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):  # ValueError: bytes that are no text
        return None
    return done.stdout.strip() if done.returncode == 0 else None
