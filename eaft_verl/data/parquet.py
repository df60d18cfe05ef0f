"""Examples in and out of the parquet file that a trainer reads."""

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_JSON_KEYS = ("tool_calls",)


@dataclass
class Example:
    """One training example. input_ids, loss_mask: [T]; loss_mask is 1 where the token is trained, 0 at the first."""

    id: str
    messages: list[dict[str, Any]]
    input_ids: list[int]
    loss_mask: list[int]
    answer: str | None = None
    tools: list[dict[str, Any]] | None = None


def write_examples(path: Path, examples: list[Example]) -> None:
    """Write all examples in one move. Columns: id, messages (list of {role, content, ...}), input_ids, loss_mask, and
    answer and tools (JSON) where any example has them; tool_calls within messages are JSON.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    optional = [
        key
        for key in ("reasoning_content", "tool_calls")
        if any(key in message for example in examples for message in example.messages)
    ]
    turn = pa.struct([(key, pa.string()) for key in ("role", "content", *optional)])
    columns = {
        "id": pa.array([example.id for example in examples], pa.string()),
        "messages": pa.array([[_pack(m) for m in example.messages] for example in examples], pa.list_(turn)),
        "input_ids": pa.array([example.input_ids for example in examples], pa.list_(pa.int32())),
        "loss_mask": pa.array([example.loss_mask for example in examples], pa.list_(pa.int8())),
    }
    if any(example.answer is not None for example in examples):
        columns["answer"] = pa.array([example.answer for example in examples], pa.string())
    if any(example.tools for example in examples):
        packed = [json.dumps(example.tools, ensure_ascii=False) if example.tools else None for example in examples]
        columns["tools"] = pa.array(packed, pa.string())
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        pq.write_table(pa.table(columns), temporary, compression="zstd")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_examples(path: Path) -> list[Example]:
    """The examples of a file that write_examples wrote, in order."""
    import pyarrow.parquet as pq

    return [
        Example(
            id=row["id"],
            messages=[_unpack(message) for message in row["messages"]],
            input_ids=row["input_ids"],
            loss_mask=row["loss_mask"],
            answer=row.get("answer"),
            tools=json.loads(row["tools"]) if row.get("tools") else None,
        )
        for row in pq.read_table(path).to_pylist()
    ]


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _pack(message: dict[str, Any]) -> dict[str, str]:
    return {
        key: json.dumps(value, ensure_ascii=False) if key in _JSON_KEYS else value for key, value in message.items()
    }


def _unpack(message: dict[str, Any]) -> dict[str, Any]:
    return {
        key: json.loads(value) if key in _JSON_KEYS else value for key, value in message.items() if value is not None
    }
