"""The numbers, the table and the figures of README.md and recipes/*.md, from the result files beside this script.

    python recipes/results/rebuild.py                  writes them into the texts and recipes/figures/
    python recipes/results/rebuild.py --check          names what does not stand there as it should; exit code 1
    python recipes/results/rebuild.py --quickstart runs/quickstart/report      takes quickstart.json from a report first
    python recipes/results/rebuild.py --landscape runs/.../analysis --commit C --command '...'   landscape_*.json
    python recipes/results/rebuild.py --plans          plans.jsonl from `eaft plan` of the paper's recipes; minutes

To add a number: one line in a *.jsonl file here, and the text.

    {"name": "own.thing", "value": 1.29, "low": null, "high": null, "unit": "times", "says": ["took {value:.2f} times"],
     "command": "python tests/benchmarks/step_time.py", "commit": "58094f8", "machine": "2 cores of an AMD EPYC"}

value, low, high: in the unit in which they are said. says: the words of the texts, each with its numbers as format
fields ({value:.2f}, {low:+.1f}, {commit}); spaces stand for any white space, … for anything within the line. commit: of
the measurement; "unknown" where nobody wrote it down. Every line must be said somewhere; every number of the texts must
be said by a line, or stand in the table, or be among the constants of tests/recipe/test_results.py.
study_sums.json: from study.py beside this script; quickstart.json: what is needed of a report.json; landscape_*.json:
the histogram that `eaft analyze` draws.
"""

import argparse
import json
import re
import string
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
import study  # noqa: E402

PAGES = ("README", "arms", "choose", "data", "trainers", "troubleshooting", "watch")
TEXTS = ("README.md", "examples/README.md", "eaft_verl/README.md", *(f"recipes/{page}.md" for page in PAGES))
TEXTS += ("recipes/results/study.md",)
ORDER = ("name", "value", "low", "high", "unit", "says", "command", "commit", "machine")
FIELDS = set(ORDER)
PLANNED = (
    "math_qwen3_4b",
    "math_qwen2_5_32b",
    "math_glm4_9b",
    "medical_qwen3_4b_thinking",
    "agent_qwen3_4b",
    "lr_sweep_qwen3_4b",
)
KEPT = ("columns", "results", "versus", "noise", "equal_gain", "paths", "arms", "seeds", "controls", "resamples")
TABLE = "| quickstart, "  # how the table's first line begins
COLUMNS = (("two_shot_sums", 1), ("heldout", 3), ("general_mean", 1), ("drift.kl", 4))  # and decimals
GROUPS = {"commit": r"[0-9a-f]{7,40}|unknown", "command": r"[^`]+"}
LOSSES = {  # as the benchmark calls them: as the page does
    "3 products": "three bare matrix products",
    "EAFT, ours Triton": "EAFT here",
    "CE, ours Triton": "cross-entropy by the same code",
    "CE, eager": "cross-entropy, eager",
    "CE, eager compiled": "cross-entropy, eager, compiled",
    "EAFT, as LLaMA-Factory": "EAFT as in LLaMA-Factory",
    "CE, verl fused": "verl's fused cross-entropy",
    "CE, verl Triton": "verl's Triton cross-entropy",
}
STUDY = {
    "base": "base",
    "sft_3e5": "`sft`, `lr=3e-5`",
    "sft": "`sft`, `lr=1e-4`",
    "sft_3e4": "`sft`, `lr=3e-4`",
    "eaft": "`eaft`, `lr=1e-4`",
    "eaft_3e4": "`eaft`, `lr=3e-4`",
    "masked": "`masked`, `lr=1e-4`",
    "sft_kl": "`sft_kl`, `lr=1e-4`",
    "dft": "`dft`, `lr=1e-4`",
}
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"

Row = dict[str, Any]


class Said(NamedTuple):
    """A place in a text that a field of a line stands for."""

    start: int
    end: int
    text: str  # what must stand there


def lines() -> list[Row]:
    """Every number of the result files; ValueError naming file and line that is none."""
    found = []
    for path in sorted(HERE.glob("*.jsonl")):
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            row = json.loads(text)
            if set(row) != FIELDS or not isinstance(row["value"], int | float) or not row["says"]:
                raise ValueError(
                    f"{path.name}:{number} must have {', '.join(sorted(FIELDS))}, value a number, says words"
                )
            found.append(row)
    found += _of_quickstart(quickstart()) + _of_h100(h100())
    if twice := {row["name"] for row in found if sum(one["name"] == row["name"] for one in found) > 1}:
        raise ValueError(f"{', '.join(sorted(twice))}: more than one line has this name")
    return found


