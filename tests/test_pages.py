"""README and pages: links lead somewhere, commands are understood, tables hold every name and code."""

import re
import shlex
from pathlib import Path

import pytest

from eaft_verl.errors import EXIT_CODES
from eaft_verl.experiment.arguments import parser
from eaft_verl.recipe.resolve import load_recipe, resolve
from eaft_verl.training.grpo.metrics import COUNTED, NAMES
from eaft_verl.training.progress import SHOWN

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "examples/README.md", ROOT / "eaft_verl/README.md", *ROOT.glob("recipes/*.md")]
)
name_of = {page: str(page.relative_to(ROOT)) for page in PAGES}
FENCE = re.compile(r"^```bash\n(.*?)^```", re.S | re.M)


def anchors(page: Path) -> set[str]:
    """What a page's headings are called behind #, as GitHub does it."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name_of.get)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def commands() -> list[tuple[str, str]]:
    """(page, command) of every `eaft ...` line in a block of shell, comments and loops cut off."""
    found = []
    for page in PAGES:
        for block in FENCE.findall(page.read_text(encoding="utf-8")):
            joined = block.replace("\\\n", " ")
            found += [(name_of[page], line) for line in re.findall(r"(?:^|do )(eaft [^;#\n]+)", joined, re.M)]
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_are_understood(page: str, line: str) -> None:
    """Verbs and options by the parser; recipes that are here exist, and overrides name keys that may be set."""
    options, rest = parser().parse_known_args(shlex.split(line)[1:])
    assert not [word for word in rest if word.startswith("-")], line
    recipe = getattr(options, "recipe", None) or ""
    if recipe.startswith("recipes/") and recipe != "recipes/mine.yaml":
        assert (ROOT / recipe).is_file(), line
    words = [*rest, *getattr(options, "overrides", [])]
    overrides = [word.replace("$lr", "1e-5") for word in words if "=" in word and options.verb != "synthesize"]
    resolve(load_recipe(str(ROOT / "recipes/quickstart.yaml")), "eaft", overrides)


def rows_of(page: str, column: int = 0) -> list[str]:
    """The cells of a column of every table of a page."""
    lines = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [re.split(r"(?<!\\)\|", line)[column + 1].strip() for line in lines]


def test_every_name_of_the_metrics_is_explained() -> None:
    from eaft_verl.training.sft.trainer import LOGGED

    explained = {name for cell in rows_of("recipes/watch.md") for name in re.findall(r"`(\w+)`", cell)}
    written = {*SHOWN, *LOGGED, *NAMES, *COUNTED, "step", "epoch", "time", "seconds", "tokens", "samples", "step_s"}
    assert written - explained == set()


def test_exit_codes_are_the_programs() -> None:
    table = dict(zip(rows_of("recipes/watch.md"), rows_of("recipes/watch.md", 1), strict=True))
    assert {int(code): words.replace("`", "") for code, words in table.items() if code.isdigit()} == {
        code: words.replace("`", "") for code, words in EXIT_CODES.items()
    }


def test_defaults_hold_every_key_of_ours() -> None:
    """Each key that a recipe may set stands in defaults.yaml with a word on what it is."""
    from dataclasses import fields

    from eaft_verl.recipe.config import Config

    text = (ROOT / "eaft_verl/recipe/defaults.yaml").read_text(encoding="utf-8")
    named = set(re.findall(r"^(\w+):", text, re.M))
    made = {"recipe", "arm", "budget", "verl"}  # filled in by the resolution, or verl's own tree
    assert {field.name for field in fields(Config)} - named - made == set()
