"""Figures of the analysis: pure functions of its plain data, each small enough to be read on a telephone."""

import math
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from eaft_verl.analysis.blocks import Array
from eaft_verl.analysis.landscape import (
    LOG_LOW,
    binary_entropy,
    highest_topk_entropy,
    lowest_topk_entropy,
)
from eaft_verl.pages.canvas import INK, STYLE, canvas, png
from eaft_verl.pages.colors import palette
from eaft_verl.tokens.stats import CONFLICT_PROB, LOW_ENTROPY

DENSITY, PULL, AGREED = "viridis", "YlGnBu", "Blues"
RED, ORANGE, BLUE, GREY = "#c0392b", "#e06c00", "#0072b2", "#9aa5b1"
WIDTH, HEIGHT = 5.4, 4.3
WRITTEN = 0.15  # least overlap that is written into its cell
Row = dict[str, Any]


def landscape(found: Row, title: str) -> Figure:
    """Density of tokens over label probability and normalised entropy, with the bounds and the conflict box."""
    figure, axes = canvas(WIDTH, HEIGHT)
    _density(figure, axes, found["histogram"], found["tokens"], (0.0, 1.0))
    _bounds(axes, np.linspace(1e-4, 1 - 1e-4, 600), found["k"], found["vocab"])
    _box(axes, 0.0, CONFLICT_PROB, found["k"])
    return _named(figure, axes, title, "probability of the label")


def log_landscape(found: Row, title: str) -> Figure:
    """The same over log10 p, where conflicts spread out."""
    figure, axes = canvas(WIDTH, HEIGHT)
    _density(figure, axes, found["log_histogram"], found["tokens"], (LOG_LOW, 0.0))
    _bounds(axes, np.geomspace(10**LOG_LOW, 1 - 1e-4, 600), found["k"], found["vocab"], log=True)
    _box(axes, LOG_LOW, math.log10(CONFLICT_PROB), found["k"])
    ticks = range(int(LOG_LOW), 1, 2)
    axes.set_xticks(ticks, [f"1e{e}" if e else "1" for e in ticks])
    return _named(figure, axes, title, "probability of the label, log scale")


def scatter(found: Row, title: str) -> Figure:
    """An even sample of the tokens, conflicts in red."""
    figure, axes = canvas(WIDTH, HEIGHT)
    points = np.array(found["points"]).reshape(-1, 3)
    conflict = (points[:, 0] < CONFLICT_PROB) & (points[:, 1] <= LOW_ENTROPY)
    for chosen, color in ((~conflict, BLUE), (conflict, RED)):
        style: Row = {"s": 7, "alpha": 0.45, "linewidths": 0, "color": color}
        axes.scatter(points[chosen, 0], points[chosen, 1] / math.log(found["k"]), **style)
    _bounds(axes, np.linspace(1e-4, 1 - 1e-4, 600), found["k"], found["vocab"])
    _box(axes, 0.0, CONFLICT_PROB, found["k"])
    axes.set(xlim=(0, 1), ylim=(0, 1))
    return _named(figure, axes, title, "probability of the label")


def _density(figure: Figure, axes: Axes, histogram: list[list[int]], tokens: int, span: tuple[float, float]) -> None:
    share = np.array(histogram, float).T / tokens
    edges = np.linspace(*span, share.shape[1] + 1), np.linspace(0, 1, share.shape[0] + 1)
    norm = LogNorm(max(share.max(initial=0.0) / 1e5, 1 / tokens), max(share.max(initial=0.0), 2 / tokens))
    mesh = axes.pcolormesh(*edges, np.ma.masked_equal(share, 0), cmap=DENSITY, norm=norm, linewidth=0, rasterized=True)
    _scale(figure, axes, mesh)


def _scale(figure: Figure, axes: Axes, mesh: Any) -> None:
    """The colours of a density, in percent."""
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=32, format=lambda value, _: f"{100 * value:g} %")
    bar.ax.minorticks_off()
    bar.set_label("share of tokens in a cell")
    bar.outline.set_visible(False)
    axes.grid(visible=False)


def _bounds(axes: Axes, p: Array, k: int, vocab: int, *, log: bool = False) -> None:
    across, top = np.log10(p) if log else p, math.log(k)
    lines = ((binary_entropy(p), "-", 1.6), (lowest_topk_entropy(p, k, vocab), ":", 1.3))
    for line, style, width in (*lines, (highest_topk_entropy(p, k), "-", 0.8)):
        axes.plot(across, line / top, style, color=INK, linewidth=width)


