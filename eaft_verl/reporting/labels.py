"""Where to write labels beside points so that they cover neither points, lines nor each other.

Not adjustText: with six arms it takes seconds a figure, and its labels end on markers and on each other.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

LABELLED = 6  # arms whose names and steps find room beside their paths; more are told apart by a legend
_DIRECTIONS = [(np.cos(angle), np.sin(angle)) for angle in np.arange(0, 2 * np.pi, np.pi / 8)]
_DISTANCES = (1.0, 1.6, 2.4, 3.4)
_WIDTH, _HEIGHT = 0.68, 1.25  # of a character and a line, in font sizes


class Label(NamedTuple):
    """Text for the point (x, y) in data coordinates."""

    x: float
    y: float
    text: str
    color: str
    size: float = 9.0
    weight: str = "normal"


def place(axes: Any, labels: Sequence[Label], lines: Sequence[Sequence[tuple[float, float]]]) -> None:
    """Annotate greedily: each label takes the free spot nearest to its point. Call after all limits are set."""
    axes.get_xlim(), axes.get_ylim()  # limits are computed lazily, and transData does not ask for them
    pixel = axes.figure.dpi / 72
    obstacles = np.concatenate([_dense(axes.transData.transform(np.asarray(line, dtype=float))) for line in lines])
    frame = axes.get_window_extent()
    marks = [axes.transData.transform((label.x, label.y)) for label in labels]
    taken = [(*(mark - 4 * pixel), *(mark + 4 * pixel)) for mark in marks]
    for label in labels:
        point = axes.transData.transform((label.x, label.y))
        half = np.array([_WIDTH * len(label.text), _HEIGHT]) * label.size * pixel / 2
        spots = [(half + 5 * pixel * far) * np.array(turn) for far in _DISTANCES for turn in _DIRECTIONS]
        costs = [_cost(point + spot, half, obstacles, taken, frame) + 0.02 * np.hypot(*spot) for spot in spots]
        spot = spots[int(np.argmin(costs))]
        taken.append((*(point + spot - half), *(point + spot + half)))
        style = {"color": label.color, "fontsize": label.size, "fontweight": label.weight, "ha": "center"}
        offset = tuple(spot / pixel)
        axes.annotate(label.text, (label.x, label.y), offset, textcoords="offset points", va="center", **style)


def _dense(points: np.ndarray) -> np.ndarray:
    """Points every few pixels along a line."""
    parts = [points]
    for left, right in itertools.pairwise(points):
        parts.append(np.linspace(left, right, max(2, int(np.hypot(*(right - left)) / 4))))
    return np.concatenate(parts)


def _cost(center: np.ndarray, half: np.ndarray, obstacles: np.ndarray, taken: list, frame: Any) -> float:
    low, high = center - half, center + half
    inside = ((obstacles > low) & (obstacles < high)).all(axis=1).sum()
    covered = sum(low[0] < box[2] and high[0] > box[0] and low[1] < box[3] and high[1] > box[1] for box in taken)
    outside = low[0] < frame.x0 or low[1] < frame.y0 or high[0] > frame.x1 or high[1] > frame.y1
    return float(inside) + 40.0 * covered + 1e4 * outside  # what is cut off cannot be read at all
