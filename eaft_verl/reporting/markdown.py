"""Markdown in which text stays text: what the template of the report.md escapes its values with, and its tables."""

import re
from dataclasses import dataclass
from typing import Any

from eaft_verl.boundary import STEERING
from eaft_verl.pages.numbers import DASH

ARROWS = {"better": "\u25b2", "worse": "\u25bc"}
LINE = " \u00b7\u00a0"  # between the lines of a cell; no data can hold it, because `safe` leaves no such space
_MARKUP = re.compile(
    r"[\\`*~$|]"  # code, emphasis, formulas, table cells
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis; inside a word it is none
    r"|!(?=\[)|\](?=[(\[:])|\[(?=\^)"  # images, links, their definitions, footnotes; [1, 2] is none of them
    r"|:(?=//)|(?<=/)/|(?<=\w)\.(?=[^\W\d])|@(?=\w)|(?i:(?<=mailto):|(?<=xmpp):)"  # addresses that viewers link
    r"|#(?=#*$)"  # the closing hashes of a heading
    r"|^[#\->=:]|^\+(?= |$)|^\[(?=[ xX]\])"  # headings, lists, quotes, rules, task boxes
)


@dataclass(frozen=True)
class Cell:
    """Main text, smaller lines below it, a verdict ('better', 'worse' or '') and the arm that it names."""

    text: str
    lines: tuple[str, ...] = ()
    mark: str = ""
    arm: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """The first column names the rows; the others are numbers, or text of any length."""

    header: list[Cell]
    rows: list[list[Cell]]
    numeric: bool = True


class Markdown(str):
    """Text that is Markdown already."""


def written(value: Any) -> str:
    """A value as the template writes it: Markdown as it is, all else as text."""
    return value if isinstance(value, Markdown) else safe(str(value))


def safe(text: str) -> str:
    """Markdown that shows this text and nothing else, on one line, anywhere: no markup of it, no HTML, no controls."""
    text = " ".join(_seen(text).split())
    text = _MARKUP.sub(r"\\\g<0>", text.replace("&", "&amp;").replace("<", "&lt;"))
    return re.sub(r"^(\d+)(?=[.)](?: |$))", r"\1\\", text)


def _seen(text: str) -> str:
    """The text without what steers or hides; white space of every kind stays, and half a character is a '?'."""
    text = text.encode("utf-8", "replace").decode()
    return STEERING.sub(lambda found: found[0] if found[0].isspace() else "", text)


def verbatim(text: str, indent: str = "") -> Markdown:
    """`safe`, with line breaks and runs of spaces kept; `indent` is that of the list item it stands in."""
    lines = []
    for line in re.sub(r"\A\s*\n", "", _seen(text)).rstrip().splitlines():
        spaced = re.sub(r"^ | (?= )", "\u00a0", line.expandtabs(4).rstrip())
        lines.append("&nbsp;".join(map(safe, spaced.split("\u00a0"))))
    return Markdown(f"\\\n{indent}".join(lines) or DASH)


def table(content: Table) -> Markdown:
    """The table in GitHub's Markdown; nothing if it has no row."""
    rule = [":---", *["---:"] * (len(content.header) - 1)] if content.numeric else ["---"] * len(content.header)
    rows = [list(map(_flat, content.header)), rule, *(list(map(_flat, row)) for row in content.rows)]
    return Markdown("\n".join(f"| {' | '.join(row)} |" for row in rows) if content.rows else "")


def _flat(cell: Cell) -> str:
    text = f"**{safe(cell.text)}**" if cell.strong else safe(cell.text)
    text = LINE.join(part for part in (text, *map(safe, cell.lines)) if part)
    return f"{text}\u00a0{ARROWS[cell.mark]}" if cell.mark else text
