"""The laboratory: one folder for the whole session, emptied before each row."""

import shutil
from pathlib import Path

import pytest
import tiny

from .matrix import ROWS, Lab


@pytest.fixture(scope="session")
def lab_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of every row, and where snapshots are kept."""
    return tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("snapshots")


@pytest.fixture
def lab(lab_folders: tuple[Path, Path], tiny_model_path: Path) -> Lab:
    """A fresh laboratory at the same path."""
    folder, snapshots = lab_folders
    shutil.rmtree(folder)
    folder.mkdir()
    tiny.write_sums(folder / "train.jsonl", ROWS, seed=1)
    tiny.write_sums(folder / "heldout.jsonl", 6, seed=2)
    return Lab(folder, tiny_model_path, snapshots)