def _box(axes: Axes, left: float, right: float, k: int) -> None:
    high = LOW_ENTROPY / math.log(k)
    axes.add_patch(Rectangle((left, 0), right - left, high, fill=False, edgecolor=RED, linewidth=2, zorder=4))


def _named(figure: Figure, axes: Axes, title: str, across: str) -> Figure:
    axes.set_title(title)
    axes.set_xlabel(across)
    axes.set_ylabel("top-K entropy / ln K")
    return figure


def gradients(fields: dict[str, list[list[float | None]]]) -> Figure:
    """Small panels of `gradient.field`, one per objective, in one colour scale."""
    lines = math.ceil(len(fields) / 2)
    figure = Figure(figsize=(WIDTH, 0.75 + 2.15 * lines), dpi=170, layout="constrained")
    grid = figure.subplots(lines, 2, squeeze=False, sharex=True, sharey=True)
    squares = {name: np.array(square, float).T for name, square in fields.items()}
    high = max(float(np.nanmax(square)) for square in squares.values())
    for axes, (name, square) in zip(grid.flat, squares.items(), strict=False):
        edges = np.linspace(0, 1, len(square) + 1)
        mesh = axes.pcolormesh(edges, edges, square, cmap=PULL, vmin=0, vmax=high, rasterized=True)
        axes.set_title(name)
        axes.grid(visible=False)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))
        axes.set_yticks((0, 0.5, 1), ("0", "0.5", "1"))
    for axes in grid[-1]:
        axes.set_xlabel("probability of the label")
    for axes in grid.flat[len(fields) :]:
        axes.remove()
    bar = figure.colorbar(mesh, ax=list(grid.flat[: len(fields)]), orientation="horizontal", aspect=40, pad=0.02)
    bar.set_label("|dL/dz|, 1-norm: 2 w (1 \u2212 p)")
    bar.outline.set_visible(False)
    figure.supylabel("top-K entropy / ln K", fontsize=10.5)
    return figure


def agreement(found: Row) -> Figure:
    """Top-K against full entropy of every token of a store."""
    figure, axes = canvas(WIDTH, HEIGHT)
    share = np.array(found["histogram"], float).T / found["tokens"]
    edges = np.linspace(0, found["high"], len(share) + 1)
    norm = LogNorm(max(1 / found["tokens"], share.max() / 1e5), max(share.max(), 2 / found["tokens"]))
    mesh = axes.pcolormesh(edges, edges, np.ma.masked_equal(share, 0), cmap=DENSITY, norm=norm, rasterized=True)
    axes.plot([0, found["high"]], [0, found["high"]], color=INK, linewidth=1)
    axes.axhline(math.log(found["k"]), color=INK, linewidth=1, linestyle=":")
    axes.set(xlim=(0, found["high"]), ylim=(0, math.log(found["k"]) * 1.25))
    axes.set_xlabel("entropy over the vocabulary, nats")
    axes.set_ylabel(f"top-{found['k']} entropy, nats")
    _scale(figure, axes, mesh)
    return figure


def fidelity(rows: list[Row]) -> Figure:
    """Correlation and largest error against K, and what a K costs."""
    figure = Figure(figsize=(WIDTH, 6.2), dpi=160, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    sizes = [row["k"] for row in rows]
    for axes, pairs in (
        (upper, (("pearson", "Pearson correlation"), ("max_error", "largest error, nats"))),
        (lower, _COST),
    ):
        for place, (name, label), color, shape in zip((axes, axes.twinx()), pairs, (BLUE, ORANGE), "os", strict=True):
            values = [math.nan if row[name] is None else row[name] for row in rows]
            place.plot(sizes, values, f"{shape}-", color=color, linewidth=1.8, markersize=5)
            place.set_ylabel(label, color=color)
            place.spines["right"].set_visible(place is not axes)
    upper.set_xscale("log")
    lower.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False, rotation=45)
    lower.minorticks_off()
    lower.set_xlabel("K")
    return figure


_COST = (("microseconds", "microseconds per token"), ("bytes", "bytes per token of a chunk"))


