"""A run is a directory. It is the only interface between commands; everything below is plain files.

RUN/run.json                      what it is, its status, seed, and the hashes of model, data, template and evaluation
RUN/config.yaml                   the resolved configuration
RUN/env.json                      commit and hash of the code, versions, hardware; run.json: what changed since then
RUN/.run.json, .config.yaml, .env.json  second copies of these three, read where the first is damaged
RUN/libraries.log                 what verl and its libraries warned of and printed
RUN/metrics.jsonl                 one row per logged step, append only
RUN/checkpoints/step_000016/      Hugging Face export of the model at that step
RUN/eval/step_000016/NAME.json    one record per benchmark
RUN/samples/step_000016/NAME.jsonl  one row per example of that benchmark
RUN/samples/step_000016/answers.jsonl  at the last step: greedy answers to some held-out prompts, to be read
"""

import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from eaft_verl.errors import RunError
from eaft_verl.files import (
    json_line,
    json_text,
    locked,
    read_json,
    read_jsonl,
    scan_jsonl,
    write_json,
    write_jsonl,
    write_text,
)

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


def answers_file(run: Path, step: int) -> Path:
    """Greedy answers to some held-out prompts; beside the samples of benchmarks, and none of them."""
    return run / "samples" / step_name(step) / "answers.jsonl"


class Run:
    """One run directory: created once, never overwritten."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).resolve()
        if not is_run(self.path):
            raise RunError(f"{self.path} is not a run directory: it has no run.json")

    @classmethod
    def create(cls, path: Path | str, *, info: dict[str, Any], config: str, env: dict[str, Any]) -> "Run":
        """Make the directory and its three descriptions.

        Args: info: goes into run.json (kind, recipe, arm, seed, model, keys, declared). config: resolved YAML.
        env: versions and hardware. Raises RunError if the directory holds anything already.
        """
        path = Path(path).resolve()
        if path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise RunError(f"{path} is not empty and a run is never overwritten; choose another output or remove it")
        path.mkdir(parents=True, exist_ok=True)
        _write_twice(path / "config.yaml", config)
        _write_twice(path / "env.json", json_text(env))
        return cls.describe(path, **{"status": "created", **info})

    @classmethod
    def describe(cls, path: Path | str, **info: Any) -> "Run":
        """Write run.json anew, of a new run or of one that has lost it."""
        text = json_text({"schema": SCHEMA, "created": time.time(), **info})
        _write_twice(Path(path).resolve() / "run.json", text)
        return cls(path)

    @property
    def info(self) -> dict[str, Any]:
        """run.json."""
        return _read_either(self.path / "run.json", json.loads)

    @property
    def env(self) -> dict[str, Any]:
        """env.json."""
        return _read_either(self.path / "env.json", json.loads)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration as plain containers; secrets are references to variables, see `masked`."""
        return _read_either(self.path / "config.yaml", _parse_config)

    def change_config(self, text: str) -> None:
        """Put another resolved configuration in the place of the first: what the run is gone on with."""
        _write_twice(self.path / "config.yaml", text)

    def update(self, **fields: Any) -> None:
        """Change fields of run.json, e.g. status='finished'."""
        _write_twice(self.path / "run.json", json_text({**self.info, **fields}))

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
        file = self.path / "metrics.jsonl"
        rows = [row for row in read_jsonl(file) if row.get("split") == split]
        if wrong := next((row for row in rows if not isinstance(row.get("step"), int)), None):
            raise RunError(f"{file} has a row whose step is {wrong.get('step')!r} and no number; remove that line")
        return rows

    def mend_metrics(self) -> list[int]:
        """Leave damaged lines of metrics.jsonl out, the file as it was kept beside it; their numbers, from 1."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        rows, damaged = scan_jsonl(path)
        damaged += [number for number, row in rows.items() if not isinstance(row.get("step"), int)]
        if damaged:
            shutil.copyfile(path, path.with_name("metrics.jsonl.damaged"))
            write_jsonl(path, [row for number, row in rows.items() if number not in damaged])
        return sorted(damaged)

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


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run: its run.json, or the copy of it."""
    return any((folder / name).exists() for name in ("run.json", ".run.json"))


def infos_in(output: Path) -> Iterator[dict[str, Any]]:
    """run.json of every run in an output folder whose own can be read."""
    for folder in sorted(path for path in output.glob("*/") if is_run(path)):
        with contextlib.suppress(RunError):
            yield Run(folder).info


def _write_twice(path: Path, text: str) -> None:
    for place in (path, path.with_name(f".{path.name}")):
        write_text(place, text)


def _read_either(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """A file that describes a run; where it is damaged or gone, its copy, which takes its place with a warning."""
    copy = path.with_name(f".{path.name}")
    for place in (path, copy):
        try:
            text = place.read_text(encoding="utf-8")
            found = parse(text)
        except (OSError, ValueError) as error:
            found = error
        if isinstance(found, dict):
            if place == copy:
                print(f"eaft: warning: {path} was damaged or missing; its copy is used", file=sys.stderr)
                with contextlib.suppress(OSError):  # a report may be made of a folder that cannot be written
                    write_text(path, text)
            return found
    raise RunError(
        f"{path} is damaged or missing, and its copy {copy.name} too; put one of them back from a backup; "
        "states in resume/ and exports in checkpoints/ stay as they are"
    )


def _parse_config(text: str) -> Any:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text.strip() else None
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(str(error)) from None


def drop_checkpoints_after(run: Run, step: int) -> None:
    """Exports of steps that are about to be trained again."""
    for found, folder in run.checkpoints().items():
        if found > step:
            shutil.rmtree(folder)
