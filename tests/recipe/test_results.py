"""Every number of README.md and recipes/*.md is held by a result file, and the texts are what those rebuild."""

import io
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes" / "results"))
import rebuild  # noqa: E402

# A number counts if it has a decimal point, an exponent, or a unit behind it: %, times, of time, of bytes.
# Not: code, links, names (Qwen2.5), plain whole numbers (3 seeds, 64 rows).
COUNTED = re.compile(
    r"(?<![\w.\-/=])[-+]?\d[\d,]*(?:\.\d+|(?=(?:\.\d+)?e-?\d|\s(?:%|times|s|ms|min|h|[KMGT]i?B)(?!\w)))(?:\.\d+)?(?:e-?\d+)?"
)
CONSTANTS = {  # why no result file holds them
    r"arXiv \d{4}\.\d{5}": "number of a paper",
    r"Python 3\.\d+(?:-3\.\d+)?": "versions",
    r"\(torch 2\.11, vLLM 0\.24, flash-attn 2\.8\.3\)": "versions, compared with pyproject.toml by test_docker.py",
    r"verl 0\.9\.1": "version",
    r"95 % intervals": "a confidence level",
    r"differ by more than 5 %": "budgets.TOLERANCE",
    r"1e-5, cosine, 0\.03 \(Table 4\)": "settings of the paper",
    r"betas 0\.9/0\.999, weight decay 0, clipping 1\.0": "settings",
    r"one node of 8, 80 GB": "what is asked for",
    r"coefficient 0\.5, direction not stated \| 0\.5,": "setting of the paper",
    r"H_top20 / 3\.0 as printed": "the paper's constant",
    r"lowest 15 % of entropies": "the paper's percentile",
    r"floor 0\.01": "a setting",
    r"lr 1e-6": "a setting",
    r"section 5\.1": "of the paper",
    r"fp32 Adam needs 95 of 80 GiB": "16 bytes for each of 32.8e9 parameters, and gradients, on 8 devices",
    r"\b3\.0 makes every weight|by 3\.0[;| ]|a fixed 0\.17": "the paper's constants",
    r"TRL 1\.16|torch 2\.11, no flash-attn|bfcl-eval \d{4}\.\d+\.\d+": "versions",
    r"`coef` from 0\.1": "where to begin",
    r"below 0\.1 a step rests|above 0\.1 the two": "rules of thumb",
    r"1, 1, s \| passes": "units",
    r"temperatures? (?:0\.95, 0\.9, 0\.8|of 0\.[89])": "what was set, not found",
    r"default of 64 MiB": "Docker's",
    r"limit of 1,800 s": "PyTorch's",
}


def texts() -> dict[str, str]:
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in rebuild.TEXTS}


def blank(pattern: str, text: str, flags: int = 0) -> str:
    """The text with every match as spaces, so that places stay what they are."""
    return re.sub(pattern, lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=flags)


def not_held(text: str) -> list[str]:
    """Numbers, with the words around them, that neither a result line nor the table nor a constant accounts for."""
    spans = [
        tuple(place[:2])
        for row in rebuild.lines()
        for says in row["says"]
        for place in rebuild.said_in(text, says, row)
    ]
    spans += [place[:2] for place in rebuild.blocks(text)]
    spans += [match.span() for pattern in CONSTANTS for match in re.finditer(pattern, text)]
    prose = blank(r"\]\([^)]*\)", blank(r"`[^`\n]*`", blank(r"^```.*?^```", text, re.S | re.M)))
    return [
        text[max(0, found.start() - 30) : found.end() + 20]
        for found in COUNTED.finditer(prose)
        if not any(start <= found.start() and found.end() <= end for start, end in spans)
    ]


@pytest.mark.parametrize("name", rebuild.TEXTS)
def test_every_number_is_held_by_a_result_file(name: str) -> None:
    assert not_held(texts()[name]) == []


@pytest.mark.parametrize("name", rebuild.TEXTS)
def test_the_text_is_the_rebuilt_text(name: str) -> None:
    text = texts()[name]
    assert rebuild.rebuilt(text) == text, "python recipes/results/rebuild.py"


def test_every_result_is_said_and_has_its_source() -> None:
    assert rebuild.unsaid(list(texts().values())) == []
    for row in rebuild.lines():
        assert row["command"] and row["commit"] and row["machine"], row["name"]


@pytest.mark.parametrize(
    ("words", "held"),
    [
        ("EAFT gains 3.7 points.", False),
        ("It takes 12 s.", False),
        ("It forgets 4 % less.", False),
        ("KL is 2e-9 there.", False),
        ("0.5 [0.4, 0.6]", False),
        ("3 seeds of Qwen2.5-32B, `lr=1e-5`, [link](http://x/2.5)", True),
        ("One step took 1.33 times one of SFT", True),
        ("One step took 1.30 times one of SFT", True),  # held; the rebuilt text is another one
    ],
)
def test_what_counts_as_a_number(words: str, held: bool) -> None:
    assert (not_held(words) == []) is held


def test_a_changed_number_is_put_right() -> None:
    assert rebuild.rebuilt("took 1.30  times one\nof SFT") == "took 1.33  times one\nof SFT"
    table = rebuild.table(rebuild.quickstart())
    assert rebuild.rebuilt("a\n" + table.replace("37.2", "99.9") + "b\n") == "a\n" + table + "b\n"


def test_a_line_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in rebuild.HERE.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "more.jsonl").write_text('{"name": "x", "value": "1.29"}\n')
    monkeypatch.setattr(rebuild, "HERE", tmp_path)
    with pytest.raises(ValueError, match=r"more.jsonl:1 must have command, commit, high, low, machine, name, says"):
        rebuild.lines()


def test_the_figures_are_those_of_the_result_files(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    rebuild.draw(tmp_path)
    drawn = sorted(tmp_path.glob("*.png"))
    assert [file.stem for file in drawn] == [
        *sorted(path.stem for path in rebuild.HERE.glob("landscape_*.json")),
        "quickstart_paths",
        "study_paths",
        "study_sums_paths",
    ]
    for file in drawn:
        new, old = (
            image.imread(io.BytesIO(path.read_bytes())) for path in (file, ROOT / "recipes/figures" / file.name)
        )
        assert new.shape == old.shape and abs(new - old).mean() < 0.01, file.name