def quickstart() -> Row:
    """quickstart.json."""
    return json.loads((HERE / "quickstart.json").read_text(encoding="utf-8"))


def h100() -> Row:
    """gpu_h100.json, as tests/gpu/run.sh leaves it, and the study that ran beside it."""
    return json.loads((HERE / "gpu_h100.json").read_text(encoding="utf-8"))


def said_in(text: str, template: str, row: Row) -> list[Said]:
    """Where the template stands in the text, field by field, whatever numbers stand there now."""
    pattern, rendered = "", []
    for literal, field, spec, _ in string.Formatter().parse(template):
        pattern += r"\s+".join(re.escape(word).replace("…", r"[^\n]*?") for word in re.split(r"\s+", literal))
        if field is not None:
            value = str(row[field])[:7] if field == "commit" else row[field]
            rendered.append(format(value, spec or ""))
            pattern += f"({GROUPS.get(field, NUMBER)})"
    return [
        Said(*match.span(group), words)
        for match in re.finditer(pattern, text)
        for group, words in enumerate(rendered, 1)
    ]


def table(found: Row) -> str:
    """The quickstart's table: score, and difference to the base with a mark where it may be called better or worse."""
    arms, results, seeds = found["arms"], found["results"], len(next(iter(found["seeds"].values())))
    names = {"sft": "SFT", "eaft": "EAFT"}
    head = (
        f"{TABLE}{found['updates']} updates, {seeds} seeds | two-shot sums | held-out NLL | general mean | KL to base |"
    )
    rows = [head, "|" + " --- |" * 5, _line("base", [_base(found, *column) for column in COLUMNS])]
    rows += [_line(names[arm], [_cell(found, results[arm], *column) for column in COLUMNS]) for arm in arms]
    for arm, cells in found["versus"]["arms"].items():
        less = [_change(found, cells[name], name, decimals) for name, decimals in COLUMNS]
        rows.append(_line(f"{names[arm]} less {names[found['versus']['reference']]}", less))
    noise, general = found["noise"], [row for name, row in found["noise"]["accuracy"].items() if name != COLUMNS[0][0]]
    target = noise["accuracy"][COLUMNS[0][0]]
    answers = [f"{sum(r['changed'] for r in g)} of {sum(r['n'] for r in g)} answers" for g in ([target], general)]
    rows.append(_line("noise floor", [answers[0], _power(noise["nll"]), answers[1], _power(noise["kl"])]))
    return "\n".join(rows) + "\n"


