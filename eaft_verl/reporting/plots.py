"""Figures of the report as PNG bytes: pure functions of the data in report.json. The only matplotlib import."""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from eaft_verl.reporting.colors import marker, palette
from eaft_verl.reporting.history import AXES, BAND, STATISTICS
from eaft_verl.reporting.labels import Label, place
from eaft_verl.reporting.wording import arm_name

Row = dict[str, Any]
INK = "#1f2933"
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eceff2",
    "axes.axisbelow": True,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 10,
}
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


NAMES = ("deltas", "path_heldout", "path_target", "pareto", *(f"curves_{axis}" for axis in AXES))


def draw(report: Row) -> dict[str, bytes]:
    """{file name without suffix: PNG}. Figures without data are left out."""
    found: dict[str, bytes] = {}
    with matplotlib.rc_context(_STYLE):
        if rows := _delta_rows(report):
            found["deltas"] = _deltas(report, rows)
        for axis, name in (("heldout", "path_heldout"), ("target_mean", "path_target")):
            if report["paths"].get(axis):
                found[name] = _path(report, axis)
        if report["pareto"]:
            found["pareto"] = _pareto(report)
        for axis in AXES:
            if panels := logged(report, axis):
                found[f"curves_{axis}"] = _curves(report, axis, panels)
    return found


@contextmanager
def _figure(width: float, height: float, target: io.BytesIO, dpi: int = 160) -> Iterator[Figure]:
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    yield figure
    figure.savefig(target, format="png", metadata={"Software": None}, bbox_inches="tight", pad_inches=0.06)


def _thousands(value: float, _: int) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


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
    return [
        column
        for column in report["columns"]
        if column["percent"]
        and column["side"] != "drift"
        and any("delta" in c.get(column["id"], {}) for c in report["results"].values())
    ]


def _deltas(report: Row, rows: list[Row]) -> bytes:
    """Change against the base per benchmark and arm, with intervals."""
    colors, arms, target = palette(report["arms"]), report["arms"], io.BytesIO()
    gap = 0.7 / len(arms)
    inches = 1.15 + len(rows) * max(0.42, 0.19 * len(arms))
    with _figure(8.6, inches, target) as figure:
        axes = figure.add_axes((0.2, 0.62 / inches, 0.77, 1 - 1.05 / inches))
        for line, column in enumerate(rows):
            if column["members"]:
                axes.axhspan(line - 0.5, line + 0.5, color="#f3f5f7", linewidth=0)
            for index, arm in enumerate(arms):
                if "delta" not in (cell := report["results"][arm].get(column["id"], {})):
                    continue
                bounds, place_at = cell["delta"], line + gap * (index - (len(arms) - 1) / 2)
                bars = _bars(*(bounds[key] for key in ("delta", "low", "high")), scale=100)
                style = {"color": colors[arm], "marker": marker(index), "markersize": 6}
                filled = colors[arm] if bounds["excludes_zero"] else "white"
                axes.errorbar(
                    bounds["delta"] * 100, place_at, xerr=bars, markerfacecolor=filled, linewidth=1.8, **style
                )
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows], color=INK)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("change against the base, percentage points")
        _legend(axes, report, colors, figure)
    return target.getvalue()


def _legend(axes: Axes, report: Row, colors: dict[str, str], figure: Figure, lines: bool = False) -> None:
    """Arm names in their colours above the axes."""
    arms, handles = report["arms"], []
    for index, arm in enumerate(arms):
        drawn = {"linestyle": _line(report, arm), "linewidth": 2.4}
        style: Row = drawn if lines else {"linestyle": "", "marker": marker(index)}
        handles += axes.plot([], [], color=colors[arm], markersize=7, **style)
    legend = figure.legend(
        handles,
        [arm_name(arm) for arm in arms],
        loc="upper left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=len(arms),
        frameon=False,
        fontsize=11,
    )
    for text, arm in zip(legend.get_texts(), arms, strict=True):
        text.set_color(colors[arm])
        text.set_fontweight("bold")


def _path(report: Row, axis: str) -> bytes:
    """Every arm as a path from the base: target learning to the right, forgetting upwards."""
    colors, column, target = palette(report["arms"]), _column(report, axis), io.BytesIO()
    scale, labels, lines = _scale(column), [], []
    with _figure(6.4, 4.9, target) as figure:
        axes = figure.add_axes((0.125, 0.13, 0.845, 0.84))
        for index, (arm, points) in enumerate(report["paths"][axis].items()):
            line = [(point["x"] * scale, point["kl"]) for point in points]
            axes.plot(*zip(*line, strict=True), color=colors[arm], linewidth=2, linestyle=_line(report, arm))
            axes.plot(
                *zip(*line[1:], strict=True), marker(index), color=colors[arm], markersize=6.5, markeredgecolor="white"
            )
            end = points[-1]
            xerr = _bars(end["x"], end["x_low"], end["x_high"], scale)
            yerr = _bars(end["kl"], end["kl_low"], end["kl_high"])
            axes.errorbar(*line[-1], xerr=xerr, yerr=yerr, color=colors[arm], alpha=0.45, linewidth=1.3)
            labels.append(Label(*line[-1], f"{arm_name(arm)} {_thousands(end['step'], 0)}", colors[arm], 10.5, "bold"))
            labels += [
                Label(*xy, _thousands(p["step"], 0), colors[arm])
                for xy, p in zip(line[1:-1], points[1:-1], strict=True)
            ]
            lines += [line, _cross(line[-1], xerr, 0), _cross(line[-1], yerr, 1)]
        axes.plot(*lines[0][0], "o", color=colors["base"], markersize=8, zorder=5)
        labels.insert(0, Label(*lines[0][0], "base", colors["base"], 10.5, "bold"))
        axes.margins(0.09)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        if not column["higher_is_better"]:
            axes.invert_xaxis()
        arrow = "better \u2192" if column["higher_is_better"] else "lower is better \u2192"
        unit = f", {column['unit']}" if column["unit"] else ""
        axes.set_xlabel(f"{column['name']}{unit}  ({arrow})")
        axes.set_ylabel("KL to base, nats per token  (forgetting \u2192)")
        place(axes, sorted(labels, key=lambda item: item.weight != "bold"), lines)
    return target.getvalue()


