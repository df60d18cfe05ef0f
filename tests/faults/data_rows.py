"""Rows that cannot be trained on, in files that can and cannot be read."""

import gzip
import json
from pathlib import Path
from typing import Any

from .matrix import Lab, Outcome, fault

ODD: list[dict[str, Any]] = [
    {"conversations": [{"from": ["human"], "value": "a"}, {"from": "gpt", "value": "b"}]},
    *(
        {"prompt": "p", "response": f"r{at}", "tools": odd}
        for at, odd in enumerate(([1], 5, ["function"], [{"name": 5}]))
    ),
    {"prompt": "p", "response": "s1", "id": "\ud800"},
    {"prompt": "p", "response": "s2", "answer": "\udc00"},
    {"prompt": "p", "response": "s3", "tools": "[" * 5000},
    {"prompt": "p", "response": "s4", "tools": "9" * 5000},
    {"prompt": "p", "response": "s5", "weight": 10**400},
    {"prompt": "p", "response": "nul \0"},
    {"prompt": "p", "response": ""},
    {"messages": [{"role": "userr", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"messages": None},
    {},
]
DEEP = '{"prompt": "p", "response": "r", "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
DIGITS = '{"prompt": "p", "response": "r", "x": ' + "9" * 5000 + "}"


def sound(lab: Lab) -> list[dict[str, Any]]:
    """The laboratory's training rows."""
    return [json.loads(line) for line in (lab.folder / "train.jsonl").read_text().splitlines()]


def write(lab: Lab, rows: list[dict[str, Any]], name: str = "train.jsonl") -> Path:
    """Rows in place of those of the laboratory."""
    path = lab.folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def misspelt(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with a role that does not exist."""
    return [
        {"messages": [{"role": "userr", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]}
        for r in rows
    ]


@fault("12 of 16 training rows have role `userr`", "train stops before Ray: how many rows, why, the limit that lets it")
def _most_rows_are_faulty(lab: Lab) -> Outcome:
    rows = sound(lab)
    write(lab, misspelt(rows[:12]) + rows[12:])
    seen = lab.train()
    seen.refused(
        "12 of 16 rows are faulty, more than data.max_rejected=0.1 allows",
        "4 of 16 rows are used; 12 are not: role 12",
        "row 1 and 11 more: turn 1 has role 'userr'",
        "data.max_rejected=0.75",
    )
    assert not lab.out.exists() or not list(lab.out.glob("*/*.parquet"))
    return Outcome("exit 2: 12 of 16 rows are faulty, with the first five and what to do")


@fault(
    "12 of 16 rows have role `userr`, `eaft prepare`",
    "said on the terminal with the first reasons; a limit if asked",
    slow=True,
)
def _most_rows_prepared(lab: Lab) -> Outcome:
    rows = sound(lab)
    write(lab, misspelt(rows[:12]) + rows[12:])
    words = ("prepare", lab.folder / "train.jsonl", lab.folder / "p.parquet", "--model", lab.model)
    words += ("--max-length", "256")  # as in the recipe
    lab.eaft(*words, "--max-rejected", "0.5").refused("12 of 16 rows are faulty, more than --max-rejected 0.5")
    assert not (lab.folder / "p.parquet").exists()
    seen = lab.eaft(*words)
    assert seen.code == 0 and "4 of 16 rows are used; 12 are not: role 12" in seen.said
    assert "row 1 and 11 more: turn 1 has role 'userr'" in seen.said
    lab.train(f"data.train={lab.folder / 'p.parquet'}").refused("12 of 16 rows are faulty")  # what the manifest says
    return Outcome("exit 0 with counts and reasons; 2 with --max-rejected; train refuses the prepared file")


@fault("5 of 6 held-out rows are faulty", "refused like training rows")
def _heldout_rows(lab: Lab) -> Outcome:
    rows = [json.loads(line) for line in (lab.folder / "heldout.jsonl").read_text().splitlines()]
    write(lab, misspelt(rows[:5]) + rows[5:], "heldout.jsonl")
    lab.train().refused("5 of 6 rows are faulty")
    return Outcome("exit 2")


@fault("one source of a mixture is broken, the other is larger", "refused: the limit holds for each source")
def _source_of_a_mixture(lab: Lab) -> Outcome:
    rows = sound(lab)
    big, small = write(lab, rows[:14], "big.jsonl"), write(lab, misspelt(rows[14:15]), "small.jsonl")
    mixture = f"{{big: {big}, small: {small}}}"
    lab.train(f"data.train={mixture}").refused("source small: 1 of 1 rows are faulty")
    return Outcome("exit 2, the source is named")


@fault("all rows are copies but two", "copies are left out and counted, and are no fault")
def _copies(lab: Lab) -> Outcome:
    rows = sound(lab)
    write(lab, rows[:2] + rows[:1] * 14)
    seen = lab.eaft("prepare", lab.folder / "train.jsonl", lab.folder / "p.parquet", "--model", lab.model)
    assert seen.code == 0 and "2 of 16 rows are used; 14 are not: duplicate 14" in seen.said
    return Outcome("exit 0: 2 of 16 rows are used")


@fault("rows of 15 odd kinds among sound ones", "each is rejected with its number and a reason; no traceback")
def _odd_rows(lab: Lab) -> Outcome:
    write(lab, ODD + sound(lab))
    seen = lab.eaft("prepare", lab.folder / "train.jsonl", lab.folder / "p.parquet", "--model", lab.model)
    assert seen.code == 0 and "Traceback" not in seen.said, seen.said
    assert f"16 of {16 + len(ODD)} rows are used; {len(ODD)} are not" in seen.said
    listed = json.loads((lab.folder / "p.manifest.json").read_text())["rejected"]
    assert [entry["row"] for entry in listed] == list(range(1, len(ODD) + 1)) and all(e["reason"] for e in listed)
    return Outcome("exit 0, all of them listed in the manifest")


@fault("a row nested 100,000 deep, a number of 5,000 digits", "the dry run and the run name file and row", slow=True)
def _json_that_is_not_read(lab: Lab) -> Outcome:
    for text, said in ((DEEP, "nested too deeply"), (DIGITS, "a number of more than 4,300 digits")):
        (lab.folder / "train.jsonl").write_text(text + "\n")
        seen = lab.train("--dry-run")
        assert seen.code == 0 and f"train.jsonl row 1 (line 1) is not valid JSON ({said})" in seen.said
        lab.train().refused("train.jsonl row 1 (line 1)", said)
    return Outcome("exit 2, row 1 and why")


FILES: dict[str, tuple[bytes, str]] = {
    "empty.jsonl": (b"", "holds no rows"),
    "blank.jsonl": (b"\n \n", "holds no rows"),
    "x.csv": (b"prompt,response\na,b\n", "has suffix '.csv'"),
    "x.parquet": (b"no parquet", "is not a readable parquet file"),
    "cut.parquet": (b"PAR1 and nothing else", "is not a readable parquet file"),
    "binary.jsonl": (bytes(range(256)), "NUL byte"),
    "wide.jsonl": ('{"prompt": "a"}'.encode("utf-16"), "is UTF-16"),
    "latin.jsonl": ('{"prompt": "ü"}'.encode("latin-1"), "is not valid UTF-8"),
    "cut.jsonl.gz": (gzip.compress(b'{"prompt": "a", "response": "b"}\n' * 99)[:-9], "cannot be read"),
    "dict.json": (b'{"a": 1}', "a list of objects is expected"),
    "numbers.jsonl": (b"1\n2\n", "row 1 is int"),
    "torn.jsonl": (b'{"prompt": "a", "resp', "row 1 (line 1) is not valid JSON"),
}


@fault(
    f"training data that is no data: {', '.join(FILES)}, an empty folder",
    "a line at dry run and at the start",
    slow=True,
)
def _no_data(lab: Lab) -> Outcome:
    for name, (content, said) in FILES.items():
        (lab.folder / name).write_bytes(content)
        lab.train(f"data.train={lab.folder / name}").refused(name, said)
    (lab.folder / "folder").mkdir()
    lab.train(f"data.train={lab.folder / 'folder'}").refused("folder is not a file and holds none")
    seen = lab.train(f"data.train={lab.folder / 'empty.jsonl'}", "--dry-run")
    assert seen.code == 0 and "a run would stop here" in seen.said and "holds no rows" in seen.said
    return Outcome("exit 2, the file and what is wrong with it, before anything is loaded")


@fault("data.train, model, output and drift data begin with ~", "expanded the same everywhere", slow=True)
def _home(lab: Lab) -> Outcome:
    write(lab, sound(lab), "mine.jsonl")
    (lab.folder / "model").symlink_to(lab.model)
    keys = ("data.train=~/mine.jsonl", "model=~/model", "evaluate.drift.data=~/mine.jsonl")
    seen = lab.train(*keys, "output=~/here", "--dry-run", HOME=str(lab.folder))
    assert seen.code == 0 and "warning" not in seen.said and f"output: {lab.folder}/here\n" in seen.said, seen.said
    seen = lab.eaft("prepare", "~/mine.jsonl", lab.folder / "p.parquet", "--model", "~/model", HOME=str(lab.folder))
    assert seen.code == 0 and "16 examples from 16 rows" in seen.said
    lab.train("data.train=~/none.jsonl", HOME=str(lab.folder)).refused("none.jsonl")
    return Outcome("the same files as written out in full")
