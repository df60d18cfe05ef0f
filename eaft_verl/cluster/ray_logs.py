"""What Ray has written about a failure, kept with the run: its own folder is deleted or lies on another machine."""

import re
from collections.abc import Iterable
from pathlib import Path

from eaft_verl.files import write_text
from eaft_verl.runs import Run

TAIL_LINES = 40
TAIL_BYTES = 64 << 10
OF_NODE = ("raylet.out", "raylet.err", "gcs_server.out")
_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def logs_folder() -> str:
    """Where the node of this driver keeps its logs; '' where that is not known."""
    import ray

    node = ray._private.worker.global_worker.node
    return node.get_logs_dir_path() if node else ""


def write_details(run: Run, text: str, pids: Iterable[int] = ()) -> Path:
    """`text` and the ends of Ray's logs, those of these processes first, in a file of the run; its path."""
    info = run.info
    parts, logs = [_COLOR.sub("", text).strip()], Path(info.get("ray_logs") or "/nonexistent")
    of_workers = sorted(logs.glob("worker-*"), key=lambda file: file.stat().st_mtime, reverse=True)
    chosen = [file for pid in pids for file in of_workers if re.search(rf"-{pid}\.(out|err)$", file.name)]
    for file in dict.fromkeys([*chosen, *of_workers[:4], *(logs / name for name in OF_NODE)]):
        if lines := _tail(file):
            parts.append(f"--- the end of {file}\n" + "\n".join(lines))
    path = run.path / "failures" / f"attempt_{info.get('attempt', 0)}.txt"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def details_kept(run: Run, text: str, pids: Iterable[int] = ()) -> str:
    """`; details in FILE`, or why there is no such file: a full disk must not hide what has happened."""
    try:
        return f"; details in {write_details(run, text, pids)}"
    except OSError as error:
        return f"; its details could not be written: {error.strerror or error}"


def _tail(file: Path) -> list[str]:
    if not file.is_file():
        return []
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - TAIL_BYTES))
        return _COLOR.sub("", stream.read().decode(errors="replace")).splitlines()[-TAIL_LINES:]
