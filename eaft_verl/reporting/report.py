"""Runs -> report.html, report.md, report.json and figures: reads run directories only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eaft_verl.errors import RunError
from eaft_verl.files import read_json, write_bytes, write_json, write_jsonl, write_text
from eaft_verl.recipe.choose import Rule
from eaft_verl.reporting import page
from eaft_verl.reporting.answer import answer
from eaft_verl.reporting.answers import held_out_answers
from eaft_verl.reporting.caveats import caveats, run_notes
from eaft_verl.reporting.chains import chain_notes
from eaft_verl.reporting.choice import choice, recorded_rule
from eaft_verl.reporting.collect import Arm, load, load_models
from eaft_verl.reporting.comparability import check, config_differences
from eaft_verl.reporting.controls import control_notes, controls
from eaft_verl.reporting.failures import lost_seeds, split
from eaft_verl.reporting.history import curves
from eaft_verl.reporting.marks import read_noise, set_marks, with_floors
from eaft_verl.reporting.measures import Board, build_board
from eaft_verl.reporting.paper import beside
from eaft_verl.reporting.paths import COST, axes, equal_gain, paths
from eaft_verl.reporting.provenance import environment, sample_answers
from eaft_verl.reporting.results import columns, pareto, results, versus
from eaft_verl.reporting.spending import budgets, cost
from eaft_verl.reporting.token_drift import token_drift
from eaft_verl.reporting.tokens_before import analysis
from eaft_verl.reporting.transitions import lost_questions, question_paths, transitions
from eaft_verl.reporting.weights import weights
from eaft_verl.reporting.wording import headline

SCHEMA = 1
RESAMPLES = 4000


def report(
    runs: list[Path],
    out: Path,
    *,
    force: bool = False,
    seed: int = 0,
    failed: Sequence[dict[str, Any]] = (),
    paper: str | None = None,
    rule: Rule | None = None,
) -> dict[str, Any]:
    """Compare arms with their base; returns what report.json holds.

    Writes OUT/report.{html,md,json}, OUT/questions.jsonl (every question along every run) and OUT/figures/*.png, each
    in one move; an older report there is replaced.
    Args: runs: one base run and one or more arm runs, several seeds per arm allowed; models of `eaft evaluate MODEL`
    stand in the results beside them. force: report on runs that are
    not comparable, with every reason in a banner. seed: of the bootstrap. failed: [{arm, seed, run, error}] that are
    not among `runs`; runs whose status is 'failed' are added to them, or compared as far as they came with `force`.
    paper: number of a table of the paper to stand beside these results.
    Raises RunError: no or two base runs, no arm, an (arm, seed) twice, or runs that are not comparable.
    """
    out = Path(out)
    _require_free(out)
    good, broken = (list(runs), []) if force else split(runs)
    failed = [*failed, *broken]
    base, arms = load(good)
    models = load_models(good, [base.name, *(arm.name for arm in arms)])
    problems = check(base, arms, models, force=force, failed=failed)
    found = measure(base, arms, out, problems=problems, seed=seed, failed=failed, rule=rule, models=models)
    found["paper"] = beside(found, paper) if paper else None
    _write(out, found, base, arms)
    return found


def _write(out: Path, found: dict[str, Any], base: Arm, arms: list[Arm]) -> None:
    from eaft_verl.reporting import plots

    figures = plots.draw(found)
    text = page.text(found, set(figures))
    write_json(out / "report.json", found)  # first: by it the folder is known as ours
    for name, data in figures.items():
        write_bytes(out / "figures" / f"{name}.png", data)
    for stale in {path.stem for path in (out / "figures").glob("*.png")} & set(plots.NAMES) - set(figures):
        (out / "figures" / f"{stale}.png").unlink()
    write_jsonl(out / "questions.jsonl", question_paths(base, arms))
    write_text(out / "report.md", text)
    write_text(out / "report.html", page.html(text, found["arms"], figures))


def _require_free(out: Path) -> None:
    """RunError unless `out` is new, empty, or holds an earlier report."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    earlier = read_json(out / "report.json") if (out / "report.json").is_file() else None
    if not isinstance(earlier, dict) or "bootstrap_seed" not in earlier:
        raise RunError(f"{out} holds something else than a report, and nothing is overwritten; choose another --out")


def measure(
    base: Arm,
    arms: list[Arm],
    out: Path,
    *,
    problems: list[str],
    seed: int,
    failed: Sequence[dict[str, Any]] = (),
    rule: Rule | None = None,
    models: Sequence[Arm] = (),
) -> dict[str, Any]:
    """Everything the report states, as plain data; `out` only makes the run folders relative."""
    resamples = _resamples(base, arms)
    board = build_board(base, arms, models, resamples=resamples, seed=seed)
    table, tracks, noise = results(board, models), {axis: paths(board, axis) for axis in axes(board)}, read_noise(base)
    found = {
        "schema": SCHEMA,
        **{key: arms[0].runs[0].info[key] for key in ("recipe", "model")},
        "arms": [arm.name for arm in arms],
        "seeds": {arm.name: list(arm.seeds) for arm in arms},
        "problems": problems,
        "failed": list(failed),
        "resamples": resamples,
        "bootstrap_seed": seed,
        "noise": noise,
        "columns": with_floors(columns(board), noise),
        "results": table,
        "versus": versus(board),
        "controls": controls(board),
        "paths": tracks,
        "general": paths(board, "general_mean") if {"general_mean", COST} <= board.measures.keys() else {},
        "equal_gain": {axis: equal_gain(board, axis) for axis in tracks},
        "pareto": pareto({arm.name: table[arm.name] for arm in (base, *arms)}),
        "choice": _chosen(board, rule, arms, seed),
        **_trainings(arms, board.notes),
        **_evidence(base, arms, models, out, seed),
    }
    set_marks(found)
    notes = [*chain_notes(arms), *control_notes(arms), *run_notes(base, arms), *board.notes]
    return found | {"answer": answer(found), "headline": headline(found), "caveats": caveats(found, notes)}


def _trainings(arms: list[Arm], notes: list[str]) -> dict[str, Any]:
    """How the arms were trained: curves, settings, budgets, data."""
    return {
        "lost_seeds": lost_seeds(arms),
        "curves": curves(arms, notes),
        "config_differences": config_differences(arms),
        "budgets": budgets(arms),
        "cost": cost(arms),
        "sources": arms[0].runs[0].info.get("sources", {}),
    }


def _evidence(base: Arm, arms: list[Arm], models: Sequence[Arm], out: Path, seed: int) -> dict[str, Any]:
    """What stands behind the means: answers, questions, tokens, weights; the paper's table where one is asked for."""
    return {
        "paper": None,
        "models": {one.name: one.runs[0].info["model"] for one in models},
        "answers": held_out_answers(base, arms),
        "samples": sample_answers(base, arms),
        "transitions": transitions(base, arms),
        "lost": lost_questions(base, arms),
        "token_drift": token_drift(arms, seed),
        "weights": weights(arms),
        "analysis": analysis(out),
        "environment": environment(base, [*arms, *models], out),
    }


def _chosen(board: Board, rule: Rule | None, arms: list[Arm], seed: int) -> dict[str, Any]:
    return choice(board, rule or recorded_rule(arms), [run for arm in arms for run in arm.runs], seed)


def _resamples(base: Arm, arms: list[Arm]) -> int:
    """Enough that the smallest p-value, 2 / (1 + R), can pass Holm's first step, 0.05 over the marks of a table."""
    benchmarks = max((len(records) for records in base.runs[0].evals.values()), default=0)
    return max(RESAMPLES, 50 * len(arms) * (benchmarks + 5))
