"""`eaft synthesize`: prompts become OUT.jsonl, which `eaft prepare` reads, and OUT.synthesis/, which accounts for it.

OUT.synthesis holds answers.jsonl (every answer ever given), rejected.jsonl (every prompt that makes no row, and why),
spec.json (what the answers and rows are of) and manifest.json (counts that add up, tokens, cost, hash of OUT).
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from eaft_verl import __version__
from eaft_verl.data.leakage import Against
from eaft_verl.data.sources import at_hand, source_hash
from eaft_verl.data.spec import RowError
from eaft_verl.data.teacher.account import Account, choose
from eaft_verl.data.teacher.answer_file import AnswerFile, holds_answers
from eaft_verl.data.teacher.asking import Asking, Verdicts, cost_of, draw_order, model_to_ask
from eaft_verl.data.teacher.endpoint import check_package
from eaft_verl.data.teacher.given import draw_given
from eaft_verl.data.teacher.prompts import Prompt, Screen, iter_prompts
from eaft_verl.data.teacher.spec import SynthesisSpec
from eaft_verl.data.teacher.verify import GradingPool
from eaft_verl.errors import NO_SPACE, ConfigError, DataError, DiskFull, Lost
from eaft_verl.files import bytes_hash, locked, read_json, write_json, write_jsonl

SCHEMA = 1
GREEDY = (
    "warning: all answers of a prompt are the same, as if nothing were sampled. `transformers serve` samples only with "
    r'''"sampling.extra={generation_config: '{\"do_sample\": true}'}"'''
)


def synthesize(spec: SynthesisSpec, out: Path, against: Against | None, *, partial: bool = False) -> dict[str, Any]:
    """The manifest of `out` (NAME.jsonl), made now, gone on with, or found there finished.

    partial: write it although requests have failed that could be asked again.
    Raises ConfigError or DataError before anything is asked where endpoint, model, prompts or `out` are not as they
    must be; Lost where the endpoint is gone, with every answer kept for the same command.
    """
    folder = folder_of(out)
    if spec.endpoint:
        check_package()
    check_out(spec, out)
    if out.exists():
        return _finished(out)
    if spec.endpoint:
        spec = replace(spec, endpoint=replace(spec.endpoint, model=model_to_ask(spec)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise ConfigError(f"{out} cannot be written there: {error}; name another OUT") from None
    busy = f"another process writes {folder}; wait for it, or name another OUT"
    with _disk_of(folder), locked(folder / ".lock", busy=busy):
        check_out(spec, out)
        with _grading(spec) as grading:
            account, spent = _collected(spec, folder, against, grading, partial=partial)
        if not account.rows:
            kinds = ", ".join(f"{kind} {count}" for kind, count in account.counts()["rejected"].items())
            raise DataError(
                f"{out}: none of {sum(account.read.values())} prompts makes a row ({kinds or 'there are none'}); "
                f"{_first_reason(account)}"
            )
        write_jsonl(folder / "rejected.jsonl", account.rejected)
        write_jsonl(folder / "rows.jsonl", account.rows)
        manifest = _manifest(spec, bytes_hash(folder / "rows.jsonl"), account, spent, against)
        write_json(folder / "manifest.json", manifest)  # first, so that an OUT without one is somebody else's
        os.replace(folder / "rows.jsonl", out)
    return manifest


@contextmanager
def _disk_of(folder: Path) -> Iterator[None]:
    """DiskFull, with what is kept, where no room is left for what is written at the end."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        kept = "every answer that came is kept there: make room, and the same command goes on"
        raise DiskFull(f"{folder} cannot be written ({error.strerror}); {kept}") from None


def preview(spec: SynthesisSpec, out: Path, against: Against | None) -> list[str]:
    """What `synthesize` would do, in lines: nothing is asked or written. Raises what it would raise."""
    check_out(spec, out)
    if out.exists():
        return describe(_finished(out), out)
    with _grading(spec) as grading:
        if spec.endpoint is None:
            account = draw_given(spec, against, grading)
            return [f"{out}: {len(account.rows)} rows would be drawn; {_counted(account.counts())}"]
        prompts, account = read_prompts(spec, against, grading)
    account.not_asked = len(prompts)
    most = len(prompts) * spec.samples
    lines = [f"prompts: {_counted(account.counts())}", *_examples(account)]
    lines += [f"requests: up to {most:,}, in the order of seed {spec.seed}"]
    if spec.endpoint.prices:
        cost = cost_of({"prompt_tokens": 0, "completion_tokens": most * spec.sampling.max_tokens}, spec)
        lines.append(f"cost: at most {cost:,.2f} for answers of {spec.sampling.max_tokens:,} tokens, prompts aside")
    return lines


