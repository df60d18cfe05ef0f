"""Commands that do not train and are told to stop, with all their processes, as a terminal or a scheduler does it."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from .endpoints import ROWS as PROMPTS
from .endpoints import answers
from .endpoints import words as asking
from .matrix import STEPS, Lab, Outcome, fault, read_rows
from .stops import CTRL_C, ENDED, SAVED, assert_one_line, family, orphans

from stub_endpoint import StubEndpoint, right  # isort: skip - endpoints has put its folder on the path

KEPT = "ended; what was finished before is kept; run the same command again"
ENDS = {signal.SIGTERM: ("SIGTERM", (ENDED,)), signal.SIGINT: ("Ctrl-C", (CTRL_C, -signal.SIGINT))}
# Python ends itself by the signal where code that it compiled at run time was interrupted: a shell sees 130 for both


def told(lab: Lab, number: int, words: list[str | Path], ready: Callable[[subprocess.Popen[str]], bool]) -> None:
    """Start the command and tell its group to stop once `ready`: one line, its code, nothing of it left running."""
    name, codes = ENDS[signal.Signals(number)]
    with lab.started(*words, LAB=str(lab.run)) as process:
        end = time.monotonic() + 600
        while not ready(process):
            assert process.poll() is None and time.monotonic() < end, lab.said(process)
            time.sleep(0.01)
        os.killpg(process.pid, number)
        code = process.wait(timeout=600)
        said, left = lab.said(process), orphans(lab.run)
    assert code in codes and assert_one_line(said) == f"eaft: {name}: {KEPT}", (code, said)
    assert not left, left


@fault("SIGTERM, then Ctrl-C, to `prepare` and its processes", "143, 130, one line; nothing of OUT is there", slow=True)
def _prepare(lab: Lab) -> Outcome:
    rows = [{"prompt": f"What is {one} + 1?", "response": f"It is {one + 1}."} for one in range(40_000)]
    (lab.folder / "many.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words: list[str | Path] = ["prepare", "many.jsonl", "made/many.parquet", "--model", lab.model]
    for number in ENDS:
        told(lab, number, words, lambda process: len(family(process)) > 1)
        assert not list(lab.folder.glob("made/*")), "something is left"
    seen = lab.eaft(*words)
    assert seen.code == 0 and (lab.folder / "made" / "many.manifest.json").exists(), seen.said
    return Outcome("143 and 130; then done by the same command")


@fault("SIGTERM, then Ctrl-C, to `synthesize`", "143, 130, one line; no answer is asked for twice", slow=True)
def _synthesize(lab: Lab) -> Outcome:
    def behave(body: dict[str, object], before: int) -> object:
        time.sleep(0.2)
        return right(body)

    with StubEndpoint(behave) as stub:
        words = asking(lab, stub.url)
        for number, most in zip(ENDS, (4, 10), strict=True):
            told(lab, number, words, lambda process, most=most: len(answers(lab)) >= most)
        kept = len(answers(lab))
        assert not (lab.folder / "made.jsonl").exists() and kept < PROMPTS
        seen = lab.eaft(*words)
    assert seen.code == 0 and len(answers(lab)) == PROMPTS == len((lab.folder / "made.jsonl").read_text().splitlines())
    return Outcome(f"143 and 130; {kept} answers kept, then all {PROMPTS}")


@fault("SIGTERM, then Ctrl-C, to `analyze`", "143, 130, one line; the pass is gone on with", slow=True)
def _analyze(lab: Lab) -> Outcome:
    words: list[str | Path] = ["analyze", lab.model, "train.jsonl", "--out", "seen", "data.max_length=256"]
    store = lab.folder / "seen" / "data" / "token_stats_k20"
    partial = store.with_name(f".{store.name}.partial")
    for number in ENDS:
        told(lab, number, words, lambda process: partial.exists() and lab.said(process) != "")  # left by the first one
        assert not store.exists()
    seen = lab.eaft(*words)
    assert seen.code == 0 and store.exists() and not partial.exists(), seen.said
    return Outcome("143 and 130; then done by the same command")


@fault("SIGTERM to `reproduce` at step 10", "saved, 75; the same command goes on: every number bit equal", slow=True)
def _reproduce(lab: Lab) -> Outcome:
    lab.whole()
    words = ["reproduce", lab.snapshots / "whole" / lab.run.name, "--output", lab.folder / "again"]
    made = lab.folder / "again" / lab.run.name
    with lab.started(*words, LAB=str(lab.run)) as process:
        end = time.monotonic() + 600
        while len(read_rows(made)) < 10:
            assert process.poll() is None and time.monotonic() < end, lab.said(process)
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        code, said, left = process.wait(timeout=600), lab.said(process), orphans(lab.run)
    step = len(read_rows(made))
    assert code == SAVED and not left and f"is saved at step {step} of {STEPS}" in assert_one_line(said), (code, said)
    seen = lab.eaft(*words)
    assert seen.code == 0 and [row["step"] for row in read_rows(made)] == list(range(1, STEPS + 1)), seen.said
    assert re.search(r": (\d+) numbers: \1 bit-equal$", seen.last_line), seen.said
    return Outcome(seen.last_line.rpartition(": ")[2], lost=0)
