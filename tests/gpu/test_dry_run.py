"""The command for the day a GPU is at hand, on the CPU: every part runs at toy sizes, or says why not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_part_is_there(tmp_path: Path) -> None:
    words = ["--dry-run", "--json", str(tmp_path / "gpu.json"), "--work", str(tmp_path / "work")]
    python = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(["bash", "tests/gpu/run.sh", *words], cwd=ROOT, env=python, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {"parity", "losses", "engine", "trainers", "vllm"} < found.keys()
    assert "tests collected" in found["parity"]["pytest"]
    assert found["engine"]["arms that resolve"] == found["trainers"]["arms that resolve"] == "sft, eaft, sft_kl, grpo"
    ways = {row["way"]: row for row in found["losses"]["ways"][0]["rows"]}
    assert ways["EAFT, ours"]["dX"] < 1e-5 and ways["EAFT, as LLaMA-Factory"]["dW"] < 1e-5
    assert "EAFT / CE, time" in done.stdout


@pytest.mark.parametrize("part", ["losses", "engine"])
def test_a_part_that_fails_says_so(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.gpu import __main__ as command

    def broken(*_: object) -> dict[str, str]:
        raise ValueError("no such kernel")

    monkeypatch.setitem(command.PARTS, part, broken)
    assert command.run([part], True, tmp_path)[part]["failed"] == "ValueError: no such kernel"