def gates(found: Row) -> Figure:
    """Share of the gradient on conflicts and on branching tokens, mean weight and effective sample size, per gate."""
    rows = found["gates"]
    figure, axes = canvas(WIDTH, 1.5 + 0.34 * len(rows))
    for i, row in enumerate(rows):
        axes.plot([0, 1], [i, i], color="#eceff2", linewidth=6, solid_capstyle="butt", zorder=1)
        for (value, shape, color), edge in zip(_marks(row), (None, None, "k", "k"), strict=True):
            style: Row = {"markersize": 7, "markerfacecolor": color if edge is None else "white", "zorder": 3}
            axes.plot(value, i, shape, color=color, markeredgewidth=1.6, **style)
    handles = [
        matplotlib.lines.Line2D([], [], marker=shape, linestyle="", color=color, label=label, markersize=7)
        for (_, shape, color), label in zip(_marks(rows[0]), _LABELS, strict=True)
    ]
    for handle in handles[2:]:
        handle.set_markerfacecolor("white")
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, prop={"size": 9.5})
    axes.set_yticks(range(len(rows)), [row["gate"] for row in rows], color=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, max(1.0, *(row["weight_mean"] for row in rows)) * 1.03)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("share; weight")
    return figure


_LABELS = ("gradient on conflicts", "gradient on branching tokens", "mean weight", "effective sample size")


def _marks(row: Row) -> tuple[tuple[float, str, str], ...]:
    share = row["gradient_share"]
    measures = (share["conflict"], "D", RED), (share["branching"], "o", BLUE)
    return (*measures, (row["weight_mean"], "s", GREY), (row["ess"], "^", "#009e73"))


def overlap(found: Row) -> Figure:
    """Jaccard overlap of the top-weighted tokens of every two gates."""
    names, values = [row["gate"] for row in found["gates"]], np.array(found["overlap"]["jaccard"])
    side = 1.9 + 0.3 * len(names)  # narrow, so that it can be read on a telephone
    figure, axes = canvas(max(WIDTH, side + 0.4), max(3.2, side))
    axes.imshow(values, cmap=AGREED, vmin=0, vmax=1)
    for i, j in np.argwhere(values >= WRITTEN):
        color = "white" if values[i, j] > 0.6 else INK
        axes.text(j, i, f"{values[i, j]:.2f}".lstrip("0"), ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", color=INK, rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return figure


def gate_pictures(found: Row) -> dict[str, bytes]:
    """{name: PNG} of a sweep."""
    with matplotlib.rc_context(STYLE):
        return {name: png(draw(found)) for name, draw in (("gates", gates), ("overlap", overlap))}


def places(tables: dict[str, list[Row]]) -> Figure:
    """Conflict share by place in the turn, of the data and of what stands beside it."""
    figure, axes = canvas(WIDTH, 3.4)
    names = [row["place"] for row in max(tables.values(), key=len)]
    wide = 0.8 / len(tables)
    for i, ((title, rows), color) in enumerate(zip(tables.items(), (RED, GREY, BLUE), strict=False)):
        shares = {row["place"]: row["conflicts"] / row["tokens"] for row in rows}
        across = [j + (i - (len(tables) - 1) / 2) * wide for j, name in enumerate(names) if name in shares]
        axes.bar(across, [shares[name] for name in names if name in shares], 0.92 * wide, color=color, label=title)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("conflicts, share of tokens")
    axes.set_xlabel("trained token of a turn")
    axes.legend(frameon=False)
    return figure


def dynamics(rows: list[Row], which: str) -> Figure:
    """Loss of each group by step and arm; `which`: groups `fixed` before training, or `live` ones."""
    groups = {"high_entropy": "high entropy", "low_entropy": "low entropy", "conflict": "conflicts"}
    arms = list(dict.fromkeys(row["arm"] for row in rows if row["step"]))
    figure = Figure(figsize=(WIDTH, 2.3 * len(groups) + 0.6), dpi=160, layout="constrained")
    colors = palette(arms)
    for axes, (name, title) in zip(
        np.atleast_1d(figure.subplots(len(groups), 1, sharex=True)), groups.items(), strict=True
    ):
        for arm in arms:
            points = [(row["step"], row[which][name]["nll"]) for row in rows if row["arm"] in ("base", arm)]
            known = [(step, nll) for step, nll in points if nll is not None]
            axes.plot(*zip(*known, strict=True), "o-", color=colors[arm], label=arm, linewidth=1.8, markersize=4)
        axes.set_title(f"{title}, {which} group")
        axes.set_ylabel("NLL, nats")
        axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False)
    return figure


def dynamics_pictures(rows: list[Row]) -> dict[str, bytes]:
    """{name: PNG} of the dynamics."""
    with matplotlib.rc_context(STYLE):
        return {f"dynamics_{which}": png(dynamics(rows, which)) for which in ("fixed", "live")}