def _line(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _power(value: float) -> str:
    return re.sub(r"e-0*", "e-", f"{value:.0e}")


def _column(found: Row, name: str) -> tuple[float, bool]:
    """(factor, higher is better) of a measure."""
    column = next(one for one in found["columns"] if one["id"] == name)
    return (100.0 if column["percent"] else 1.0), column["higher_is_better"]


def _base(found: Row, name: str, decimals: int) -> str:
    scale, _ = _column(found, name)
    score = found["results"]["base"][name]["score"] * scale
    return f"{score:.{decimals}f} %" if scale > 1 else f"{score:.{decimals}f}" if score else "0"


def _cell(found: Row, cells: Row, name: str, decimals: int) -> str:
    cell, (scale, _) = cells[name], _column(found, name)
    if name == "drift.kl":  # against the base every model is away from it
        return f"{cell['score']:.{decimals}f} [{cell['low']:.{decimals}f}, {cell['high']:.{decimals}f}]"
    change = _change(found, cell["delta"], name, decimals)
    interval, _, mark = change.partition("]")
    return f"{cell['score'] * scale:.{decimals}f}{' %' if scale > 1 else ''} ({interval}]){mark}"


def _change(found: Row, delta: Row, name: str, decimals: int) -> str:
    scale, higher = _column(found, name)
    value, low, high = (f"{delta[key] * scale:+.{decimals}f}" for key in ("delta", "low", "high"))
    mark = "" if delta["unmarked"] else " ▲" if (delta["delta"] > 0) == higher else " ▼"
    return f"{value} [{low}, {high}]{mark}"


def _of_quickstart(found: Row) -> list[Row]:
    """What README's words say of the quickstart beside its table."""
    about = {key: found[key] for key in ("command", "commit", "machine")} | {"unit": "nats per token"}
    say = {
        0.5: "(KL {value:+.4f} [{low:+.4f}, {high:+.4f}] at half of the gain",
        1.0: "the gain, {value:+.4f} [{low:+.4f}, {high:+.4f}] at all of it",
    }
    rows = [
        {
            "name": "quickstart.source",
            "value": 0,
            "low": None,
            "high": None,
            "says": ["`{command}`, commit {commit}. Brackets"],
        }
        | about
    ]
    for level in found["equal_gain"]["heldout"]["levels"]:
        if level["fraction"] in say:
            delta = level["arms"]["eaft"]["difference"]
            row = {"name": f"quickstart.equal_gain.{level['fraction']}", "value": delta["delta"]}
            rows.append(row | {"low": delta["low"], "high": delta["high"], "says": [say[level["fraction"]]]} | about)
    return rows


def _of_h100(found: Row) -> list[Row]:
    """The rows of its two tables, of losses and of the study, and the memory of a training."""
    about = {"low": None, "high": None, "command": found["command"], "machine": found["about"]["device"]}
    commits, rows = found["commits"], []
    losses = next(one for one in found["losses"]["ways"] if one["shape"] == "32B")["ms_MB_dX_dW"]
    for way, words in LOSSES.items():
        time, memory = losses[way][:2]
        rows.append({"name": f"h100.{way}.ms", "value": time, "unit": "ms", "says": [f"| {words} | {{value:.1f}} |"]})
        rows.append(
            {"name": f"h100.{way}.MB", "value": memory, "unit": "MB", "says": [f"| {words} |… | {{value:,.0f}} |"]}
        )
    rows = [row | {"commit": commits["losses"]} for row in rows]
    for name, unit, says in (
        ("sft: GiB measured", "GiB", "peaked at {value:.2f} GiB"),
        ("sft: GiB planned", "GiB", "planned {value:.2f} GiB"),
    ):
        row = {"name": f"h100.{name}", "value": found["trainers"][name], "unit": unit, "says": [says]}
        rows.append(row | {"commit": commits["trainers"]})
    worst = max(value for key, value in found["engine"].items() if "worst" in key)
    row = {"name": "h100.engine", "value": worst, "unit": "relative", "says": ["at worst {value:.0e} apart"]}
    rows.append(row | {"commit": commits["engine"]})
    return [row | about for row in [*rows, *_of_steps(found["step"]["one FSDP unit"]), *_of_study(found)]]


def _of_steps(found: Row) -> list[Row]:
    """An update beside TRL's, and beside that of verl's own engine, which takes a unit per layer."""
    trl, verl = found["beside TRL"], found["flash-attn's cross entropy"]
    times = verl["one unit (null)"]["our sft"]["s"] / verl["a unit per layer (false)"]["verl sft"]["s"]
    return [
        {"name": f"h100.{name}", "value": value, "unit": "times", "says": [says], "commit": commit}
        for name, value, says, commit in (
            ("trl.seconds", trl["our sft / TRL"]["s"], "H100 it took {value:.2f} times TRL's", trl["commit"]),
            ("trl.memory", trl["our sft / TRL"]["GiB"], "in {value:.2f} times the memory", trl["commit"]),
            ("verl", times, "and {value:.2f} times that of verl's own engine", verl["commit"]),
        )
    ]


def _of_study(found: Row) -> list[Row]:
    rows = []
    for arm, words in STUDY.items():
        runs = [
            steps for name, steps in found["study"]["runs"].items() if name.rpartition("-seed")[0] == arm or name == arm
        ]
        nll, kl = (sum(run[max(run, key=int)][which] for run in runs) / len(runs) for which in (0, 1))
        rows.append(
            {"name": f"study.{arm}.nll", "value": nll, "unit": "nats", "says": [f"| {words} |… | {{value:.3f}} |"]}
        )
        if arm != "base":
            rows.append(
                {"name": f"study.{arm}.kl", "value": kl, "unit": "nats", "says": [f"| {words} |… |… | {{value:.3f}} |"]}
            )
    return [row | {"commit": found["commits"]["study"]} for row in rows]


def tables() -> dict[str, str]:
    """{how it begins: the table} that are written whole: the quickstart's and the study's."""
    return {TABLE: table(quickstart()), **study.tables(study.sums())}


def blocks(text: str) -> list[tuple[int, int, str]]:
    """(start, end, what must stand there) of every such table of the text, the last first."""
    places = [(text.find(head), made) for head, made in tables().items()]
    spans = [(re.compile(r"(?:\|.*\n)+").match(text, start), made) for start, made in places if start >= 0]
    return sorted(((*found.span(), made) for found, made in spans if found), reverse=True)


def rebuilt(text: str) -> str:
    """The text with every number as the result files have it."""
    places = {place for row in lines() for template in row["says"] for place in said_in(text, template, row)}
    for start, end, words in sorted(places, reverse=True):
        text = text[:start] + words + text[end:]
    for start, end, made in blocks(text):
        text = text[:start] + made + text[end:]
    return text


def unsaid(texts: list[str]) -> list[str]:
    """Words of the result files that stand in no text."""
    return [
        f"{row['name']}: {template!r} stands in none of {', '.join(TEXTS)}"
        for row in lines()
        for template in row["says"]
        if not any(said_in(text, template, row) for text in texts)
    ]


def draw(folder: Path) -> None:
    """The figures of the texts."""
    import matplotlib

    from eaft_verl.analysis import figures
    from eaft_verl.pages.canvas import STYLE, png
    from eaft_verl.reporting import plots

    folder.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for path in sorted(HERE.glob("landscape_*.json")):
            found = json.loads(path.read_text(encoding="utf-8"))
            (folder / f"{path.stem}.png").write_bytes(png(figures.landscape(found, found["title"])))
    undecided = {"rule": None, "chosen": None}
    drawn = plots.draw({**quickstart(), "general": {}, "pareto": {}, "curves": [], "choice": undecided})
    (folder / "quickstart_paths.png").write_bytes(drawn["path_heldout"])
    (folder / "study_paths.png").write_bytes(_study_figure(h100()["study"]["runs"]))
    (folder / "study_sums_paths.png").write_bytes(study.figure(study.sums()))


def _study_figure(runs: Row) -> bytes:
    """Every run's path from the base: held-out NLL, falling to the right, against KL to the base."""
    import matplotlib
    import matplotlib.pyplot as plt

    from eaft_verl.pages.canvas import STYLE, png

    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 4.4))
        for number, arm in enumerate(name for name in STUDY if name not in ("base", "dft")):
            mine = [steps for name, steps in runs.items() if name.rpartition("-seed")[0] == arm]
            for seed, steps in enumerate(mine):
                path = [runs["base"]["0"], *(steps[step] for step in sorted(steps, key=int))]
                label = STUDY[arm].replace("`", "") if seed == 0 else None
                axes.plot(*zip(*path, strict=True), marker="o", markersize=3, color=f"C{number}", label=label)
        axes.invert_xaxis()
        axes.set(xlabel="held-out NLL, nats per token (right: learnt more)", ylabel="KL to base, nats per token")
        axes.legend(frameon=False, fontsize=8)
        return png(figure)