def _line(report: Row, arm: str) -> str:
    """Controls are dashed."""
    return "--" if any(item["arm"] == arm for item in report["controls"]) else "-"


def _pareto(report: Row) -> bytes:
    """End points on the plane (general mean, target mean) with intervals; efficient ones filled."""
    colors, target = palette(report["arms"]), io.BytesIO()
    horizontal, vertical = _column(report, "general_mean"), _column(report, "target_mean")
    with _figure(7.2, 5.0, target) as figure:
        axes = figure.add_axes((0.11, 0.125, 0.86, 0.845))
        labels, lines = [], []
        for index, point in enumerate(report["pareto"]):
            x, y, color = point["general"], point["target"], colors[point["arm"]]
            spot = (x["score"] * _scale(horizontal), y["score"] * _scale(vertical))
            xerr = _bars(x["score"], x["low"], x["high"], _scale(horizontal))
            yerr = _bars(y["score"], y["low"], y["high"], _scale(vertical))
            axes.errorbar(*spot, xerr=xerr, yerr=yerr, color=color, alpha=0.4, linewidth=1.4)
            shape = marker(index - 1) if index else "o"
            filled = color if point["efficient"] else "white"
            axes.plot(*spot, shape, color=color, markersize=10, markerfacecolor=filled, markeredgewidth=2, zorder=5)
            labels.append(Label(*spot, arm_name(point["arm"]), color, 11, "bold"))
            lines += [[spot, spot], _cross(spot, xerr, 0), _cross(spot, yerr, 1)]
        axes.margins(0.08)
        for column, put in ((horizontal, axes.set_xlabel), (vertical, axes.set_ylabel)):
            put(f"{column['name']}{', %' if column['percent'] else ''}  (better \u2192)")
        place(axes, labels, lines)
    return target.getvalue()


def _cross(spot: tuple[float, float], bars: list[list[float]] | None, axis: int) -> list[tuple[float, float]]:
    if bars is None:
        return [spot, spot]
    ends = []
    for sign, (length,) in zip((-1, 1), bars, strict=True):
        ends.append((spot[0] + sign * length, spot[1]) if axis == 0 else (spot[0], spot[1] + sign * length))
    return ends


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


def _curves(report: Row, axis: str, panels: list[str]) -> bytes:
    """One panel per logged statistic, all arms and seeds on a common x axis."""
    colors, target = palette(report["arms"]), io.BytesIO()
    lines = math.ceil(len(panels) / 3)
    inches = 0.55 + 2.45 * lines
    with _figure(11.6, inches, target, dpi=135) as figure:
        grid = figure.subplots(lines, 3, squeeze=False)
        edges = {"top": 1 - 0.75 / inches, "bottom": 0.5 / inches, "left": 0.055, "right": 0.99}
        figure.subplots_adjust(**edges, hspace=0.42, wspace=0.2)
        for index, axes in enumerate(grid.flat):
            if index >= len(panels):
                axes.remove()
                continue
            _panel(axes, report, axis, panels[index], colors)
            if index + 3 >= len(panels):
                axes.set_xlabel(AXIS_TITLES[axis])
        _legend(grid[0][0], report, colors, figure, lines=True)
    return target.getvalue()


def _panel(axes: Axes, report: Row, axis: str, name: str, colors: dict[str, str]) -> None:
    for curve in report["curves"]:
        x, y = _series(curve, axis, name)
        points = sum(math.isfinite(value) for value in y)
        dots = "o" if points < 9 else None
        style = {"linewidth": 1.7, "linestyle": _line(report, curve["arm"]), "marker": dots, "markersize": 3.5}
        axes.plot(x, y, color=colors[curve["arm"]], **style)
        if name == "weight_mean":
            low, high = (_series(curve, axis, band)[1] for band in BAND)
            axes.fill_between(
                x, low, high, color=colors[curve["arm"]], alpha=0.13 / len(report["seeds"][curve["arm"]]), linewidth=0
            )
    axes.set_title(PANEL_TITLES[name])
    axes.tick_params(labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if name == "lr":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
