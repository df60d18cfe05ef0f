"""Files that are in the way, lost, cut off, stale or somebody else's: data and caches, runs and reports."""

import json
import os
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .matrix import Lab, Outcome, Seen, fault

sys.path.insert(0, str(Path(__file__).parents[1] / "reporting"))
import fake_runs


def prepare(lab: Lab, source: Path | str, out: Path) -> Seen:
    """`eaft prepare` with the laboratory's model."""
    return lab.eaft("prepare", source, out, "--model", lab.model, "--max-length", "256")


def own_parquet(path: Path) -> bytes:
    """A user's file of rows; its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"prompt": ["2 + 3", "4"], "response": ["5", "four"]}), path)
    return path.read_bytes()


@fault("`eaft prepare X X`, X by a link, a hard link or another spelling", "refused; X is untouched", slow=True)
def _out_is_the_source(lab: Lab) -> Outcome:
    mine = lab.folder / "mine.parquet"
    before = own_parquet(mine)
    (lab.folder / "link.parquet").symlink_to(mine)
    (lab.folder / "hard.parquet").hardlink_to(mine)
    for name in ("mine", "link", "hard", f"../{lab.folder.name}/mine"):
        prepare(lab, mine, lab.folder / f"{name}.parquet").refused("exists and was not made by `eaft prepare`")
    assert mine.read_bytes() == before and (lab.folder / "link.parquet").is_symlink()
    return Outcome("exit 2: exists and was not made by `eaft prepare`; nothing is overwritten")


@fault("OUT is any file of the user, or its manifest's name is taken", "refused; both are untouched", slow=True)
def _out_is_taken(lab: Lab) -> Outcome:
    (lab.folder / "notes.parquet").write_text("notes")
    prepare(lab, lab.folder / "train.jsonl", lab.folder / "notes.parquet").refused("notes.parquet exists and was not")
    (lab.folder / "app.manifest.json").write_text('{"name": "a web app"}')
    prepare(lab, lab.folder / "train.jsonl", lab.folder / "app.parquet").refused("app.manifest.json is no manifest of")
    assert (lab.folder / "notes.parquet").read_text() == "notes" and not (lab.folder / "app.parquet").exists()
    assert (lab.folder / "app.manifest.json").read_text() == '{"name": "a web app"}'
    return Outcome("exit 2, the file is named")


@fault("a run's OUTPUT/data/train.parquet is the user's own file, named as a source too", "refused; it is untouched")
def _output_holds_a_source(lab: Lab) -> Outcome:
    mine = lab.out / "data" / "train.parquet"
    before = own_parquet(mine)
    lab.train(f"data.train={{a: {mine}, b: {lab.folder / 'train.jsonl'}}}").refused("train.parquet exists and was not")
    assert mine.read_bytes() == before
    return Outcome("exit 2 before Ray")


@fault("OUT lies in the folder that is its source", "refused: it would be a part of itself the next time")
def _out_in_source(lab: Lab) -> Outcome:
    (lab.folder / "rows").mkdir()
    shutil.copy(lab.folder / "train.jsonl", lab.folder / "rows")
    prepare(lab, lab.folder / "rows", lab.folder / "rows" / "out.parquet").refused("lies in its own source")
    assert [path.name for path in (lab.folder / "rows").iterdir()] == ["train.jsonl"]
    return Outcome("exit 2")


@fault("the process was killed between manifest and parquet", "the same command makes the same file", slow=True)
def _half_a_preparation(lab: Lab) -> Outcome:
    out = lab.folder / "p.parquet"
    assert prepare(lab, lab.folder / "train.jsonl", out).code == 0
    before = out.read_bytes()
    out.unlink()
    assert prepare(lab, lab.folder / "train.jsonl", out).code == 0 and out.read_bytes() == before
    return Outcome("exit 0, equal bytes")


@fault(
    "a manifest that is empty, torn, [], {}, of a newer version, or lacks keys",
    "named at the dry run, with a way out",
    slow=True,
)
def _manifests(lab: Lab) -> Outcome:
    out = lab.folder / "p.parquet"
    assert prepare(lab, lab.folder / "train.jsonl", out).code == 0
    manifest = lab.folder / "p.manifest.json"
    whole = json.loads(manifest.read_text())
    lacking = json.dumps({key: value for key, value in whole.items() if key != "spec"})
    for text, said in (
        ("", "is not valid JSON"),
        (manifest.read_text()[:-200], "is not valid JSON"),
        ("[]", "is no manifest"),
        ("{}", "is no manifest"),
        (json.dumps({**whole, "schema": 99}), "has manifest schema 99, this version reads 1"),
        (lacking, "spec is missing or wrong"),
    ):
        manifest.write_text(text)
        lab.train(f"data.train={out}", "--dry-run").refused(said, "prepare the data under another name, or delete both")
    return Outcome("exit 2, the manifest is named")


@fault(
    "prepared data with a flipped byte, cut off, empty, or of another model",
    "refused before Ray; never trained on",
    slow=True,
)
def _prepared_data(lab: Lab) -> Outcome:
    out = lab.folder / "p.parquet"
    assert prepare(lab, lab.folder / "train.jsonl", out).code == 0
    whole = out.read_bytes()
    at = len(whole) // 2
    for damage in (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole[:-9], b""):
        out.write_bytes(damage)
        lab.train(f"data.train={out}").refused("p.parquet is not the file its manifest describes")
    out.write_bytes(whole)
    other = Path(shutil.copytree(lab.model, lab.folder / "other"))
    (other / "chat_template.jinja").write_text((other / "chat_template.jinja").read_text().replace("\n", " "))
    lab.eaft("prepare", out, "--model", other).refused("p.parquet is stale", "with another chat template")
    return Outcome("exit 2, the file is named")


@fault(
    "the memory map of prepared data is cut off, empty, flipped or foreign",
    "made again; never used as it is",
    slow=True,
)
def _memory_maps(lab: Lab) -> Outcome:
    out = lab.folder / "p.parquet"
    assert prepare(lab, lab.folder / "train.jsonl", out).code == 0
    (mapped,) = lab.folder.glob(".p.*.arrow")
    whole = mapped.read_bytes()
    for damage in (whole[:-99], b"", whole[:900] + bytes([whole[900] ^ 1]) + whole[901:], b"foreign"):
        mapped.write_bytes(damage)
        seen = lab.eaft("prepare", out, "--model", lab.model, "--show", "1")
        assert seen.code == 0 and "What is" in seen.said, seen.said
        (mapped,) = lab.folder.glob(".p.*.arrow")  # cut into batches otherwise, so of another name
        with pa.memory_map(str(mapped)) as source:
            assert pa.ipc.open_file(source).read_all().equals(pq.read_table(out))
    return Outcome("exit 0, the map is that of the file again")


@fault(
    "the drift probe's cache is cut off, flipped, foreign, or its account torn",
    "named with the remedy; never used",
    slow=True,
)
def _drift_probe(lab: Lab) -> Outcome:
    words = ("evaluate", lab.model, "--recipe", lab.recipe, "--out", lab.out / "base")
    assert lab.eaft(*words).code == 0
    folder = min(lab.out.glob("data/drift-probe-*"))  # two: of general and of the task's own prompts
    (probe,) = folder.glob("*.parquet")
    for file, damage in (
        (probe, probe.read_bytes()[:-9]),
        (probe, b"x" * probe.stat().st_size),
        (folder / "meta.json", b"["),
    ):
        whole = file.read_bytes()
        file.write_bytes(damage)
        shutil.rmtree(lab.out / "base" / "eval", ignore_errors=True)
        lab.eaft(*words).refused(file.name, "delete")
        file.write_bytes(whole)
    shutil.rmtree(folder)  # as it is told
    assert lab.eaft(*words).code == 0
    return Outcome("exit 2: delete the folder; doing so works")


@fault("`report --out` among other files", "refused; they are untouched")
def _report_into_a_folder(lab: Lab) -> Outcome:
    runs = fake_runs.make_runs(lab.folder / "runs")
    (lab.folder / "site").mkdir()
    (lab.folder / "site" / "report.html").write_text("mine")
    lab.eaft("report", *runs, "--out", lab.folder / "site").refused("holds something else than a report")
    lab.eaft("report", *runs, "--out", runs[1]).refused("holds something else than a report")
    assert [file.name for file in (lab.folder / "site").iterdir()] == ["report.html"]
    assert (lab.folder / "site" / "report.html").read_text() == "mine"
    return Outcome("exit 2")


@fault("`evaluate MODEL --out` into an arm's run, or a folder with content", "refused; both are untouched", slow=True)
def _evaluate_into_a_folder(lab: Lab) -> Outcome:
    arm = fake_runs.make_arm(lab.folder / "arm", "sft")
    (lab.folder / "full").mkdir()
    (lab.folder / "full" / "thesis.tex").write_text("mine")
    for folder, said in ((arm, "holds the evaluation of another model"), (lab.folder / "full", "is not empty")):
        before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file())
        lab.eaft("evaluate", lab.model, "--recipe", lab.recipe, "--out", folder).refused(said)
        assert before == sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file())
    return Outcome("exit 2")


@fault("report on folders that are no runs, without base, with two, an arm twice", "one line says which")
def _no_runs(lab: Lab) -> Outcome:
    base, sft, eaft = fake_runs.make_runs(lab.folder / "runs")
    second = fake_runs.make_base(lab.folder / "second")
    (empty := lab.folder / "empty").mkdir()
    for runs, said in (
        ((base, lab.folder / "none"), "is no run directory and holds none"),
        ((base, empty), "is no run directory and holds none"),
        ((base, lab.recipe), "is no run directory and holds none"),
        ((sft, eaft), "exactly one base run"),
        ((base, second, sft), "exactly one base run"),
        ((base,), "at least one arm run"),
        ((base, sft, sft), "is given twice"),
    ):
        lab.eaft("report", *runs).refused(said)
    return Outcome("exit 2")


@fault(
    "a benchmark's record is [], {}, torn or not text; its samples are numbers or lack ids", "named, with the remedy"
)
def _records(lab: Lab) -> Outcome:
    runs = fake_runs.make_runs(lab.folder / "runs")
    record = runs[1] / "eval" / "step_000012" / "mmlu.json"
    samples = runs[1] / "samples" / "step_000012" / "mmlu.jsonl"
    for file, damage in (
        *((record, text) for text in (b"[]", b"{}", record.read_bytes()[:-30], b"\xff\xfe")),
        (samples, b'{"scores": {}}\n'),
    ):
        whole = file.read_bytes()
        file.write_bytes(damage)
        lab.eaft("report", *runs).refused("mmlu", "delete")
        file.write_bytes(whole)
    return Outcome("exit 2, run and benchmark are named")


@fault("metrics.jsonl of an arm is gone", "the report is made, and its caveats say so")
def _no_metrics(lab: Lab) -> Outcome:
    runs = fake_runs.make_runs(lab.folder / "runs")
    (runs[1] / "metrics.jsonl").unlink()
    assert lab.eaft("report", *runs).code == 0
    said = "sft seed 0: metrics.jsonl is missing or empty, so it has no curves and no budget"
    assert said in json.loads((lab.folder / "runs" / "report" / "report.json").read_text())["caveats"]
    return Outcome("exit 0 with the caveat")


@fault("held-out NLL is NaN at every step of an arm, training losses too", "left out, and the caveats say so")
def _not_a_number(lab: Lab) -> Outcome:
    runs = fake_runs.make_runs(lab.folder / "runs")
    for record in (runs[1] / "eval").glob("*/heldout.json"):
        found = json.loads(record.read_text())
        found["metrics"]["nll"]["score"] = "nan"
        record.write_text(json.dumps(found))
    lines = (runs[1] / "metrics.jsonl").read_text().splitlines()
    rows = [json.dumps({**json.loads(line), "loss": "nan"}) + "\n" for line in lines]
    (runs[1] / "metrics.jsonl").write_text("".join(rows))
    assert lab.eaft("report", *runs).code == 0
    text = (lab.folder / "runs" / "report" / "report.md").read_text()
    assert "sft seed 0, step 12: heldout is nan, so it is left out" in text
    assert "sft seed 0: logged values that are not finite at step" in text
    return Outcome("exit 0 with both caveats")


@fault("samples of one benchmark are cut off by a third", "not compared in silence: the examples that differ are named")
def _torn_samples(lab: Lab) -> Outcome:
    runs = fake_runs.make_runs(lab.folder / "runs")
    samples = runs[1] / "samples" / "step_000012" / "mmlu.jsonl"
    os.truncate(samples, samples.stat().st_size * 2 // 3)
    lab.eaft("report", *runs).refused("these runs cannot be compared", "mmlu", "example ids")
    return Outcome("exit 2")
