"""What is computed once: one maker for all processes, half of it never seen, another key or a lost part refused."""

import errno
import fcntl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from eaft_verl.errors import RunError, refusal
from eaft_verl.files import computed_once, locked, new_file, new_folder, read_json, seconds_to_compute

MAKER = """
import sys, time
from pathlib import Path
from eaft_verl.files import computed_once

def make(folder):
    with open(sys.argv[2], "a") as calls:
        calls.write("made\\n")
    for part in range(20):
        (folder / f"{part}.bin").write_bytes(bytes([part]) * 1000)
        while part == 9 and not Path(sys.argv[3]).exists():
            time.sleep(0.01)

folder = computed_once(Path(sys.argv[1]), "key", make)
print(sorted((int(file.stem), file.read_bytes()[0], len(file.read_bytes())) for file in folder.glob("*.bin")))
"""


def start(folder: Path, number: int = 0) -> "subprocess.Popen[str]":
    """A process that makes `store`; the maker stops half-way until there is a file `go`."""
    command = [sys.executable, "-c", MAKER, *(str(folder / name) for name in ("store", "calls", "go"))]
    with (folder / f"err{number}").open("w") as err:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True)


def wait_until(condition: Callable[[], object]) -> None:
    latest = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < latest
        time.sleep(0.01)


def test_processes_that_start_at_once_share_one_whole_result(tmp_path: Path) -> None:
    processes = [start(tmp_path, number) for number in range(3)]
    errors = [tmp_path / f"err{number}" for number in range(3)]
    try:
        wait_until(lambda: sum("another process computes" in err.read_text() for err in errors) == 2)
    finally:
        (tmp_path / "go").touch()
        said = [process.communicate(timeout=60)[0] for process in processes]
    assert said == [f"{[(part, part, 1000) for part in range(20)]}\n"] * 3, said
    assert (tmp_path / "calls").read_text() == "made\n"
    assert sum("waiting" in err.read_text() for err in errors) == 2


def test_what_a_killed_process_left_is_neither_used_nor_kept(tmp_path: Path) -> None:
    first = start(tmp_path)
    wait_until(lambda: list(tmp_path.glob(".store.*.partial/3.bin")))
    first.kill()
    first.communicate()
    assert not (tmp_path / "store").exists()
    (tmp_path / "go").touch()
    assert start(tmp_path).communicate(timeout=60)[0].count("1000)") == 20, (tmp_path / "err0").read_text()
    assert not list(tmp_path.glob(".store.*.partial")) and (tmp_path / "calls").read_text() == "made\n" * 2


def test_a_maker_that_fails_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        computed_once(tmp_path / "store", "key", fails)
    assert [path.name for path in tmp_path.iterdir()] == [".store.lock"]
    made = computed_once(tmp_path / "store", "key", lambda folder: (folder / "whole").write_text("abc") and None)
    stored = read_json(made / "meta.json")
    assert (stored["key"], stored["sizes"]) == ("key", {"whole": 3})
    assert seconds_to_compute(made) == stored["seconds"] >= 0  # of the making, also for whom it is only read


def test_another_key_or_a_lost_part_is_refused(tmp_path: Path) -> None:
    made = computed_once(tmp_path / "store", "key", lambda folder: (folder / "part").write_text("abc") and None)
    with pytest.raises(RunError, match=r"store was computed for another model.*\(key key, now other\): stale"):
        computed_once(made, "other", lambda folder: None)
    (made / "part").write_text("xbc")
    with pytest.raises(RunError, match=r"store/part is not the file that was written; delete"):
        computed_once(made, "key", lambda folder: None)
    for damage in ("ab", None):
        (made / "part").write_text(damage) if damage else (made / "part").unlink()
        with pytest.raises(RunError, match=r"store/part is not whole \(3 bytes were written\); delete"):
            computed_once(made, "key", lambda folder: None)


@pytest.mark.parametrize("meta", ["[]", "{}", "", '{"key": 5}', '{"key": "key"}'])
def test_a_damaged_account_of_what_was_computed_is_named(tmp_path: Path, meta: str) -> None:
    made = computed_once(tmp_path / "store", "key", lambda folder: None)
    (made / "meta.json").write_text(meta)
    for read in (lambda: computed_once(made, "key", lambda folder: None), lambda: seconds_to_compute(made)):
        with pytest.raises(RunError, match=r"store/meta\.json is not"):
            read()


def test_a_lock_is_refused_or_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with locked(lock, busy="taken"), pytest.raises(RunError, match="taken"), locked(lock, busy="taken"):
        pass
    with locked(tmp_path / ".lock", busy="taken", wait=True):
        pass


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / ".made.partial").mkdir()
    (tmp_path / ".made.partial" / "of a killed process").touch()

    def interrupted() -> None:
        with new_folder(tmp_path / "made") as folder:
            (folder / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "made") as folder:
        (folder / "whole").touch()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["whole"] and len(list(tmp_path.iterdir())) == 1


def test_what_the_system_refuses_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount without locks, a full disk, a lost disk: exit code and line; a fault of ours has none."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match="No locks") as raised, locked(tmp_path / ".lock", busy=""):
        pass
    assert refusal(raised.value) == (2, f"{tmp_path / '.lock'}: No locks available")
    for number, code in ((errno.ENOSPC, 5), (errno.EFBIG, 5), (errno.EIO, 2), (errno.EINVAL, None)):
        with pytest.raises(OSError, match="said") as raised, new_file(tmp_path / "file"):
            raise OSError(number, "said")
        assert refusal(raised.value) == (code and (code, f"{tmp_path / 'file'}: said"))
    assert not (tmp_path / "file").exists()
    assert refusal(OSError(errno.ENOENT, "No usable temporary directory found"))[1].endswith("export TMPDIR=FOLDER")
    assert refusal(RuntimeError("a fault of ours")) is None


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a file system that makes no folders is needed")
def test_a_place_that_takes_no_folder_is_refused_and_a_missing_file_is_not(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        Path("/proc/nothing/here").mkdir(parents=True, exist_ok=True)
    assert refusal(raised.value) == (2, "/proc/nothing: no folder can be made there; choose another place")
    with pytest.raises(FileNotFoundError) as raised:
        (tmp_path / "missing").read_text()
    assert refusal(raised.value) is None
