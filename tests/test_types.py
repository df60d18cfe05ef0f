"""The type checker finds nothing in the package, and no function is too tangled to follow."""

import subprocess
import sys
from pathlib import Path

import pytest
from radon.complexity import cc_visit

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "eaft_verl").rglob("*.py"))
MAX_COMPLEXITY = 15


def test_mypy_finds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"no issues found in {len(FILES)} source files" in done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_function_is_tangled(path: Path) -> None:
    found = {block.name: block.complexity for block in cc_visit(path.read_text(encoding="utf-8"))}
    assert not {name: value for name, value in found.items() if value > MAX_COMPLEXITY}
