"""Endpoints that fail while `eaft synthesize` asks them."""

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .matrix import Lab, Outcome, fault

sys.path.insert(0, str(Path(__file__).parents[1]))
from stub_endpoint import Reply, StubEndpoint, asked, completion, right

ROWS = 24


def words(lab: Lab, url: str) -> list[str | Path]:
    """The command; its prompts are 24 sums."""
    if importlib.util.find_spec("openai") is None:
        pytest.skip("extra 'synthesize' is not installed")
    source = lab.folder / "sums.jsonl"
    rows = [{"question": f"What is {a} + {a % 3}?", "answer": str(a + a % 3)} for a in range(ROWS)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["grader=number", f"endpoint.url={url}", "endpoint.backoff=0.05", "endpoint.concurrency=4"]
    return ["synthesize", source, lab.folder / "made.jsonl", *settings]


def answers(lab: Lab) -> list[dict[str, Any]]:
    """Whole lines of the file of answers."""
    file = lab.folder / "made.synthesis" / "answers.jsonl"
    data = file.read_bytes() if file.exists() else b""
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


@fault(
    "every third reply of the endpoint is HTTP 500, half, no JSON or 429, and the command is killed by SIGKILL",
    "the same command asks what is not answered; every prompt has one answer and one row",
    slow=True,
)
def _killed_and_unreliable(lab: Lab) -> Outcome:
    odd = [
        Reply(500, {}),
        Reply(body=completion("x"), cut=20),
        Reply(body=b"{"),
        Reply(429, {}, {"Retry-After": "0.1"}),
    ]

    def behave(body: dict[str, Any], before: int) -> Reply:
        number = int(asked(body).split()[2])
        time.sleep(0.1)
        return odd[number // 3 % 4] if number % 3 == 0 and before == 0 else right(body)

    with StubEndpoint(behave) as stub:
        with lab.started(*words(lab, stub.url)) as process:
            end = time.monotonic() + 600
            while len(answers(lab)) < 6:
                assert process.poll() is None and time.monotonic() < end, lab.said(process)
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
        kept = len(answers(lab))
        seen = lab.eaft(*words(lab, stub.url))
    assert seen.code == 0 and "Traceback" not in seen.said, seen.said
    rows = [json.loads(line) for line in (lab.folder / "made.jsonl").read_text().splitlines()]
    assert len({row["key"] for row in answers(lab)}) == len(answers(lab)) == ROWS == len({row["id"] for row in rows})
    assert 6 <= kept < ROWS and len(rows) == ROWS
    return Outcome(f"{kept} answers kept at the kill, {ROWS} rows in the end, none twice")


@fault("the endpoint is gone, asks for a key, or does not know the model", "exit 2 and one line, nothing is asked")
def _no_endpoint(lab: Lab) -> Outcome:
    lab.eaft(*words(lab, "http://127.0.0.1:9/v1")).refused("cannot be reached", "is the server up")
    with StubEndpoint(lambda body, before: Reply(404, {"error": {"message": "no such model"}})) as stub:
        lab.eaft(*words(lab, stub.url), "endpoint.model=gtp").refused("no such model", "it serves stub-teacher")
    assert not (lab.folder / "made.jsonl").exists() and not answers(lab)
    return Outcome("exit 2: cannot be reached; refuses the model, with those it serves")
