"""What the base says of the probe is worked out once, and never taken for what another base, text or way would say."""

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from eaft_verl.data.parquet import Example
from eaft_verl.errors import RunError
from eaft_verl.evaluation import base_logits
from eaft_verl.evaluation.base_logits import kept_logits

EXAMPLES = [Example("a", [], [1, 2, 3, 4], [0, 0, 1, 1]), Example("b", [], [5, 6, 7], [0, 1, 0])]
WORDS = 11


class Base:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.logits = [torch.randn(2, WORDS), torch.randn(4, WORDS)[1:2]]

    def __call__(self) -> list[torch.Tensor]:
        self.asked += 1
        return self.logits


def kept(work: Path, base: Base, how: object = "base", examples: Sequence[Example] = EXAMPLES) -> list[torch.Tensor]:
    return kept_logits(work, how, examples, WORDS, base)


def test_the_second_run_reads_what_the_first_worked_out(tmp_path: Path) -> None:
    base = Base()
    first, second = kept(tmp_path, base), kept(tmp_path, base)
    assert base.asked == 1
    for found in (first, second):
        assert [logits.dtype for logits in found] == [torch.float32] * 2
        assert all(one.equal(other) for one, other in zip(found, base.logits, strict=True))


def test_another_base_way_or_text_is_worked_out_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base()
    kept(tmp_path, base)
    kept(tmp_path, base, "another base")
    kept(tmp_path, base, ["base", {"dtype": "bfloat16"}])
    kept(tmp_path, base, examples=[EXAMPLES[0], Example("b", [], [5, 6, 8], [0, 1, 0])])
    kept(tmp_path, base, examples=[EXAMPLES[0], Example("b", [], [5, 6, 7], [0, 0, 1])])
    monkeypatch.setattr(base_logits.transformers, "__version__", "another")
    kept(tmp_path, base)
    assert base.asked == 6
    kept(tmp_path, base)
    assert base.asked == 6


def test_more_than_a_disk_is_quick_for_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base()
    monkeypatch.setattr(base_logits, "KEPT_BYTES", 4 * 3 * WORDS)
    kept(tmp_path / "just", base)
    monkeypatch.setattr(base_logits, "KEPT_BYTES", 4 * 3 * WORDS - 1)
    kept(tmp_path / "over", base)
    kept(tmp_path / "over", base)
    assert base.asked == 3 and (tmp_path / "just").exists() and not (tmp_path / "over").exists()


FULL = [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]


@pytest.mark.parametrize("error", FULL)
@pytest.mark.parametrize("place", ["save_file", "computed_once"])
def test_a_disk_without_room_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    def full(*_: Any) -> None:
        raise error

    base = Base()
    monkeypatch.setattr(base_logits, place, full)
    found = kept(tmp_path, base)
    assert base.asked == 1 and found[0].equal(base.logits[0])
    assert not [path for path in tmp_path.rglob("*") if not path.name.endswith(".lock")]


def test_a_file_that_is_not_what_was_written_is_refused(tmp_path: Path) -> None:
    base = Base()
    kept(tmp_path, base)
    [file] = tmp_path.rglob("logits.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(RunError, match=r"logits\.safetensors is not the file that was written; delete "):
        kept(tmp_path, base)


def test_an_error_of_the_base_itself_is_met_once(tmp_path: Path) -> None:
    base = Base()

    def broken() -> list[torch.Tensor]:
        base()
        raise OSError(errno.EIO, "Input/output error", "model.safetensors")

    with pytest.raises(OSError, match=r"model\.safetensors"):
        kept_logits(tmp_path, "base", EXAMPLES, WORDS, broken)
    assert base.asked == 1
