"""verl's configuration tree, composed once per test process: that is most of the time `resolve` takes."""

import copy
import functools
import json
from typing import Any

import pytest

from eaft_verl.recipe import resolve as config

_compose = config._verl_tree


@functools.cache
def _composed(ours: str, trainer: str) -> dict[str, Any]:
    return _compose(json.loads(ours), trainer)


@pytest.fixture(autouse=True)
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `resolve` of a test gets its own copy of the tree."""
    monkeypatch.setattr(
        config, "_verl_tree", lambda ours, trainer: copy.deepcopy(_composed(json.dumps(ours), str(trainer)))
    )
