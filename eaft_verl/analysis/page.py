"""Stores -> analysis.html, analysis.json, and figures/ with a PNG, a JSON and, for word clouds, a CSV each."""

import math
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from eaft_verl.analysis import clouds, figures, samples
from eaft_verl.analysis.aggregate import LISTED, Analysis, analyse, difference
from eaft_verl.analysis.gates import WORDS
from eaft_verl.analysis.store import TokenStore
from eaft_verl.analysis.verdict import HEADLINES, verdict
from eaft_verl.data.parquet import Example
from eaft_verl.data.show import visible
from eaft_verl.errors import DataError
from eaft_verl.files import write_bytes, write_json, write_text
from eaft_verl.pages import shell
from eaft_verl.pages.canvas import STYLE, png
from eaft_verl.pages.numbers import share, short
from eaft_verl.tokens.stats import CONFLICT_PROB, HIGH_ENTROPY, LOW_ENTROPY

SCHEMA = 1
PAGE, DATA = "analysis.html", "analysis.json"
TITLES = {"data": "Data", "own": "Own answers", "rollouts": "Rollouts"}
SECTIONS = {
    "verdict": "Verdict",
    "landscape": "Landscape",
    "conflicts": "Where conflicts are",
    "objectives": "What objectives do with them",
    "words": "Words",
    "fidelity": "Top-K fidelity",
    "samples": "Samples",
    "about": "What was analysed",
}
_SOMETIMES = [f"{kind}_{name}" for kind in ("landscape", "landscape_log", "scatter") for name in TITLES]
_SOMETIMES += ["gradients", "fidelity"]  # figures that not every page has
_WORST = 4
NAMED = 20  # sources in the table
Row = dict[str, Any]


def write_page(
    out: Path,
    stores: Sequence[TokenStore],
    tokenizer: Any,
    *,
    gates: Sequence[str] = WORDS,
    examples: Sequence[Example] | None = None,
    show: int = 0,
    measured: Row | None = None,
) -> Row:
    """Analyse the stores and write OUT/analysis.html, analysis.json and figures/; returns what analysis.json holds.

    stores: the data, and beside it the model's own answers or rollouts, if there are any; the first of these is what
    the verdict compares with. The caller holds the folder, so that no other process writes into it.
    examples: the prepared data, for prompts and flags; show: how many of its first rows are shown. measured:
    `fidelity.measure` of a pass.
    DataError: stores of different models or templates, or another tokenizer; ConfigError: a gate that is none.
    """
    _alike(stores)
    words = samples.Words(tokenizer)
    data = analyse(stores[0], words, gates)
    beside = [analyse(store, words, ("sft", "eaft"), data.survey, pictures=False) for store in stores[1:]]
    found: Row = {"schema": SCHEMA, "data": data.result, "beside": [one.result for one in beside], "fidelity": measured}
    apart = difference(data, beside[0]) if beside else None
    found |= {"difference": apart, "verdict": verdict(data.result, beside[0].result if beside else None, apart)}
    with matplotlib.rc_context(STYLE):
        drawn = draw(found)
    groups = _groups(data, words, examples, show)
    text = html(found, drawn, groups)
    _forget(out / "figures", {*_SOMETIMES, *(f"words_{name}" for name in data.result["clouds"])} - {*drawn})
    for name, (image, shown) in drawn.items():
        write_bytes(out / "figures" / f"{name}.png", image)
        write_json(out / "figures" / f"{name}.json", shown)
    for name, rows in data.result["clouds"].items():
        write_text(out / "figures" / f"words_{name}.csv", clouds.as_csv(rows))
    write_json(out / DATA, found)
    write_text(out / PAGE, text)
    return found


def _forget(folder: Path, names: Iterable[str]) -> None:
    """Remove what an earlier page has left of these figures: of answers, say, that this one is not given."""
    for name in names:
        for suffix in ("png", "json"):
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)


def _alike(stores: Sequence[TokenStore]) -> None:
    first = stores[0]
    for other in stores[1:]:
        for key in ("model", "template"):
            if other.meta["keys"][key] != first.meta["keys"][key]:
                raise DataError(
                    f"{other.path} and {first.path} were made with another {key} ({other.meta['keys'][key]}, "
                    f"{first.meta['keys'][key]}); a page shows one model"
                )


