"""One self-contained HTML page: styles and figures inline, no scripts, no requests."""

import base64
import re
from pathlib import Path
from string import Template


def shell(title: str, head: str, sections: list[tuple[str, str, str]], footer: str) -> str:
    """The page around its sections [(anchor, name in the navigation, HTML)]; all arguments are HTML already."""
    return Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8")).substitute(
        title=re.sub(r"<.*?>", "", title),
        head=head,
        links="\n".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in sections),
        content="\n".join(content for _, _, content in sections),
        footer=footer,
    )


def figure(image: bytes, seen: str, size: str = "") -> str:
    """A PNG inside the page; `seen` is its caption and what a screen reader says, escaped already.

    size: 'narrow' is drawn for the width of a phone, 'wide' is scrolled there.
    """
    source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    opening = f'<figure class="{size}">' if size else "<figure>"
    return f'{opening}<img src="{source}" alt="{seen}"><figcaption>{seen}</figcaption></figure>'
