"""Prepared rows on a terminal, with the trained tokens marked."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, TextIO

from eaft_verl.boundary import inert, masked, unguarded
from eaft_verl.data.prepare import Prepared
from eaft_verl.data.roles import inspect

# (trained, special): style
_STYLES = {
    (False, False): "",
    (False, True): "bold magenta",
    (True, False): "black on green",
    (True, True): "bold magenta on green",
}


def show(prepared: Prepared, tokenizer: Any, count: int, stream: TextIO) -> None:
    """Print the first `count` examples to `stream`: trained tokens on green, or in [[ ]] when it is no terminal.

    Special tokens stand out, and a line break is shown as ⏎ before it breaks the line.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(file=unguarded(stream), highlight=False, emoji=False, markup=False, soft_wrap=True)
    special = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    for number, example in enumerate(prepared.examples[:count], 1):
        tokens, trained = len(example.input_ids), sum(example.loss_mask)
        console.print(
            f"--- {number}/{len(prepared.examples)}  {inert(example.id)}  {tokens} tokens, {trained} trained",
            style="bold",
        )
        for flag in inspect(tokenizer, example).flags:
            console.print(f"! {flag}", style="yellow")
        if not console.is_terminal:
            console.print(bracketed(tokenizer, example.input_ids, example.loss_mask))
            continue
        line = Text()
        for is_trained, is_special, text in _pieces(tokenizer, example.input_ids, example.loss_mask, special):
            line.append(text, _STYLES[is_trained, is_special])
        console.print(line)


def bracketed(tokenizer: Any, input_ids: Sequence[int], loss_mask: Sequence[int]) -> str:
    """The text of an example with each run of trained tokens in [[ ]] and line breaks as ⏎."""
    pieces = _pieces(tokenizer, input_ids, loss_mask, set())
    return "".join(f"[[{text}]]" if trained else text for trained, _, text in pieces)


def _pieces(
    tokenizer: Any, input_ids: Sequence[int], loss_mask: Sequence[int], special: set[int]
) -> list[tuple[bool, bool, str]]:
    """(trained, special, text) of each run of like tokens; runs, because a character may be several tokens."""
    pairs = list(zip(input_ids, loss_mask, strict=True))
    pieces = []
    for (trained, is_special), run in groupby(pairs, key=lambda pair: (bool(pair[1]), pair[0] in special)):
        text = tokenizer.decode([index for index, _ in run], clean_up_tokenization_spaces=False)
        pieces.append((trained, is_special, inert(masked(text)).replace("\n", "⏎\n")))
    return pieces


def visible(text: str) -> str:
    """The text on one line, breaks as ⏎, with nothing in it that steers a terminal."""
    return inert(masked(text)).replace("\n", "⏎")