def draw(found: Row) -> dict[str, tuple[bytes, Any]]:
    """{name: (PNG, the data it shows)}."""
    data = found["data"]
    drawn: dict[str, tuple[Any, Any]] = {}
    for part in (data, *found["beside"]):
        name, plane = part["meta"]["origin"], part["landscape"]
        drawn[f"landscape_{name}"] = figures.landscape(plane, TITLES[name]), plane
        drawn[f"landscape_log_{name}"] = figures.log_landscape(plane, TITLES[name]), plane
        drawn[f"scatter_{name}"] = figures.scatter(plane, TITLES[name]), plane["points"]
    places = {TITLES[part["meta"]["origin"]]: part["breakdown"]["by_place"] for part in (data, *found["beside"])}
    drawn["places"] = figures.places(places), places
    drawn["gates"] = figures.gates(data["gates"]), data["gates"]["gates"]
    drawn["overlap"] = figures.overlap(data["gates"]), data["gates"]["overlap"]
    if data["fields"]:
        drawn["gradients"] = figures.gradients(data["fields"]), data["fields"]
    drawn["agreement"] = figures.agreement(data["agreement"]), data["agreement"]
    if found["fidelity"]:
        drawn["fidelity"] = figures.fidelity(found["fidelity"]["rows"]), found["fidelity"]
    for name, rows in data["clouds"].items():
        if rows:
            drawn[f"words_{name}"] = clouds.draw(rows, _highest(data)), rows[: clouds.WORDS]
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing from font"
        )  # words of any script; the page has them as text
        return {name: (png(figure), shown) for name, (figure, shown) in drawn.items()}


def _groups(
    data: Analysis, words: samples.Words, examples: Sequence[Example] | None, show: int
) -> list[tuple[str, list[Row]]]:
    """(title, samples) of what is shown token by token."""
    chosen = samples.worst(data.survey, _WORST) | {"first": data.survey.numbers[:show].tolist()}
    titles = {"loss": "Highest loss", "conflicts": "Most conflicts", "first": "First rows"}
    return [
        (
            titles[by],
            [samples.sample(data.store, data.survey, i, words, examples[i] if examples else None) for i in numbers],
        )
        for by, numbers in chosen.items()
    ]


def html(found: Row, drawn: dict[str, tuple[bytes, Any]], groups: list[tuple[str, list[Row]]]) -> str:
    """The page; everything that is text of the data or of the model is escaped."""
    loader = FileSystemLoader(Path(__file__).parent)
    strict: Row = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    template = Environment(loader=loader, **strict).get_template("analysis.html.j2")

    def figure(name: str, seen: str) -> Markup:
        return Markup(shell.figure(drawn[name][0], str(escape(seen))) if name in drawn else "")

    def block(name: str) -> Markup:
        return Markup("".join(template.blocks[name](template.new_context(values))))

    values = _values(found) | {"groups": groups, "figure": figure, "gates_table": lambda: block("gates")}
    meta = found["data"]["meta"]
    head = Markup("<h1>{}</h1>\n<p>{} trained tokens of {} samples, as the model sees them before training</p>").format(
        Path(meta["model"]).name, count(meta["tokens"]), count(found["data"]["breakdown"]["samples"])
    )
    sections = [
        (name, title, f'<section id="{name}">\n<h2><span>{i}</span>{title}</h2>{block(name)}</section>')
        for i, (name, title) in enumerate(SECTIONS.items(), 1)
    ]
    footer = f"Written by eaft analyze; every number is in {DATA}, every figure in figures/ with its data."
    return shell.shell(f"{escape(Path(meta['model']).name)}: analysis", str(head), sections, footer)


def _values(found: Row) -> Row:
    """What the template reads, and how it writes numbers and words."""
    parts = {part["meta"]["origin"]: part for part in (found["data"], *found["beside"])}
    panels = [{"name": name, "title": TITLES[name], "found": part} for name, part in parts.items()]
    values: Row = {
        "data": found["data"],
        "panels": panels,
        "verdict": found["verdict"],
        "remedies": HEADLINES,
        "measured": found["fidelity"],
    }
    values |= {"visible": visible, "named": NAMED}
    values |= {"low": LOW_ENTROPY, "high": HIGH_ENTROPY, "rare": CONFLICT_PROB, "listed": LISTED}
    values |= {"percent": share, "short": short, "count": count, "interval": interval}
    values |= {"highest": (highest := _highest(found["data"])), "ink": partial(clouds.ink, highest=highest)}
    return values | {"boxed": clouds.boxed, "size": clouds.size, "tint": tint}


def interval(row: Row) -> Markup:
    """Bounds below a share, if they are known."""
    return (
        Markup("")
        if row["low"] is None
        else Markup(" <small>{} to {}</small>").format(share(row["low"]), share(row["high"]))
    )


def count(value: float) -> str:
    """'13,219'."""
    return f"{value:,.0f}"


def _highest(data: Row) -> float:
    """The highest top-K entropy, nats."""
    return math.log(max(data["landscape"]["k"], 2))


def tint(prob: float, normalized: float) -> str:
    """Background of a token: red where the model is sure of another one, blue where it is unsure, none where p is 1."""
    red, blue = (1 - prob) * (1 - normalized), (1 - prob) * normalized
    alpha = min(0.75, red + blue)
    if alpha < 0.02:
        return ""
    mix = [round((red * a + blue * b) / (red + blue)) for a, b in zip((214, 60, 50), (70, 130, 220), strict=True)]
    return f"background:rgba({mix[0]},{mix[1]},{mix[2]},{math.floor(100 * alpha) / 100})"
