"""A Ray that does not come up is one line and an exit code."""

from typing import Any

import pytest

from eaft_verl.errors import LOST, Lost

SAID = "The current node timed out during startup. This could happen because\nthe GCS has become overloaded."


@pytest.mark.parametrize("raised", [Exception(SAID), RuntimeError(SAID), ConnectionError(SAID)])
def test_ray_that_does_not_start_is_lost_in_a_line(monkeypatch: pytest.MonkeyPatch, raised: Exception) -> None:
    ray = pytest.importorskip("ray")
    from eaft_verl.cluster.session import ray_session

    def init(**_: Any) -> None:
        raise raised

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(Lost) as caught, ray_session("cpu", 1):
        pytest.fail("the session was entered")
    said = str(caught.value)
    assert said.startswith("Ray did not start: The current node timed out during startup.") and "\n" not in said
    assert "--max-restarts 3" in said and caught.value.code == LOST
