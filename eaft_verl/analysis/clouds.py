"""Fig. 7 of arXiv 2601.02151: the words of each regime; their size is their frequency, their colour their entropy."""

import csv
import io
import math
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from eaft_verl.analysis.blocks import Array

WORDS = 60
SMALLEST, LARGEST = 10.0, 30.0  # points
MAP = "viridis"
_WIDTH, _GAP = 360.0, 7.0  # points
Row = dict[str, Any]


def frequent(table: dict[str, Array], text: Callable[[int], str], count: int) -> list[Row]:
    """The most frequent tokens: [{token, text, count, mean_entropy, mean_prob}], nats and probability."""
    order = np.argsort(-table["count"], kind="stable")[:count]
    return [
        {"token": int(i), "text": text(int(i)), "count": int(table["count"][i])}
        | {name: float(table[name][i]) for name in ("mean_entropy", "mean_prob")}
        for i in order
        if table["count"][i]
    ]


def as_csv(rows: list[Row]) -> str:
    """The rows as CSV; a text that a spreadsheet would run as a formula gets an apostrophe."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["token", "text", "count", "mean_entropy", "mean_prob"])
    for row in rows:
        text = f"'{row['text']}" if row["text"].lstrip()[:1] in tuple("=+-@") else row["text"]
        writer.writerow([row["token"], text, row["count"], f"{row['mean_entropy']:.6g}", f"{row['mean_prob']:.6g}"])
    return stream.getvalue()


def size(row: Row, rows: list[Row]) -> float:
    """Points: area in proportion to the count."""
    return SMALLEST + (LARGEST - SMALLEST) * math.sqrt(row["count"] / rows[0]["count"])


def draw(rows: list[Row], highest: float) -> Figure:
    """The words in lines, the most frequent first, coloured on [0, highest] nats."""
    lines: list[list[tuple[Row, float]]] = [[]]
    left = 0.0
    for row in rows[:WORDS]:
        wide = _wide(row, rows)
        if left + wide > _WIDTH and lines[-1]:
            lines.append([])
            left = 0.0
        lines[-1].append((row, wide))
        left += wide + _GAP
    heights = [1.25 * size(line[0][0], rows) for line in lines if line]
    figure = Figure(figsize=(_WIDTH / 72 + 0.2, sum(heights) / 72 + 0.2), dpi=200)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    axes.set(xlim=(0, _WIDTH), ylim=(sum(heights), 0))
    axes.axis("off")
    down = 0.0
    for line, tall in zip(lines, heights, strict=False):
        across = (_WIDTH - sum(wide + _GAP for _, wide in line) + _GAP) / 2
        for row, wide in line:
            color = ink(row["mean_entropy"], highest)
            axes.text(across, down + 0.85 * tall, boxed(row["text"]), fontsize=size(row, rows), color=color)
            across += wide + _GAP
        down += tall
    return figure


def boxed(text: str) -> str:
    """The text with a space at either end as an open box, so that ' the' and 'the' are told apart; \u2205 if empty."""
    bare, box = text.strip(" "), "\u2423"
    if not bare:
        return box * min(len(text), 4) or "\u2205"
    return (box if text.startswith(" ") else "") + bare[:24] + (box if text.endswith(" ") else "")


def _wide(row: Row, rows: list[Row]) -> float:
    path = TextPath((0, 0), boxed(row["text"]), size=size(row, rows), prop=FontProperties(family="DejaVu Sans"))
    return float(path.vertices[:, 0].max()) + 1.0  # of control points: exact extents take 100 times as long


def ink(entropy: float, highest: float) -> str:
    """The colour of an entropy on [0, highest] nats, dark enough for text on white."""
    return to_hex(matplotlib.colormaps[MAP](0.62 * min(max(entropy / highest, 0.0), 1.0)))
