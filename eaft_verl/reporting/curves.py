"""Training curves: a panel per logged statistic, all arms and seeds in it."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from eaft_verl.pages.colors import palette
from eaft_verl.reporting.history import BAND, STATISTICS
from eaft_verl.reporting.labels import legend, line_style

Row = dict[str, Any]
PANEL_TITLES = {
    "loss": "loss (weighted: do not compare)",
    "nll": "nll, nats",
    "val_nll": "validation nll, nats",
    "token_accuracy": "token accuracy",
    "entropy": "entropy, nats",
    "weight_mean": "gate weight: mean, p10\u2013p90",
    "ess": "effective sample size",
    "conflict_share": "confident conflicts, share",
    "nll_low_entropy": "nll where entropy is low",
    "nll_high_entropy": "nll where entropy is high",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "reward": "reward, mean",
    "groups_equal_share": "groups with equal rewards, share",
    "generated_tokens": "generated tokens, so far",
    "generation_share": "generation, share of the step",
}
AXIS_TITLES = {"step": "step", "tokens": "tokens, trained and generated", "seconds": "training seconds"}


def _series(curve: Row, axis: str, name: str) -> tuple[list[float], list[float]]:
    rows = curve["val"] if name == "val_nll" else curve["train"]
    pairs = [(x, math.nan if y is None else y) for x, y in zip(rows[axis], rows[name], strict=True) if x is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def logged(report: Row, axis: str) -> list[str]:
    """The statistics that at least one arm logged, on this axis."""
    return [
        name
        for name in STATISTICS
        if any(any(math.isfinite(y) for y in _series(curve, axis, name)[1]) for curve in report["curves"])
    ]


def curves(report: Row, axis: str, panels: list[str]) -> Figure:
    """One panel per logged statistic, all arms and seeds on a common x axis."""
    lines = math.ceil(len(panels) / 3)
    figure = Figure(
        figsize=(11.6, 0.55 + 2.45 * lines), dpi=135, layout=ConstrainedLayoutEngine(hspace=0.08, wspace=0.05)
    )
    grid = figure.subplots(lines, 3, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= len(panels):
            axes.remove()
            continue
        _panel(axes, report, axis, panels[index])
        if index + 3 >= len(panels):
            axes.set_xlabel(AXIS_TITLES[axis])
    legend(figure, report, lines=True)
    return figure


def _panel(axes: Axes, report: Row, axis: str, name: str) -> None:
    for curve in report["curves"]:
        color, (x, y) = palette(report["arms"])[curve["arm"]], _series(curve, axis, name)
        dots = "o" if sum(map(math.isfinite, y)) < 9 else None
        style: Row = {
            "linewidth": 1.7,
            "linestyle": line_style(report, curve["arm"]),
            "marker": dots,
            "markersize": 3.5,
        }
        axes.plot(x, y, color=color, **style)
        if name == "weight_mean":
            low, high = (_series(curve, axis, band)[1] for band in BAND)
            axes.fill_between(x, low, high, color=color, alpha=0.13 / len(report["seeds"][curve["arm"]]), linewidth=0)
    axes.set_title(PANEL_TITLES[name])
    axes.tick_params(labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if name == "lr":
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
