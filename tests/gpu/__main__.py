"""The parts of `bash tests/gpu/run.sh`: each a function that gives the figures it found, or says why it has none.

A part that fails does not stop the others; the exit code is 1 then.
"""

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.gpu import losses, training

HERE = Path(__file__).parent
Part = Callable[[bool, Path], dict[str, Any]]


def parity(dry_run: bool, _work: Path) -> dict[str, Any]:
    """Statistics, objectives, divergences and kernels against float64: pytest tests/gpu, only collected if dry."""
    words = ["--ignore", str(HERE / "test_dry_run.py"), *(["--collect-only"] if dry_run else [])]
    command = [sys.executable, "-m", "pytest", str(HERE), "-q", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    said = (done.stdout.strip() or done.stderr.strip()).splitlines()
    failed = [line.removeprefix("FAILED ") for line in said if line.startswith("FAILED ")]
    return {"pytest": said[-1]} if done.returncode == 0 else {"failed": "; ".join([said[-1], *failed])[:2000]}


def vllm(dry_run: bool, work: Path) -> dict[str, Any]:
    """GRPO with verl's rollouts by vLLM, and evaluation by it, on the model of `trainers`."""
    if dry_run or importlib.util.find_spec("vllm") is None:
        return {"skipped": "vllm is not installed" if not dry_run else "dry run"}
    return training.grpo(work)


PARTS: dict[str, Part] = {
    "parity": parity,
    "losses": losses.measure,
    "engine": training.engine_parity,
    "trainers": training.compared,
    "vllm": vllm,
}


def about() -> dict[str, Any]:
    """What it ran on."""
    cuda = torch.cuda.is_available()
    made_for = {
        name: _version(name) for name in ("torch", "triton", "transformers", "verl", "ray", "vllm", "flash_attn")
    }
    device = torch.cuda.get_device_name() if cuda else platform.processor() or "cpu"
    return {"device": device, "python": platform.python_version(), **made_for}


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def run(names: list[str], dry_run: bool, work: Path) -> dict[str, Any]:
    """{part: what it found and its seconds}, printed as they come."""
    found: dict[str, Any] = {"about": about(), "dry_run": dry_run}
    print(" ".join(f"{key}={value}" for key, value in found["about"].items()))
    for name in names:
        started = time.monotonic()
        try:
            found[name] = PARTS[name](dry_run, work)
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
        found[name]["part_s"] = round(time.monotonic() - started, 1)
        print("\n".join(lines(name, found[name])), flush=True)
    return found


def lines(name: str, found: dict[str, Any]) -> list[str]:
    """Rows of the table: part, figure, value."""
    return [f"| {name:9} | {key:34} | {value} |" for key, value in found.items() if not isinstance(value, list | dict)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--json", type=Path, default=Path("runs/gpu.json"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/eaft_gpu"), help="models and runs; made anew")
    parser.add_argument("--parts", default=",".join(PARTS))
    options = parser.parse_args()
    if not (options.dry_run or torch.cuda.is_available()):
        print("no GPU: torch.cuda.is_available() is false; --dry-run checks everything else", file=sys.stderr)
        return 2
    options.work.mkdir(parents=True, exist_ok=True)
    found = run(options.parts.split(","), options.dry_run, options.work)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {options.json}")
    return int(any("failed" in part for part in found.values() if isinstance(part, dict)))


if __name__ == "__main__":
    sys.exit(main())
