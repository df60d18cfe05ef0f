"""report.md from its template, and report.html from report.md."""

import re
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt

from eaft_verl.pages import numbers
from eaft_verl.pages.colors import palette
from eaft_verl.pages.shell import figure, shell
from eaft_verl.reporting import forgetting_tables, markdown, paper, tables, weights, wording
from eaft_verl.reporting.labels import LABELLED

Row = dict[str, Any]
_FOLDER = Path(__file__).parent
_FOOTER = "Written by eaft report from run directories only; every number is in report.json, every figure in figures/."
_MARKS = {f"\u00a0{arrow}": name for name, arrow in markdown.ARROWS.items()}


def text(report: Row, drawn: set[str]) -> str:
    """report.md. Whatever is not of the template itself is escaped; `drawn`: the figures that exist in figures/."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        finalize=markdown.written,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rooms = {"tables": tables, "paper": paper, "forgetting": forgetting_tables, "weights": weights}
    environment.globals |= vars(markdown) | vars(numbers) | vars(wording) | rooms
    sides = {column["side"] for column in report["columns"]}
    seeds = max(len(seeds) for seeds in report["seeds"].values())
    shown = {"drawn": drawn, "sides": sides, "seeds": seeds, "labelled": len(report["arms"]) <= LABELLED}
    found = environment.get_template("report.md.j2").render(report=report, **shown)
    return re.sub(r"\n{3,}", "\n\n", found).strip() + "\n"


def html(text: str, arms: list[str], figures: dict[str, bytes]) -> str:
    """The page: styles and figures inline, no scripts, no requests. Markdown's own HTML is off.

    What is replaced below are tags, and text cannot hold one: every `<` of it is `&lt;` by now.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = re.sub(r"<(t[hd])([^>]*)>(.+?)</t[hd]>", _cell, body)
    body = re.sub(r"<tr>\n<td([^>]*)>(.*?)</td>", r'<tr>\n<th scope="row"\1>\2</th>', body)
    body = body.replace("<table>", '<div class="scroll" tabindex="0"><table>').replace("</table>", "</table></div>")
    body = re.sub(r"<p>((?:<img [^>]*>\s*)+)</p>", r'<div class="figures">\1</div>', body)
    body = re.sub(r'<img src="figures/(\w+)\.png" alt="(.*?)" />', lambda img: _figure(figures, *img.groups()), body)
    body = body.replace("<blockquote>\n<p><strong>", '<blockquote class="banner" role="alert">\n<p><strong>', 1)
    for arm, color in palette(arms).items():
        name = re.escape(escape(wording.arm_name(arm)))
        body = re.sub(
            rf"<strong>(?={name}(?:<| \u2212))", f'<strong><i class="dot" style="background:{color}"></i>', body
        )
    head, *sections = re.split(r"<h2>\d+\. ", body)
    titles = [section.partition("</h2>")[0].partition(":")[0] for section in sections]
    anchors = [re.sub(r"\W+", "-", title.lower()) for title in titles]
    parts = zip(anchors, titles, map(_section, anchors, range(1, len(sections) + 1), sections), strict=True)
    return shell(f"{head.partition('</h1>')[0]}: report", head, list(parts), _FOOTER)


def _figure(figures: dict[str, bytes], name: str, seen: str) -> str:
    return figure(figures[name], seen, "wide" if name.startswith("curves") else "narrow")


def _cell(found: re.Match[str]) -> str:
    """Lines of a table cell below each other; a verdict becomes a class."""
    tag, attributes, text = found.groups()
    if mark := _MARKS.get(text[-2:]):
        attributes += f' class="{mark}"'
        text = f'{text[:-2]}<span class="mark">{text[-2:]}</span>'
    first, *lines = text.split(markdown.LINE)
    return f"<{tag}{attributes}>{first}{''.join(f'<small>{line}</small>' for line in lines)}</{tag}>"


def _section(anchor: str, order: int, text: str) -> str:
    """A section under its anchor. Parts under headings of the fourth level fold; the first of several is open."""
    first, *others = re.split(r"(?=<h[34]>)", text)
    parts, fold = [first], " open"
    for part in others:
        folds = part.startswith("<h4>")
        parts.append(f"<details{fold}>{part.replace('h4>', 'summary>', 2)}</details>" if folds else part)
        fold = "" if folds else " open"
    return f'<section id="{anchor}">\n<h2><span>{order}</span>{"".join(parts)}\n</section>'
