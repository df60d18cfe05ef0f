"""Samples on a terminal, token by token: role, mask, and what the model says of each trained token."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, TextIO

import numpy as np
import torch

from eaft_verl.analysis.store import TokenStore
from eaft_verl.data.parquet import Example
from eaft_verl.data.roles import ROLES, inspect
from eaft_verl.data.show import visible
from eaft_verl.objectives import Eaft
from eaft_verl.tokens.stats import TokenStats

CONTEXT = 60  # characters that are shown of text that is not trained
_HEADING = f"{'role':10} {'p':>6} {'H':>6} {'weight':>6}  token"


def show_samples(store: TokenStore, examples: Sequence[Example], tokenizer: Any, count: int, stream: TextIO) -> None:
    """The first `count` samples: a line per trained token with its probability, top-K entropy (nats) and EAFT weight.

    Runs of tokens that are not trained are one line. Conflicts (H <= 0.5 nats, p < 0.2) are red on a terminal.
    """
    from rich.console import Console

    console = Console(file=stream, highlight=False, emoji=False, markup=False, soft_wrap=True)
    for index, example in enumerate(examples[:count]):
        found = inspect(tokenizer, example)
        console.print(
            f"--- {store.meta['origin']} {index + 1}/{len(examples)}  {visible(example.id)}  "
            f"{len(example.input_ids)} tokens, {sum(example.loss_mask)} trained",
            style="bold",
        )
        for flag in found.flags:
            console.print(f"  ! {flag}", style="yellow")
        console.print(_HEADING, style="dim")
        for line, style in lines(store, index, example, found.roles, tokenizer):
            console.print(line, style=style)


def lines(
    store: TokenStore, index: int, example: Example, roles: np.ndarray[Any, Any], tokenizer: Any
) -> list[tuple[str, str]]:
    """(text, style) of every line of a sample."""
    rows = store.sample(index)
    logprob, entropy = (torch.tensor(rows.column(name).to_numpy()) for name in ("logprob", "entropy"))
    weight = Eaft(k=store.meta["k"]).weight(TokenStats(logprob, entropy, store.meta["k"]))
    values = zip(logprob.exp().tolist(), entropy.tolist(), weight.tolist(), strict=True)
    known = dict(zip(rows.column("position").to_pylist(), values, strict=True))
    made = []
    for role, trained, run in _runs(roles, known):
        if not trained:
            text = visible(tokenizer.decode([example.input_ids[position] for position in run]))
            shown = text if len(text) <= CONTEXT else f"{text[: CONTEXT // 2]} ... {text[-CONTEXT // 2 :]}"
            made.append((f"{role:10} {'':20}  {shown} ({len(run)} tokens, not trained)", "dim"))
            continue
        for position in run:
            p, h, w = known[position]
            text = visible(tokenizer.decode([example.input_ids[position]]))
            made.append((f"{role:10} {p:6.3f} {h:6.3f} {w:6.3f}  {text}", "red" if h <= 0.5 and p < 0.2 else ""))
    return made


def _runs(roles: np.ndarray[Any, Any], known: dict[int, Any]) -> list[tuple[str, bool, list[int]]]:
    """(role, trained, positions) of each run of like tokens."""
    like = groupby(range(len(roles)), key=lambda position: (ROLES[roles[position]], position in known))
    return [(role, trained, list(run)) for (role, trained), run in like]