def take_quickstart(report: Path) -> None:
    """quickstart.json from a report of `eaft compare recipes/quickstart.yaml`."""
    found = json.loads((report / "report.json").read_text(encoding="utf-8"))
    equal = found["environment"]["equal"]
    seeds = ",".join(map(str, next(iter(found["seeds"].values()))))
    order = [arm for arm in ("sft", "eaft") if arm in found["arms"]]
    source = f"eaft compare recipes/{found['recipe']}.yaml --arms {','.join(order)} --seeds {seeds}"
    machine = f"{equal['cpus']} cores of {equal['cpu']}, {equal['memory_gib']} GiB"
    updates = max(point["step"] for points in found["paths"]["heldout"].values() for point in points)
    kept = {key: found[key] for key in KEPT} | {"updates": int(updates)}
    kept["arms"] = order
    _write("quickstart", {"command": source, "commit": equal["commit"], "machine": machine, **kept})


def take_landscape(analysis: Path, command: str, commit: str) -> None:
    """landscape_gsm8k.json and _own.json from the folder that `eaft analyze ... --own` wrote."""
    for name, ours, title in (("data", "landscape_gsm8k", "Data"), ("own", "landscape_gsm8k_own", "Own answers")):
        found = json.loads((analysis / "figures" / f"landscape_{name}.json").read_text(encoding="utf-8"))
        kept = {key: found[key] for key in ("histogram", "tokens", "k", "vocab")}
        _write(ours, {"title": title, "command": command, "commit": commit, **kept})


