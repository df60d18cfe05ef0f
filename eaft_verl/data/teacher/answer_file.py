"""Answers as they come, one line each, keyed by prompt and sample: what a kill or a power cut leaves is whole lines."""

import json
import os
from pathlib import Path
from typing import Any

from eaft_verl.errors import NO_SPACE, DiskFull, RunError
from eaft_verl.files import json_line

Place = tuple[str, int]  # prompt key, number of the sample
_KEYS = {"key": str, "sample": int, "outcome": str}


def holds_answers(path: Path) -> bool:
    """Whether anything in the file was earned; False where there is none."""
    if not path.exists():
        return False
    with path.open(encoding="utf-8") as lines:
        return any('"answered"' in line for line in lines)


class AnswerFile:
    """`answers.jsonl`, append-only. A later line counts only where no earlier one is an answer.

    Lines: key, sample, outcome (`answered` or `failed`), finish, content, reasoning, tool_calls, prompt_tokens,
    completion_tokens, attempts, error, final (a failure that would come again). Only one process may have it open (the
    caller locks).

    mended: bytes of a half-written last line that were cut off; its request is asked again.
    Raises RunError naming the line for one that is damaged elsewhere: no kill does that.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spent = {"prompt_tokens": 0, "completion_tokens": 0}
        self._settled: dict[Place, int] = {}  # where its line begins
        self._failed: dict[Place, int] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.mended = self._load()

    def _load(self) -> int:
        end = 0
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.endswith(b"\n"):
                    break
                self._index(_parsed(line, f"{self.path}:{number}"), end)
                end += len(line)
        torn = os.fstat(self._handle).st_size - end
        if torn:
            os.ftruncate(self._handle, end)
        os.lseek(self._handle, 0, os.SEEK_END)
        return torn

    def _index(self, row: dict[str, Any], start: int) -> None:
        place = (row["key"], row["sample"])
        for key in self.spent:
            self.spent[key] += row.get(key) or 0
        if row["outcome"] == "answered" or row.get("final"):
            self._settled.setdefault(place, start)
        else:
            self._failed[place] = start

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; it is in the file, whole, when this returns."""
        start, data = os.lseek(self._handle, 0, os.SEEK_END), json_line(row).encode("utf-8")
        try:
            while data:
                data = data[os.write(self._handle, data) :]
        except OSError as error:
            kept = f"{len(self)} answers are kept: the same command goes on"
            kind = DiskFull if error.errno in NO_SPACE else RunError
            raise kind(f"{self.path} cannot be written ({error.strerror}); {kept}") from None
        self._index(row, start)

    def has(self, place: Place) -> bool:
        """Whether it is answered, or has failed for good; what has failed otherwise is to be asked again."""
        return place in self._settled

    def get(self, place: Place) -> dict[str, Any] | None:
        """The answer, else the failure, or None where it was never asked."""
        start = self._settled.get(place, self._failed.get(place))
        if start is None:
            return None
        with self.path.open("rb") as stream:
            stream.seek(start)
            return _parsed(stream.readline(), str(self.path))

    def last_failure(self) -> str:
        """What the last request that is to be asked again failed with; '' where there is none."""
        failed = [place for place in self._failed if place not in self._settled]
        return str((self.get(failed[-1]) or {}).get("error")) if failed else ""

    def __len__(self) -> int:
        return len(self._settled)

    def close(self) -> None:
        """Everything on the disk."""
        os.fsync(self._handle)
        os.close(self._handle)


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in _KEYS.items()):
            return row
    except (ValueError, RecursionError):  # no JSON, or no UTF-8
        pass
    raise RunError(f"{where} is damaged; remove that line (its request is asked again), or put the file back")