def folder_of(out: Path) -> Path:
    """NAME.jsonl -> NAME.synthesis."""
    if out.suffix != ".jsonl":
        raise ConfigError(f"OUT is written as NAME.jsonl, got {out.name!r}")
    return out.with_suffix(".synthesis")


def identity(spec: SynthesisSpec) -> dict[str, Any]:
    """What answers and rows are of, local files by their content."""
    hashes = {
        f"prompts.{name}.sha256": source_hash(one.source) for name, one in spec.prompts.items() if at_hand(one.source)
    }
    return {"schema": SCHEMA, "request": spec.request(), "rows": {**spec.choice(), **hashes}}


def check_out(spec: SynthesisSpec, out: Path) -> None:
    """Raise ConfigError or DataError unless `out` and its folder are free, or of this spec.

    Answers serve any rows that are made of them: where `out` is not there, only the request must be the same.
    """
    folder, made = folder_of(out), os.path.lexists(out)
    if made and not (folder / "manifest.json").exists():
        raise DataError(f"{out} exists and was not made by `eaft synthesize`; nothing is overwritten: name another OUT")
    stored_file = folder / ("manifest.json" if made else "spec.json")
    if not stored_file.exists():
        return
    stored, wanted = read_json(stored_file), identity(spec)
    parts = ("request", "rows") if made else ("request",)
    known = isinstance(stored, dict) and stored.get("schema") == SCHEMA
    if not known or any(not isinstance(stored.get(part), dict) for part in parts):
        raise DataError(f"{stored_file} is not what this version writes; name another OUT")
    differs = _differences(stored["request"], wanted["request"], ignore_none=True)
    advice = "name another OUT, or " + (
        "take the spec back" if holds_answers(folder / "answers.jsonl") else f"delete {folder}: no answer came"
    )
    if not differs and made:
        differs = _differences(stored["rows"], wanted["rows"])
        advice = f"name another OUT, or delete {out.name}: its answers are kept and used again"
    if differs:
        raise DataError(f"{out} is of another spec: {differs[0]}; {advice}")


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], *, ignore_none: bool = False) -> list[str]:
    """'key was A, now B' for each key that differs. ignore_none: the model that is yet to be asked for."""
    return [
        f"{key} was {stored.get(key)!r}, now {wanted.get(key)!r}"
        for key in sorted({*stored, *wanted})
        if stored.get(key) != wanted.get(key) and not (ignore_none and key == "model" and wanted.get(key) is None)
    ]


def _finished(out: Path) -> dict[str, Any]:
    file = folder_of(out) / "manifest.json"
    manifest = read_json(file)
    if manifest.get("hash") != bytes_hash(out):
        raise DataError(f"{out} is not the file that {file} describes; delete it and run the same command")
    return dict(manifest)


def read_prompts(
    spec: SynthesisSpec, against: Against | None, grading: GradingPool | None
) -> tuple[list[Prompt], Account]:
    """Prompts that may be asked, in the order of the draw, and an account of the others.

    DataError with the first reasons if there are none.
    """
    account, screen, prompts = Account(), Screen(against, grading), []
    for found in iter_prompts(spec):
        try:
            if isinstance(found, tuple):
                account.read[found[0]] += 1
                raise found[2]
            account.read[found.source] += 1
            screen.check(found)
            prompts.append(found)
        except RowError as error:
            source, row = found[:2] if isinstance(found, tuple) else (found.source, found.row)
            account.reject(source, row, error.kind, str(error))
    if not prompts:
        raise DataError(f"none of {sum(account.read.values())} rows can be asked; {_first_reason(account)}")
    return sorted(prompts, key=lambda prompt: draw_order(spec.seed, prompt.key)), account


