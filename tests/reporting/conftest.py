"""Reports of tests that look at words and numbers are written without the seconds that drawing their figures takes."""

import io
from collections.abc import Iterator

import pytest

DRAWN = ("test_report", "test_page")  # that look at figures


def undrawn(patch: pytest.MonkeyPatch) -> None:
    """Every figure that is asked for from now on is one dot."""
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (1, 1)).save(dot := io.BytesIO(), format="png")
    patch.setattr("eaft_verl.reporting.plots.png", lambda figure: dot.getvalue())


@pytest.fixture(scope="module", autouse=True)
def figures_are_dots(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__.rpartition(".")[2] not in DRAWN:
            undrawn(patch)
        yield


@pytest.fixture
def dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of words in a module that looks at figures too."""
    undrawn(monkeypatch)
