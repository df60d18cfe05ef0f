"""Reports of tests that look at words and numbers are written without the seconds that drawing their figures takes."""

import io
from collections.abc import Iterator

import pytest

DRAWN = ("test_report", "test_page")  # that look at figures


@pytest.fixture(scope="module", autouse=True)
def figures_are_dots(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__.rpartition(".")[2] not in DRAWN:
            image = pytest.importorskip("PIL.Image")
            image.new("RGB", (1, 1)).save(dot := io.BytesIO(), format="png")
            patch.setattr("eaft_verl.reporting.plots.png", lambda figure: dot.getvalue())
        yield
