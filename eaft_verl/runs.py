"""A run is a directory. It is the only interface between commands; everything below is plain files.

RUN/run.json                      what it is, its status and the keys that decide comparability
RUN/config.yaml                   the resolved configuration
RUN/env.json                      versions, hardware, commit, uncommitted diff
RUN/metrics.jsonl                 one row per logged step, append only
RUN/checkpoints/step_000016/      Hugging Face export of the model at that step
RUN/eval/step_000016/NAME.json    one record per benchmark
RUN/samples/step_000016/NAME.jsonl  one row per example of that benchmark
"""

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eaft_verl.errors import RunError
from eaft_verl.files import json_line, locked, read_json, read_jsonl, write_json, write_jsonl, write_text

SCHEMA = 1
_STEP_DIR = re.compile(r"^step_(\d{6,})$")
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt|Exit|Interrupted)\b")
_CAUSE_LENGTH = 2000


def run_name(arm: str, seed: int) -> str:
    """Folder of an arm's run in the output folder: 'eaft-seed0'."""
    return f"{arm}-seed{seed}"


def steps_in(folder: Path, file: str = "") -> dict[int, Path]:
    """{step: folder} of a folder's steps that hold `file`, ascending."""
    found = {int(m[1]): step for step in folder.glob("step_*") if (m := _STEP_DIR.fullmatch(step.name))}
    return {step: found[step] for step in sorted(found) if (found[step] / file).exists()}


def step_name(step: int) -> str:
    """Directory name of a step: 16 -> 'step_000016'."""
    return f"step_{step:06d}"


def cause_of(error: BaseException) -> str:
    """run.json's `error`: type and message; of a traceback that a worker sent, what stands at its end."""
    lines = _COLOR.sub("", str(error)).strip().splitlines()
    raised = [number for number, line in enumerate(lines) if _RAISED.match(line)]
    if raised and any(line.startswith("  File ") for line in lines):
        lines = lines[raised[-1] :]
    return f"{type(error).__name__}: {chr(10).join(lines)}"[:_CAUSE_LENGTH]


class Run:
    """One run directory: created once, never overwritten."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).resolve()
        if not (self.path / "run.json").exists():
            raise RunError(f"{self.path} is not a run directory: it has no run.json")

    @classmethod
    def create(cls, path: Path | str, *, info: dict[str, Any], config: str, env: dict[str, Any]) -> "Run":
        """Make the directory and its three descriptions.

        Args: info: goes into run.json (kind, recipe, arm, seed, model, keys, declared). config: resolved YAML.
        env: versions and hardware. Raises RunError if the directory holds anything already.
        """
        path = Path(path).resolve()
        if path.exists() and any(path.iterdir()):
            raise RunError(f"{path} is not empty and a run is never overwritten; choose another output or remove it")
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / "config.yaml", config)
        write_json(path / "env.json", env)
        write_json(path / "run.json", {"schema": SCHEMA, "status": "created", "created": time.time(), **info})
        return cls(path)

    @property
    def info(self) -> dict[str, Any]:
        """run.json."""
        return read_json(self.path / "run.json")

    @property
    def env(self) -> dict[str, Any]:
        """env.json."""
        return read_json(self.path / "env.json")

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration as plain containers; secrets are references to variables, see `masked`."""
        from omegaconf import OmegaConf

        tree: Any = OmegaConf.to_container(OmegaConf.load(self.path / "config.yaml"), resolve=False)
        return dict(tree)

    def update(self, **fields: Any) -> None:
        """Change fields of run.json, e.g. status='finished'."""
        write_json(self.path / "run.json", {**self.info, **fields})

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; RunError at once when another one is working in it."""
        busy = f"{self.path} is in use by another process; wait for it or choose another output"
        with locked(self.path / ".lock", busy=busy):
            yield

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to metrics.jsonl and hand it to the operating system."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json_line(row))

    def metrics(self, split: str = "train") -> list[dict[str, Any]]:
        """Logged rows of one split ('train' or 'val'), in order of step."""
        return [row for row in read_jsonl(self.path / "metrics.jsonl") if row.get("split") == split]

    def rewind_metrics(self, step: int) -> None:
        """Drop rows after `step` (and a torn line): the history must be that of the resumed run."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            write_jsonl(path, [row for row in read_jsonl(path) if row["step"] <= step])

    def write_eval(self, step: int, name: str, record: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        """Store one benchmark; samples first, so that a record always has its samples."""
        write_jsonl(self.path / "samples" / step_name(step) / f"{name}.jsonl", samples)
        write_json(self.path / "eval" / step_name(step) / f"{name}.json", record)

    def evals(self) -> dict[int, dict[str, dict[str, Any]]]:
        """{step: {benchmark: record}}, steps ascending."""
        return {
            step: {file.stem: read_json(file) for file in sorted(folder.glob("*.json"))}
            for step, folder in steps_in(self.path / "eval").items()
        }

    def samples(self, step: int, name: str) -> list[dict[str, Any]]:
        """Per-example rows of one benchmark at one step."""
        return read_jsonl(self.path / "samples" / step_name(step) / f"{name}.jsonl")

    def checkpoints(self) -> dict[int, Path]:
        """{step: folder} of complete Hugging Face exports (they carry a config.json), steps ascending."""
        return steps_in(self.path / "checkpoints", "config.json")


def drop_checkpoints_after(run: Run, step: int) -> None:
    """Exports of steps that are about to be trained again."""
    for found, folder in run.checkpoints().items():
        if found > step:
            shutil.rmtree(folder)
