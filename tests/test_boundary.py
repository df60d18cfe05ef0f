"""What leaves the process as text, and what a process that it starts may import."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eaft_verl.boundary import (
    GuardedStream,
    holds_password,
    inert,
    looks_secret,
    masked,
    python_command,
    stops_held,
    unguarded,
)
from eaft_verl.files import json_line, write_json

CANARY = "hf_Can4ryCan4ryCan4ry"


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("plain, tab\tand\nline ü 漢字 🙂 ⏎", None),
        ("\x1b]0;title\x07\x1b[2J", r"\x1b]0;title\x07\x1b[2J"),
        ("a\rb\x08\x7f", r"a\rb\x08\x7f"),
        ("\x9b31mred\x85", r"\x9b31mred\x85"),
        ("admin\u202enimda\u2066x\u2069", r"admin\u202enimda\u2066x\u2069"),
        ("sp\u200blit\u2060\ufeff\u00ad\u2028", r"sp\u200blit\u2060\ufeff\xad\u2028"),
        ("te\u200dxt\u200c", r"te\u200dxt\u200c"),
        ("\u06a9\u200c\u0645 👨\u200d👩\u200d👧 ❤\ufe0f\u200d🔥", None),  # Persian and emoji join
        ("\u06a9\u200c\u200d\u200c\u0645", "\u06a9" + r"\u200c\u200d\u200c" + "\u0645"),  # letters hidden in joiners
        ("hid\U000e0041\U000e0042", r"hid\U000e0041\U000e0042"),
        ("a\ufe01\ufe02\ufe03", "a\ufe01" + r"\ufe02\ufe03"),
        ("half \ud83d", r"half \ud83d"),
    ],
)
def test_what_steers_or_hides_is_written_out(text: str, seen: str | None) -> None:
    assert inert(text) == (text if seen is None else seen)


@given(st.text(alphabet=st.characters()))
def test_nothing_inert_steers(text: str) -> None:
    shown = inert(text)
    assert not any((ord(letter) < 32 and letter not in "\t\n") or 127 <= ord(letter) < 160 for letter in shown)
    assert inert(shown) == shown
    shown.encode()


def test_a_guarded_stream_lets_a_progress_bar_return_and_nothing_else() -> None:
    stream = io.StringIO()
    guarded = GuardedStream(stream)
    print("\r 50%|##\r|", file=guarded, end="")
    guarded.writelines(["\r\n", "a\r\nb\x1b[0m"])
    assert stream.getvalue() == "\r 50%|##\\r|\r\na\nb\\x1b[0m"
    assert guarded.isatty() is False and guarded.getvalue() == stream.getvalue()


def test_what_is_drawn_on_a_terminal_that_was_closed_ends_nothing() -> None:
    terminal, inside = os.openpty()
    stream = os.fdopen(inside, "w")
    drawn = unguarded(GuardedStream(stream))
    assert drawn.isatty() and drawn.write("\x1b[1mx") == 5
    drawn.flush()
    assert os.read(terminal, 9) == b"\x1b[1mx"
    os.close(terminal)
    with pytest.raises(OSError, match="Input/output error"):
        os.write(inside, b"y")
    drawn.write("y")
    drawn.flush()  # EIO, and from here on nowhere
    os.write(inside, b"y")
    stream.close()


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "DB_PASSWORD", "api_key", "token"),
        *("GOOGLE_CREDENTIALS", "SSH_PASSPHRASE", "secret", "PGPASSWORD", "evaluate.backend_args.api_key", "MY_KEY"),
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert looks_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "PWD",
            "PATH",
            "TOKENIZERS_PARALLELISM",
            "RAY_AUTH_MODE",
            "RAY_AUTH_TOKEN_PATH",
            "AWS_SHARED_CREDENTIALS_FILE",
        ),
        *("verl.data.max_token_len_per_gpu", "control_tokens", "new_tokens", "eos_token", "pad_token_id", "XKEYSYMDB"),
        *("token_budget", "max_tokens", "SSH_AUTH_SOCK", "PATTERN", "KEYBOARD"),
    ],
)
def test_names_of_no_secrets(name: str) -> None:
    assert not looks_secret(name)


def test_a_secret_of_the_environment_becomes_its_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("SHORT_TOKEN", "1")
    tree = {"key": [CANARY, f"https://me:{CANARY}@host/x", 1], CANARY: None, "url": "s3://me:hunter2@host/ftp://a:b@c"}
    said = masked(tree)
    assert said == {
        "key": ["${oc.env:HF_TOKEN}", "https://me:${oc.env:HF_TOKEN}@host/x", 1],
        "${oc.env:HF_TOKEN}": None,
        "url": "s3://***@host/ftp://***@c",
    }
    write_json(tmp_path / "run.json", tree)
    assert CANARY not in (tmp_path / "run.json").read_text() + json_line(tree)
    assert json.loads(json_line({"n": 0.5, "step": 1})) == {"n": 0.5, "step": 1}


@pytest.mark.parametrize(
    ("text", "holds"), [("https://u:p@h/x", True), ("https://u:${oc.env:P}@h", True), ("a:b@c", False)]
)
def test_urls_with_a_password(text: str, holds: bool) -> None:
    assert holds_password(text) is holds


def test_a_started_process_imports_nothing_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m` would: the first assertion shows that the trap is one."""
    for name in ("random", "json", "argparse", "runpy", "torch"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w').write(__name__)")
    command = [sys.executable, "-m", "eaft_verl.cli", "--version"]
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert (tmp_path / "run").exists()
    (tmp_path / "run").unlink()
    done = subprocess.run(
        python_command("eaft_verl.cli", "--version"), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("eaft-verl ") and done.returncode == 0, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_that_another_thread_is_handed_waits_as_well(number: int) -> None:
    """As the monitor of a progress bar is: a pool that is half started would be waited for without end."""
    told: list[int] = []
    before = signal.signal(number, lambda number, frame: told.append(number))
    leave = threading.Event()
    threading.Thread(target=leave.wait).start()
    try:
        with stops_held():
            os.kill(os.getpid(), number)
            for _ in range(1000):
                assert not told
        end = time.monotonic() + 60
        while not told and time.monotonic() < end:  # the other thread may be asleep while the machine is busy
            time.sleep(0.01)
        assert told == [number]
    finally:
        leave.set()
        signal.signal(number, before)


IN_A_TASK = """
import asyncio, os, signal
from eaft_verl.boundary import run_async
from eaft_verl.experiment.processes import Ending

async def asked():
    os.kill(os.getpid(), signal.SIGTERM)  # comes while a task runs, not while the loop waits
    await asyncio.sleep(60)

async def work():
    tasks = [asyncio.create_task(asyncio.wait_for(asked(), 60))]
    try:
        await asyncio.gather(*tasks)
    finally:
        await asyncio.gather(*tasks, return_exceptions=True)
        print("closed")

signal.signal(signal.SIGINT, {handler})
with Ending() as ending:
    try:
        run_async(work())
    except KeyboardInterrupt:
        print(ending.name, signal.getsignal(signal.SIGINT) is {handler})
"""


@pytest.mark.parametrize("handler", ["signal.SIG_IGN", "signal.default_int_handler"])
def test_a_signal_within_a_task_ends_the_loop_in_order(handler: str) -> None:
    """A background job of a script ignores Ctrl-C: SIGTERM was raised in the task, and again at the loop's end."""
    code = IN_A_TASK.replace("{handler}", handler)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("closed\nSIGTERM True\n", "")


def test_ctrl_c_in_the_background_of_a_script_stays_unheard() -> None:
    code = (
        IN_A_TASK.replace("{handler}", "signal.SIG_IGN").replace("SIGTERM", "SIGINT").replace("sleep(60)", "sleep(0)")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("closed\n", "")
