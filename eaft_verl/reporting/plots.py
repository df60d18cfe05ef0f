"""Figures of the report as PNG bytes: pure functions of the data in report.json. The only matplotlib import."""

import math
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from eaft_verl.pages.canvas import INK, STYLE, canvas, png
from eaft_verl.pages.colors import marker, palette
from eaft_verl.reporting.history import AXES, BAND, STATISTICS
from eaft_verl.reporting.labels import LABELLED, Label, place
from eaft_verl.reporting.wording import arm_name

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
NAMES = (
    "deltas",
    "path_heldout",
    "path_target",
    "general_step",
    "general_kl",
    "pareto",
    *(f"curves_{axis}" for axis in AXES),
)
WIDTH = 4.8  # inches: on a phone, 356 of its pixels wide, a point of a letter is then a pixel
Point = tuple[float, float]


def draw(report: Row) -> dict[str, bytes]:
    """{file name without suffix: PNG}. Figures without data are left out."""
    found: dict[str, bytes] = {}
    with matplotlib.rc_context(STYLE):
        if rows := _delta_rows(report):
            found["deltas"] = png(_deltas(report, rows))
        for axis, name in (("heldout", "path_heldout"), ("target_mean", "path_target")):
            if report["paths"].get(axis):
                found[name] = png(_path(report, axis))
        for name, across in (("general_step", "step"), ("general_kl", "kl")):
            if report["general"]:
                found[name] = png(_general(report, across))
        if report["pareto"]:
            found["pareto"] = png(_pareto(report))
        for axis in AXES:
            if panels := logged(report, axis):
                found[f"curves_{axis}"] = png(_curves(report, axis, panels))
    return found


def _column(report: Row, name: str) -> Row:
    return next(item for item in report["columns"] if item["id"] == name)


def _scale(column: Row) -> float:
    return 100.0 if column["percent"] else 1.0


def _bars(value: float, low: float | None, high: float | None, scale: float = 1.0) -> list[list[float]] | None:
    """Error bar lengths for matplotlib; None without an interval. Rounding may put the value past a bound."""
    if low is None or high is None:
        return None
    return [[max(0.0, value - low) * scale], [max(0.0, high - value) * scale]]


def _delta_rows(report: Row) -> list[Row]:
    results = report["results"].values()
    return [
        column
        for column in report["columns"]
        if column["percent"]
        and column["side"] != "drift"
        and any("delta" in cells.get(column["id"], {}) for cells in results)
    ]


def _deltas(report: Row, rows: list[Row]) -> Figure:
    """Change against the base per benchmark and arm, with intervals."""
    colors, arms = palette(report["arms"]), report["arms"]
    figure, axes = canvas(WIDTH, 1.15 + len(rows) * max(0.42, 0.19 * len(arms)))
    for line, column in enumerate(rows):
        if column["members"]:
            axes.axhspan(line - 0.5, line + 0.5, color="#f3f5f7", linewidth=0)
        for index, arm in enumerate(arms):
            if (bounds := report["results"][arm].get(column["id"], {}).get("delta")) is None:
                continue
            bars = _bars(bounds["delta"], bounds["low"], bounds["high"], scale=100)
            spot = (bounds["delta"] * 100, line + 0.7 / len(arms) * (index - (len(arms) - 1) / 2))
            filled = colors[arm] if bounds["unmarked"] is None else "white"
            axes.errorbar(*spot, xerr=bars, color=colors[arm], linewidth=1.8)
            axes.plot(*spot, marker(index), color=colors[arm], markersize=6, markerfacecolor=filled)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], color=INK)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("change against the base, percentage points")
    _legend(figure, report, lines=False)
    return figure


