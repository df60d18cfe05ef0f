"""What can go wrong between a data set, a model and the folder of an analysis."""

import os
import signal
import sys
import time
from pathlib import Path

from .matrix import Lab, Outcome, fault

WORDS = ("--out", "seen", "data.max_length=256")


@fault("an analysis into a folder with something else in it", "refused in one line, nothing touched")
def _foreign(lab: Lab) -> Outcome:
    (lab.folder / "seen").mkdir()
    (lab.folder / "seen" / "notes.txt").write_text("mine")
    seen = lab.eaft("analyze", lab.model, "train.jsonl", *WORDS)
    assert seen.code == 2 and "something else" in seen.last_line and "Traceback" not in seen.said
    assert [file.name for file in (lab.folder / "seen").iterdir()] == ["notes.txt"]
    return Outcome(f"exit 2: {seen.last_line}")


@fault("a file of token statistics that is half there", "refused in one line that names the file, which stays")
def _torn(lab: Lab) -> Outcome:
    file = lab.out / "data" / "token_stats_k20" / "tokens.parquet"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"PAR1" + bytes(100))
    seen = lab.eaft("analyze", lab.recipe)
    assert seen.code == 2 and str(file) in seen.last_line and "Traceback" not in seen.said
    assert file.stat().st_size == 104
    return Outcome(f"exit 2: {seen.last_line}")


@fault(
    "an objective of one's own in --gates that gives one number", "refused in one line before the pass, nothing made"
)
def _one_number(lab: Lab) -> Outcome:
    mine = "tests.faults.broken_objectives:OneNumber"
    seen = lab.eaft("analyze", lab.model, "train.jsonl", *WORDS, "--gates", "sft", mine)
    assert seen.code == 2 and mine in seen.last_line and "one weight per token" in seen.last_line
    assert "Traceback" not in seen.said and not (lab.folder / "seen").exists()
    return Outcome(f"exit 2: {seen.last_line}")


@fault("an analysis killed, then two started at once", "one makes the store, the other waits and finds it", slow=True)
def _two(lab: Lab) -> Outcome:
    words = ("analyze", lab.model, "train.jsonl", *WORDS)
    partial = lab.folder / "seen" / "data" / ".token_stats_k20.partial"
    with lab.started(*words) as process:
        while process.poll() is None and not partial.exists():
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    with lab.started(*words) as first, lab.started(*words) as second:
        codes = [process.wait(timeout=600) for process in (first, second)]
        said = "".join(map(lab.said, (first, second)))
    assert codes == [0, 0] and said.count("step 1/") == 1 and "waiting for it" in said
    assert not partial.exists() and "Traceback" not in said
    return Outcome("both exit 0; one pass")


@fault("one flipped bit in the pages of token statistics", "refused in one line that names the file")
def _flipped(lab: Lab) -> Outcome:
    sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))
    import made_stores

    made_stores.write_store(lab.folder / "store", **made_stores.random_columns(20, 30))
    file = lab.folder / "store" / "tokens.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 4] ^= 4  # among the first columns: samples, tokens, log-probabilities
    file.write_bytes(data)
    seen = lab.eaft("analyze", lab.folder / "store", "--out", lab.folder / "seen")
    return Outcome(f"exit 2: {seen.refused('tokens.parquet is not whole')}"[:100])
