"""The report as one self-contained HTML page and as Markdown."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from eaft_verl.reporting.colors import palette
from eaft_verl.reporting.sections import Block, Section
from eaft_verl.reporting.tables import escape, markdown
from eaft_verl.reporting.wording import DASH, arm_name, plain

Row = dict[str, Any]


def html(report: Row, sections: list[Section], figures: dict[str, bytes]) -> str:
    """The page: styles and figures inline, no scripts, no requests; all text is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(arm_name=arm_name, plain=plain, subtitle=subtitle(report))
    images = {name: "data:image/png;base64," + base64.b64encode(data).decode() for name, data in figures.items()}
    colors = palette(report["arms"])
    return environment.get_template("report.html.j2").render(
        report=report, sections=sections, images=images, colors=colors
    )


def subtitle(report: Row) -> str:
    """Model, arms and seeds in one line."""
    seeds = max(len(seeds) for seeds in report["seeds"].values())
    return f"{report['model']} \u00b7 {', '.join(map(arm_name, report['arms']))} \u00b7 {seeds} seed{'s' * (seeds > 1)}"


def text(report: Row, sections: list[Section]) -> str:
    """The report as Markdown with the same numbers; figures are links into figures/."""
    lines = [f"# {report['recipe']}", "", _safe(subtitle(report)), ""]
    if report["problems"]:
        lines += [
            "> **Forced: these runs are not comparable.**",
            *(f"> - {_safe(line)}" for line in report["problems"]),
            "",
        ]
    for order, section in enumerate(sections, 1):
        lines += [f"## {order}. {section.title}", ""]
        for block in section.blocks:
            lines += [f"### {block.title}", ""] if block.title else []
            lines += [*_block(block), ""]
    return "\n".join(lines).rstrip() + "\n"


def _safe(line: str) -> str:
    return escape(line).replace("\\|", "|")


def _block(block: Block) -> list[str]:
    content = block.content
    match block.kind:
        case "text":
            return [_safe(content)]
        case "note":
            return [f"> {_safe(content)}"]
        case "list":
            return [f"- {_safe(line)}" for line in content]
        case "cards":
            return [f"- **{_safe(card['name'])}**: {_safe(' '.join(card['sentences']))}" for card in content]
        case "table":
            return [markdown(content)]
        case "figures":
            return [f"![{figure.alt}](figures/{figure.name}.png)" for figure in content]
        case "tabs":
            return [f"![{figure.alt}](figures/{figure.name}.png)" for _, figure in content]
        case "samples":
            return [line for example in content for line in _example(example)]
        case "glossary":
            return [f"- **{term}**: {_safe(meaning)}" for term, meaning in content.items()]
    raise AssertionError(block.kind)


def _example(example: Row) -> list[str]:
    lines = [f"- **{_safe(example['id'])}**: {_safe(example['prompt'])} (target: {_safe(example['target']) or DASH})"]
    for arm, answer in example["answers"].items():
        lines.append(f"  - {_safe(arm_name(arm))} ({plain(answer['score'])}): {_safe(answer['text'])}")
    return lines
