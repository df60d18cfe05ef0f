"""Isolation: no test sees the user's home, caches or Ray clusters, or reaches a hub."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import hypothesis
import pytest

TESTS = Path(__file__).parent
_SCRATCH = tempfile.mkdtemp(prefix="eaft")  # short: Ray's socket paths have a limit

os.environ.update(
    HOME=_SCRATCH,
    EAFT_CACHE=os.environ.get("EAFT_CACHE", str(Path(_SCRATCH) / "cache")),
    HF_HOME=str(Path(_SCRATCH) / "hf"),
    HF_HUB_OFFLINE="1",
    RAY_TMPDIR=_SCRATCH,
    RAY_AUTH_MODE="disabled",
    MPLCONFIGDIR=_SCRATCH,
    TOKENIZERS_PARALLELISM="false",
)
os.environ.pop("RAY_ADDRESS", None)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it, and all that it starts
if not shutil.which("nvidia-smi"):  # Triton asks when it is first imported
    os.environ["TRITON_INTERPRET"] = "1"

hypothesis.settings.register_profile(  # no test fails because a machine is slow
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

LONG = (  # a minute or more each, the longest first
    *("experiment/test_pipeline.py", "faults/test_faults.py", "training/grpo/test_grpo.py"),
    *("training/test_every_key.py", "training/sft/test_exactness.py", "test_types.py", "launch/test_ray_cluster.py"),
    *("training/sft/test_anchor.py", "training/sft/test_matched_arms.py", "experiment/test_analyze.py"),
    *("reporting/test_page.py", "launch/test_examples.py", "evaluation/test_evaluate.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first: two processes then end at about the same time, whichever takes which file."""
    places = {TESTS / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer chat model with its tokenizer."""
    import tiny

    return tiny.tiny_model(tmp_path_factory.mktemp("model") / "tiny")
