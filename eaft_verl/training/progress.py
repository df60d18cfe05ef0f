"""A line that tells how training goes: redrawn in a terminal, one line per interval in a job log."""

import sys
import time
from typing import Any, TextIO

from eaft_verl.boundary import unguarded

INTERVAL_S = 10.0
SHOWN = {  # metric: what it is called and how it is written; an arm shows those it has
    "loss": ("loss", ".3f"),
    "nll": ("nll", ".3f"),
    "reward": ("reward", ".3f"),
    "weight_mean": ("weight", ".2f"),
    "anchor_kl": ("kl", ".3f"),
    "grad_norm": ("grad", ".2f"),
    "tokens_per_s": ("tok/s", ".0f"),
}


class Progress:
    """`update` after every step; rich's bar where the stream is a terminal, else plain lines."""

    def __init__(self, label: str, total: int, start: int = 0, stream: TextIO | None = None) -> None:
        self.label, self.total, self.stream = label, total, stream or sys.stderr
        self.first, self.started, self.last = start, time.monotonic(), 0.0
        self.bar: Any = None
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            console = Console(file=unguarded(self.stream))
            # redirected, what others print while the bar stands would reach the terminal unguarded
            text = TextColumn("{task.fields[text]}")
            self.bar = Bar(*columns, text, console=console, redirect_stdout=False, redirect_stderr=False)
            self.bar.start()
            self.task = self.bar.add_task(label, total=total, completed=start, text="")

    def update(self, step: int, row: dict[str, Any]) -> None:
        """Show one step's metrics."""
        text = " ".join(f"{label} {row[name]:{form}}" for name, (label, form) in SHOWN.items() if name in row)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, total=self.total, text=text)
            return
        now = time.monotonic()
        if now - self.last < INTERVAL_S and step < self.total:
            return
        self.last = now
        left = (now - self.started) / max(1, step - self.first) * (self.total - step)
        print(f"{self.label} step {step}/{self.total} {text} eta {left:.0f}s", file=self.stream, flush=True)

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.stop()
