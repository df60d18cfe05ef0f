"""The look of every figure, and a figure as PNG bytes."""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#1f2933"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "text.parse_math": False,  # names of arms and benchmarks are no formulas
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


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of one panel, inches."""
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    return figure, figure.add_subplot()


def png(figure: Figure) -> bytes:
    """The figure as a file, without the name of the program that made it."""
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=figure.dpi, metadata={"Software": None})
    return target.getvalue()