def _legend(figure: Figure, report: Row, *, lines: bool) -> float:
    """Arm names in their colours above the axes; returns the height it takes, inches."""
    colors = palette(report["arms"])
    handles = []
    for index, arm in enumerate(report["arms"]):
        style: Row = {"marker": marker(index), "markersize": 7, "linestyle": ""}
        style = {"linestyle": _line(report, arm), "linewidth": 2.4} if lines else style
        handles.append(Line2D([], [], color=colors[arm], label=arm_name(arm), **style))
    look: Row = {"frameon": False, "labelcolor": "linecolor", "prop": {"weight": "bold", "size": 11}}
    width = 0.5 + 0.105 * max(len(arm_name(arm)) for arm in report["arms"])  # of a bold name behind its line, inches
    columns = max(1, min(int(figure.get_figwidth() / width), len(handles)))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, **look)
    return 0.25 * math.ceil(len(handles) / columns)


def _path(report: Row, axis: str) -> Figure:
    """Every arm as a path from the base: target learning to the right, forgetting upwards."""
    colors, column = palette(report["arms"]), _column(report, axis)
    few, chosen = len(report["arms"]) <= LABELLED, (report["choice"]["chosen"] or {}).get("arm")
    figure, axes = canvas(WIDTH, 3.8)
    labels, taken = [], _decision(axes, report, axis)
    for arm, points in report["paths"][axis].items():
        color, shape = colors[arm], marker(report["arms"].index(arm))
        line = [(point["x"] * _scale(column), point["kl"]) for point in points]
        taken.append(line)
        axes.plot(*zip(*line, strict=True), color=color, linewidth=2, linestyle=_line(report, arm))
        axes.plot(*zip(*line[1:], strict=True), shape, color=color, markersize=6.5, markeredgecolor="white")
        end = points[-1]
        xerr = _bars(end["x"], end["x_low"], end["x_high"], _scale(column))
        taken += _cross(axes, line[-1], xerr, _bars(end["kl"], end["kl_low"], end["kl_high"]), color)
        steps = [f"{point['step']:,.10g}" for point in points]
        if few:
            labels += [Label(*spot, step, color) for spot, step in zip(line[1:-1], steps[1:-1], strict=True)]
        if few or arm == chosen:
            labels.append(Label(*line[-1], f"{arm_name(arm)} {steps[-1]}", color, 10.5, "bold"))
    labels.insert(0, _start(axes, line[0]))
    axes.margins(0.09)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    if not column["higher_is_better"]:
        axes.invert_xaxis()
    arrow = "better \u2192" if column["higher_is_better"] else "lower is better \u2192"
    unit = f", {column['unit']}" if column["unit"] else ""
    axes.set_xlabel(f"{column['name']}{unit}  ({arrow})")
    axes.set_ylabel("KL to base, nats per token  (forgetting \u2192)")
    return _labelled(figure, axes, labels, taken, report)


def _start(axes: Axes, spot: Point) -> Label:
    """The base, where every path begins."""
    color = palette([])["base"]
    axes.plot(*spot, "o", color=color, markersize=8, zorder=5)
    return Label(*spot, "base", color, 10.5, "bold")