def take_plans() -> None:
    """plans.jsonl: what the table of recipes says of memory and time on eight devices of 80 GiB."""
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    rows, more, batches = [], [], []
    for recipe in PLANNED:
        command = f"eaft plan recipes/{recipe}.yaml --gpus 8x80"
        words = [sys.executable, "-m", "eaft_verl.cli", *command.split()[1:], "--json"]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
        arms = json.loads(done.stdout)["arms"]
        about = {
            "low": None,
            "high": None,
            "command": command,
            "commit": commit.stdout.strip(),
            "machine": "arithmetic",
        }
        sft, gib = arms["sft"], 2**30
        numbers = {"gpu": (sft["device"]["bytes"] / gib, "GiB", "| `%s` |… {value:.0f} GiB")}
        if recipe == "math_qwen2_5_32b":
            numbers["host"] = (sft["host"]["bytes"] / gib, "GiB", "| `%s` |… GiB + {value:.0f} GiB of host")
        seconds = sft["seconds"]["update"]
        unit, each = ("min", seconds / 60) if seconds >= 100 else ("s", seconds)
        numbers["update"] = (each, unit, "| `%s` |… GiB…, {value:.0f} " + unit)
        for name, (value, kind, says) in numbers.items():
            row = {"name": f"plan.{recipe}.{name}", "value": value, "unit": kind, "says": [says % recipe]}
            rows.append(row | about)
        if "sft_kl" in arms:
            more.append((arms["sft_kl"]["device"]["bytes"] - sft["device"]["bytes"]) / gib)
        if "grpo" in arms:
            batches.append(arms["grpo"]["seconds"]["update"] / 60)
    about |= {"command": "eaft plan recipes/RECIPE.yaml --gpus 8x80"}
    spans = (
        ("sft_kl", more, "GiB", "SFT-KL needs {low:.0f}-{high:.0f} GiB"),
        ("grpo", batches, "min", "({low:.0f} min to {high:.0f} min a batch"),
    )
    for name, values, unit, says in spans:
        row = about | {"name": f"plan.{name}", "value": min(values), "low": min(values), "high": max(values)}
        rows.append(row | {"unit": unit, "says": [says]})
    text = "".join(json.dumps({key: row[key] for key in ORDER}, ensure_ascii=False) + "\n" for row in rows)
    (HERE / "plans.jsonl").write_text(text, encoding="utf-8")


def _write(name: str, found: Row) -> None:
    """One top key a line, so that a change can be read."""
    body = ",\n".join(f"{json.dumps(key)}: {json.dumps(found[key], sort_keys=True)}" for key in found)
    (HERE / f"{name}.json").write_text("{\n" + body + "\n}\n", encoding="utf-8")


def main() -> int:
    """0, or 1 where --check found a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--quickstart", type=Path, metavar="REPORT")
    parser.add_argument("--landscape", type=Path, metavar="ANALYSIS")
    parser.add_argument("--plans", action="store_true")
    parser.add_argument("--command", default="unknown")
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    if options.quickstart:
        take_quickstart(options.quickstart)
    if options.landscape:
        take_landscape(options.landscape, options.command, options.commit)
    if options.plans:
        take_plans()
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in TEXTS}
    wrong = unsaid(list(texts.values()))
    for name, text in texts.items():
        if (new := rebuilt(text)) != text:
            if options.check:
                changed = [line for line in new.splitlines() if line not in text.splitlines()]
                wrong.append(f"{name} should say: {' / '.join(changed)}")
            else:
                (ROOT / name).write_text(new, encoding="utf-8")
    if not options.check:
        sys.path.insert(0, str(ROOT))
        draw(ROOT / "recipes" / "figures")
    print("\n".join(wrong) or "texts and result files agree")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
