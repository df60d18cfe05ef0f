"""What verl warns of and prints is in the run's log and not on the terminal."""

import warnings
from pathlib import Path

import pytest

from eaft_verl.training.quiet import LOG, kept_in, printed_in


def test_warnings_and_prints_are_kept_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with kept_in(tmp_path), printed_in(tmp_path):
        warnings.warn("veomni engine is not available: no module", stacklevel=1)
        print("[validate_config] All configuration checks passed successfully!")
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""
    kept = (tmp_path / LOG).read_text()
    assert "UserWarning: veomni engine is not available" in kept and "[validate_config]" in kept
    with pytest.warns(UserWarning, match="mine"):  # as before
        warnings.warn("mine", stacklevel=1)


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    with kept_in(tmp_path / "gone"):
        warnings.warn("lost", stacklevel=1)
