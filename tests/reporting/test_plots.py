"""Figures of few and of many arms: every name is there once, and nothing is cut off."""

from typing import Any

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eaft_verl.pages.canvas import STYLE
from eaft_verl.reporting.plots import _path

HELDOUT = {"id": "heldout", "name": "Held-out NLL", "unit": "nats per token", "percent": False}
COLUMNS = [HELDOUT | {"higher_is_better": False}]


def drawn(arms: list[str], chosen: str) -> Figure:
    """Paths that all end in one corner, as those of arms that learn well do."""
    place = {"x_low": None, "x_high": None, "kl_low": None, "kl_high": None}
    paths = {
        arm: [{"step": step, "x": 3.0 - step / 6 - 0.01 * i, "kl": step / 1000, **place} for step in (0, 8, 16)]
        for i, arm in enumerate(arms)
    }
    choice: dict[str, Any] = {"rule": None, "chosen": {"arm": chosen, "step": 16}}
    with matplotlib.rc_context(STYLE):
        return _path(
            {"arms": arms, "columns": COLUMNS, "paths": {"heldout": paths}, "choice": choice, "controls": []}, "heldout"
        )


@pytest.mark.parametrize(("count", "labelled"), [(5, True), (16, False)])
def test_many_arms_have_a_legend_few_have_labels(count: int, labelled: bool) -> None:
    arms = [f"an_arm_{i}" for i in range(count)]
    figure = drawn(arms, "an_arm_3")
    written = sorted(text.get_text() for text in figure.axes[0].texts)
    if labelled:
        assert written == sorted(["base", *["8"] * count, *(f"{arm} 16" for arm in arms)]) and not figure.legends
    else:
        assert written == ["an_arm_3 16", "base"]
        assert [text.get_text() for text in figure.legends[0].get_texts()] == arms
    FigureCanvasAgg(figure).draw()
    frame = figure.axes[0].get_window_extent()
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert box.x0 >= frame.x0 - 8 and box.x1 <= frame.x1 + 8, text.get_text()
    for legend in figure.legends:
        box, height = legend.get_window_extent(), figure.bbox.height
        assert box.x1 <= figure.bbox.width and box.y0 >= frame.y1 - 1 and box.y1 <= height + 1