def _collected(
    spec: SynthesisSpec, folder: Path, against: Against | None, grading: GradingPool | None, *, partial: bool
) -> tuple[Account, dict[str, int]]:
    """The account of the whole, and the tokens spent on it."""
    if spec.endpoint is None:
        return draw_given(spec, against, grading), {}
    prompts, account = read_prompts(spec, against, grading)
    if against:
        against.find([])  # its index is built once, before threads share it
    write_json(folder / "spec.json", identity(spec))
    file = AnswerFile(folder / "answers.jsonl")
    try:
        asking = Asking(spec, prompts, file, str(spec.endpoint.model), against)
        verdicts = asking.run(grading)
        if not partial:
            _require_answers(spec, verdicts, file)
        choose(account, spec, prompts, verdicts, file)
        return account, dict(file.spent)
    finally:
        file.close()


def _require_answers(spec: SynthesisSpec, verdicts: Verdicts, file: AnswerFile) -> None:
    """Lost if requests have failed that may be answered another time, and rows are wanting."""
    enough = spec.rows is not None and verdicts.rows >= spec.rows
    if verdicts.open_failures and not enough:
        raise Lost(
            f"{verdicts.open_failures} requests have failed ({file.last_failure()}); {len(file)} answers are kept in "
            f"{file.path}: the same command asks the others again, --partial writes what there is"
        )


@contextmanager
def _grading(spec: SynthesisSpec) -> Iterator[GradingPool | None]:
    if spec.grader is None:
        yield None
        return
    pool = GradingPool(spec.grader, spec.grader_seconds)
    try:
        yield pool
    finally:
        pool.close()


def _manifest(
    spec: SynthesisSpec, sha: str, account: Account, spent: dict[str, int], against: Against | None
) -> dict[str, Any]:
    checked = {name: len(questions) for name, questions in against.questions.items()} if against else {}
    return {
        **identity(spec),
        "version": __version__,
        "url": spec.endpoint.url if spec.endpoint else None,
        "made": len(account.rows),
        "wanted": spec.rows,
        "prompts": account.counts(),
        "answers": dict(account.answers),
        "acceptance": account.acceptance,
        "tokens": spent,
        "cost": cost_of(spent, spec) if spent else None,
        "leakage": {"checked": checked, "not_checked": against.not_checked if against else {}},
        "hash": sha,
    }


def describe(manifest: Mapping[str, Any], out: Path) -> list[str]:
    """Lines for the reader: rows, where the prompts went, acceptance, tokens."""
    wanted = manifest["wanted"]
    short = f" of {wanted} wanted: the prompts are used up" if wanted and manifest["made"] < wanted else ""
    lines = [f"{out}: {manifest['made']} rows{short}; manifest {folder_of(out) / 'manifest.json'}"]
    lines.append(f"prompts: {_counted(manifest['prompts'])}")
    acceptance = manifest["acceptance"]
    if acceptance and acceptance["answers"] is not None:
        lines.append(
            f"answers: {acceptance['answers']:.1%} of those that came are right; {_items(manifest['answers'])}"
        )
        lines.append(f"right answers of a prompt: {_items(acceptance['by_right'])} prompts")
        for level, part in acceptance.get("by_difficulty", {}).items():
            lines.append(f"difficulty {level}: {part['accepted']:.1%} of the answers to {part['prompts']} prompts")
        if acceptance["alike"] == 1 and manifest["request"]["sampling.temperature"] > 0:
            lines.append(GREEDY)
    if spent := manifest["tokens"]:
        cost = "" if manifest["cost"] is None else f", cost {manifest['cost']:.2f}"
        lines.append(f"tokens: {spent['prompt_tokens']:,} asked, {spent['completion_tokens']:,} answered{cost}")
    lines += [f"not checked for {name}: {why}" for name, why in manifest["leakage"]["not_checked"].items()]
    return lines


def _counted(counts: Mapping[str, Any]) -> str:
    out = f"; rejected: {_items(counts['rejected'])}" if counts["rejected"] else ""
    return (
        f"{counts['read']} read, {counts['drawn']} drawn, {counts['not_drawn']} right but not drawn, "
        f"{counts['not_asked']} not asked{out}"
    )


def _items(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _examples(account: Account) -> list[str]:
    """The first rejected row of each kind."""
    first = {entry["kind"]: entry for entry in reversed(account.rejected)}
    return [f"  {kind}: row {one['row']} of {one['source']}: {one['reason']}" for kind, one in sorted(first.items())]


def _first_reason(account: Account) -> str:
    entry = next(iter(account.rejected), None)
    return f"row {entry['row']} of {entry['source']}: {entry['reason']}" if entry else "the sources hold no rows"