def _decision(axes: Axes, report: Row, axis: str) -> list[list[Point]]:
    """A dashed line at the rule's bound on KL, a ring around what it chose; returns the lines they take up."""
    found = report["choice"]
    if found["rule"] and found["rule"]["bound"] == "kl":
        axes.axhline(found["rule"]["limit"], color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    if (chosen := found["chosen"]) is None:
        return []
    points = [p for p in report["paths"][axis].get(chosen["arm"], []) if p["step"] == chosen["step"]]
    spots = [(point["x"] * _scale(_column(report, axis)), point["kl"]) for point in points]
    for spot in spots:
        axes.plot(*spot, "o", markersize=17, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=2)
    return [[spot, spot] for spot in spots]


def _general(report: Row, across: str) -> Figure:
    """General mean of every arm by `step` or by its distance to the base, `kl`; bars at the end."""
    colors, column = palette(report["arms"]), _column(report, "general_mean")
    figure, axes = canvas(WIDTH, 3.5)
    labels, taken = [], []
    for arm, points in report["general"].items():
        color, shape = colors[arm], marker(report["arms"].index(arm))
        line = [(point[across], point["x"] * _scale(column)) for point in points]
        taken.append(line)
        axes.plot(*zip(*line, strict=True), color=color, linewidth=2, linestyle=_line(report, arm))
        axes.plot(*zip(*line[1:], strict=True), shape, color=color, markersize=6.5, markeredgecolor="white")
        end = points[-1]
        wide = _bars(end["kl"], end["kl_low"], end["kl_high"]) if across == "kl" else None
        taken += _cross(axes, line[-1], wide, _bars(end["x"], end["x_low"], end["x_high"], _scale(column)), color)
        if len(report["arms"]) <= LABELLED:
            labels.append(Label(*line[-1], arm_name(arm), color, 10.5, "bold"))
    labels.insert(0, _start(axes, taken[0][0]))
    axes.margins(0.09)
    axes.set_xlabel("step" if across == "step" else "KL to base, nats per token")
    axes.set_ylabel(f"{column['name']}{', %' if column['percent'] else ''}  (better \u2192)")
    return _labelled(figure, axes, labels, taken, report)


def _line(report: Row, arm: str) -> str:
    """Controls are dashed."""
    return "--" if any(item["arm"] == arm for item in report["controls"]) else "-"


def _cross(
    axes: Axes, spot: Point, xerr: list[list[float]] | None, yerr: list[list[float]] | None, color: str
) -> list[list[Point]]:
    """Draw both intervals of a point; returns the lines they take up."""
    axes.errorbar(*spot, xerr=xerr, yerr=yerr, color=color, alpha=0.42, linewidth=1.4)
    (left,), (right,) = xerr or [[0.0], [0.0]]
    (down,), (up,) = yerr or [[0.0], [0.0]]
    x, y = spot
    return [[(x - left, y), (x + right, y)], [(x, y - down), (x, y + up)]]


def _labelled(figure: Figure, axes: Axes, labels: list[Label], taken: list[list[Point]], report: Row) -> Figure:
    """The figure with its labels beside those lines, in the layout it then keeps; end points choose first."""
    if len(report["arms"]) > LABELLED:
        figure.set_figheight(figure.get_figheight() + _legend(figure, report, lines=False))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    place(axes, sorted(labels, key=lambda label: label.weight != "bold"), taken)
    return figure


def _pareto(report: Row) -> Figure:
    """End points on the plane (general mean, target mean) with intervals; efficient ones filled."""
    colors = palette(report["arms"])
    figure, axes = canvas(WIDTH, 3.8)
    horizontal, vertical = _column(report, "general_mean"), _column(report, "target_mean")
    labels, taken = [], []
    for index, point in enumerate(report["pareto"]):
        x, y, color = point["general"], point["target"], colors[point["arm"]]
        spot = (x["score"] * _scale(horizontal), y["score"] * _scale(vertical))
        xerr = _bars(x["score"], x["low"], x["high"], _scale(horizontal))
        taken += _cross(axes, spot, xerr, _bars(y["score"], y["low"], y["high"], _scale(vertical)), color)
        style: Row = {"color": color, "markersize": 10, "markeredgewidth": 2, "zorder": 5}
        filled = color if point["efficient"] else "white"
        axes.plot(*spot, marker(index - 1) if index else "o", markerfacecolor=filled, **style)
        if point["efficient"] or len(report["arms"]) <= LABELLED:
            labels.append(Label(*spot, arm_name(point["arm"]), color, 11, "bold"))
    axes.margins(0.08)
    for column, put in ((horizontal, axes.set_xlabel), (vertical, axes.set_ylabel)):
        put(f"{column['name']}{', %' if column['percent'] else ''}  (better \u2192)")
    return _labelled(figure, axes, labels, taken, report)


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


def _curves(report: Row, axis: str, panels: list[str]) -> Figure:
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
    _legend(figure, report, lines=True)
    return figure


def _panel(axes: Axes, report: Row, axis: str, name: str) -> None:
    for curve in report["curves"]:
        color, (x, y) = palette(report["arms"])[curve["arm"]], _series(curve, axis, name)
        dots = "o" if sum(map(math.isfinite, y)) < 9 else None
        style: Row = {"linewidth": 1.7, "linestyle": _line(report, curve["arm"]), "marker": dots, "markersize": 3.5}
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
