"""Checkpoints of a run -> its eval/ and samples/ folders. Heavy imports happen when there is something to evaluate."""

import contextlib
import functools
import gc
import multiprocessing
import multiprocessing.util
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaft_verl.errors import RunError
from eaft_verl.evaluation.bfcl import BFCL, measure_bfcl
from eaft_verl.evaluation.model_files import check_model_files
from eaft_verl.evaluation.session import Session
from eaft_verl.evaluation.settings import EvaluateSettings, evaluation_key
from eaft_verl.files import write_json
from eaft_verl.models import load_tokenizer, model_key, resolve_model
from eaft_verl.runs import Run, step_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from eaft_verl.evaluation.benchmarks import Benchmark

__all__ = ["EvaluateSettings", "evaluate_checkpoints", "evaluation_key"]
FORCED = ("heldout", "drift", "drift_task")  # measured in forward passes over given answers
Outcome = tuple[dict[str, Any], list[dict[str, Any]]]


def evaluate_checkpoints(
    run: Run,
    checkpoints: dict[int, Path | str],
    settings: EvaluateSettings,
    base_model: str,
    work: Path,
    points: int,
) -> None:
    """Evaluate every checkpoint that has not been, writing one record per benchmark through `run`.

    `heldout` and drift at every step, the target tasks at the last `points` of them, the general ones at the last. A
    benchmark whose record exists is skipped, so a killed evaluation goes on where it stopped. The base run (kind
    'base') passes {0: base_model}; it also gets eval/noise.json, what the base differs from itself by:
    {kl, agreement, nll, accuracy: {task: {changed, n, difference}}, questions}, see `noise`.
    work: folder of the experiment for the probe set (the base's own answers), shared by its runs.
    Raises ConfigError or DataError before any model is loaded, DataError before anything is generated for prompts that
    leave no room for an answer; RunError naming the benchmark that failed.
    """
    settings.check()
    noise_file = run.path / "eval" / "noise.json"
    pending = _pending(run, checkpoints, settings, points)
    noisy = run.info["kind"] == "base" and not noise_file.exists()
    if not pending and not noisy:
        return
    from eaft_verl.evaluation import answers

    session = Session(run, settings, resolve_model(base_model), Path(work))
    paths = {step: resolve_model(path) for step, path in checkpoints.items() if step in pending or noisy}
    for path in {session.base, *paths.values()}:
        check_model_files(path)
    names = {name for missing in pending.values() for name in missing}
    _prepare(session, {*names, *_names(settings, 0, 1)} if noisy else names)
    for step, missing in pending.items():
        _evaluate_step(session, step, paths[step], missing)
        if step == max(checkpoints) and session.heldout:
            answers.write_answers(run, step, *session.model(paths[step]), session.heldout)
    if noisy:
        with _named("noise", 0):
            write_json(noise_file, _noise(session, paths[0]))
        session.book_time()


def _names(settings: EvaluateSettings, left: int, points: int) -> list[str]:
    """Benchmarks of a checkpoint after which `left` others come."""
    drift = settings.drift_settings()
    known = {"heldout": settings.heldout, "drift": drift, "drift_task": settings.heldout and drift and drift.task_rows}
    names = [name for name, wanted in known.items() if wanted]
    sides = (("target", left < points), ("general", left == 0))
    return names + [entry.task for side, wanted in sides if wanted for entry in settings.entries(side)]


def _pending(
    run: Run, checkpoints: dict[int, Path | str], settings: EvaluateSettings, points: int
) -> dict[int, list[str]]:
    """{step: names of the benchmarks still to run}, steps ascending, steps with nothing to do left out."""
    done, pending = run.evals(), {}
    alike = "average" in run.info  # every weight is a model of its own, and gets all benchmarks
    for left, step in zip(reversed(range(len(checkpoints))), sorted(checkpoints), strict=True):
        if missing := [
            name for name in _names(settings, 0 if alike else left, points) if name not in done.get(step, {})
        ]:
            pending[step] = missing
    return pending


def _prepare(session: Session, names: set[str]) -> None:
    """Everything that is read once, for these benchmarks: their data first, because that needs no model."""
    settings = session.settings
    session.benchmarks = _load_benchmarks(settings, names - {BFCL})
    gc.collect()  # the model of an earlier call would stay for ever
    gc.freeze()  # what is imported stays, and need not be looked through each time a model is released
    if "heldout" in names:
        from eaft_verl.data.prepare import load_prepared

        session.heldout = load_prepared(Path(str(settings.heldout))).examples[: settings.limit]
    for name in sorted(names & {"drift", "drift_task"}):
        with _named(name, 0):
            _prepare_drift(session, name)


def _load_benchmarks(settings: EvaluateSettings, names: set[str]) -> dict[str, "Benchmark"]:
    entries = [entry for side in ("target", "general") for entry in settings.entries(side) if entry.task in names]
    if not entries:
        return {}
    from eaft_verl.evaluation.benchmarks import load_benchmark

    return {entry.task: load_benchmark(entry) for entry in entries}


def _prepare_drift(session: Session, name: str) -> None:
    """Probe and base logits, kept for the other runs; after this the base model itself is not needed any more."""
    from eaft_verl.data.prepare import load_prepared
    from eaft_verl.evaluation import drift
    from eaft_verl.evaluation.base_logits import base_logits, kept_logits

    wanted = session.settings.drift_settings()
    assert wanted is not None
    if name == "drift":
        prompts = drift.prompts_of(wanted, session.settings.chat_template_kwargs)
    else:
        prompts = drift.task_prompts(load_prepared(Path(str(session.settings.heldout))).examples[: wanted.task_rows])
    key, tokenizer = model_key(session.base), load_tokenizer(session.base)

    def base() -> "PreTrainedModel":
        return session.model(session.base)[0]

    if drift.has_answers(prompts):
        probe = drift.given_probe(tokenizer, prompts, wanted, session.settings.max_length)
    else:
        probe = drift.own_answers(session.work, key, tokenizer, prompts, wanted.new_tokens, base)
    how = [key, session.settings.backend, session.settings.backend_args]
    logits = kept_logits(
        session.work, how, probe, len(tokenizer), lambda: base_logits(base(), probe, session.token_budget)
    )
    session.probes[name] = probe, logits


def _evaluate_step(session: Session, step: int, path: Path | str, names: list[str]) -> None:
    for name in names:
        if name in FORCED:
            _record(session, step, [name], functools.partial(_forced, session, name, path), "hf")
    if tasks := [name for name in names if name not in (*FORCED, BFCL)]:
        _apart(_generate, session, step, path, tasks)
    if BFCL in names:
        folder = session.run.path / BFCL / step_name(step)
        _record(
            session,
            step,
            [BFCL],
            lambda: [measure_bfcl(session.settings, path, folder, session.model, session.free)],
            session.settings.backend,
        )


def _forced(session: Session, name: str, path: Path | str) -> list[Outcome]:
    """The `heldout` benchmark, or one of the two of drift."""
    from eaft_verl.evaluation import drift, teacher_forced

    if name == "heldout":
        return [teacher_forced.heldout(session.model(path)[0], session.heldout, session.token_budget)]
    model = None if session.of_base else session.model(path)[0]
    return [drift.drift(model, *session.probes[name], session.token_budget)]


def _apart(work: Callable[..., Any], session: Session, *arguments: Any) -> Any:
    """work(session, *arguments); with vLLM in a process of its own, whose end gives the GPUs back, engine and all.

    The model that is held here must be gone before the engine takes the memory.
    """
    if session.settings.backend != "vllm":
        return work(session, *arguments)
    session.free()
    sent = replace(session, benchmarks={}, heldout=[], probes={})
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_end_children) as pool:
        outcome = pool.submit(work, sent, *arguments).result()
    session.mark = time.perf_counter()  # what came before is booked over there
    return outcome


def _end_children() -> None:
    """When this process ends, so do its children: multiprocessing would wait for an idle engine for ever."""

    def end() -> None:
        gc.collect()  # an engine that nobody refers to any more shuts itself down
        for child in multiprocessing.active_children():
            child.terminate()

    multiprocessing.util.Finalize(None, end, exitpriority=100)  # before multiprocessing waits


def _language(session: Session, path: Path | str, tasks: list[str], batch_size: int | None = None) -> Any:
    """The model behind the harness, and every task's answers limited to what their prompts leave."""
    from eaft_verl.evaluation import harness

    if not session.benchmarks:  # in a process of its own
        session.benchmarks = _load_benchmarks(session.settings, set(tasks))
    if session.settings.backend == "vllm":
        language = harness.vllm_model(path, session.settings)
    else:
        language = harness.language_model(*session.model(path), session.settings, batch_size)
    for name in tasks:
        harness.give_room(language, session.benchmarks[name])
    return language


def _generate(session: Session, step: int, path: Path | str, tasks: list[str]) -> None:
    """The records of these tasks, with one engine.

    Targets are not asked together with others, so that a checkpoint before the last asks them in the same batches.
    """
    from eaft_verl.evaluation import benchmarks, harness

    language = _language(session, path, tasks)
    targets = {entry.task for entry in session.settings.entries("target")}
    for of_one_side in ([name for name in tasks if (name in targets) is target] for target in (True, False)):
        chosen = [session.benchmarks[name] for name in of_one_side]
        for together in benchmarks.asked_together(chosen, language.batch_size):
            measure = functools.partial(harness.run_benchmarks, language, together)
            _record(session, step, [one.name for one in together], measure, session.settings.backend)


def _noise(session: Session, path: Path | str) -> dict[str, Any]:
    """What eval/noise.json holds; None where nothing was measured."""
    from eaft_verl.evaluation import noise

    names = _names(session.settings, 0, 1)
    found: dict[str, float | None] = {"kl": None, "agreement": None, "nll": None}
    model = session.model(path)[0]
    if "drift" in names:
        found.update(noise.drift_noise(model, *session.probes["drift"], session.run.samples(0, "drift")))
    task = {}
    if "drift_task" in names:
        task = noise.drift_noise(model, *session.probes["drift_task"], session.run.samples(0, "drift_task"))
    if "heldout" in names:
        nll = noise.heldout_noise(model, session.heldout, session.run.samples(0, "heldout"))
        found["nll"] = max(nll, found["nll"] or 0.0)
    tasks = [name for name in names if name not in (*FORCED, BFCL)]
    accuracy = _apart(_repeat, session, path, tasks) if tasks else {}
    return {**found, "task": task, "accuracy": accuracy, "questions": noise.QUESTIONS}


def _repeat(session: Session, path: Path | str, tasks: list[str]) -> dict[str, Any]:
    """{task: noise.accuracy_noise}: the first questions of each once more, in batches of a quarter of the size."""
    from eaft_verl.evaluation import harness, noise

    usual = session.settings.backend_args.get("batch_size", harness.BATCH_SIZE)
    other = 8 if isinstance(usual, str) else usual // 4 or usual + 1
    language = _language(session, path, tasks, other)
    records, found = session.run.evals()[0], {}
    for name in tasks:
        [(_, samples)] = harness.run_benchmarks(language, [session.benchmarks[name].first(noise.QUESTIONS)])
        outcome = noise.accuracy_noise(samples, session.run.samples(0, name), records[name]["metric"])
        if outcome is not None:
            found[name] = outcome
    return found


def _record(session: Session, step: int, names: list[str], measure: Callable[[], list[Outcome]], backend: str) -> None:
    """Measure and write these benchmarks; `seconds` of those asked together are shared out by their samples."""
    started = time.perf_counter()
    with _named(", ".join(names), step):
        outcomes = measure()
    whole = time.perf_counter() - started
    rows = sum(outcome["n"] for outcome, _ in outcomes)
    targets = {entry.task for entry in session.settings.entries("target")} | {"heldout"}
    for name, (outcome, samples) in zip(names, outcomes, strict=True):
        seconds = round(whole * outcome["n"] / rows, 3)
        side = "drift" if name.startswith("drift") else "target" if name in targets else "general"
        record = {"benchmark": name, "side": side, "step": step, "backend": backend, "seconds": seconds, **outcome}
        session.run.write_eval(step, name, record, samples)
        best = outcome["metrics"][outcome["metric"]]
        error = "" if best["stderr"] is None else f" ± {best['stderr']:.4f}"
        score = f"{outcome['metric']} {best['score']:.4f}{error}"
        took = f"{whole:.1f} s" + (f" for {rows} at once" if len(names) > 1 else "")
        print(f"{session.run.path.name} {step_name(step)} {name}: {score} (n={outcome['n']}, {took})", flush=True)
    session.book_time()


@contextlib.contextmanager
def _named(name: str, step: int) -> Iterator[None]:
    """Whatever fails inside is reported with the benchmark, or those asked together, and the step it failed in."""
    try:
        yield
    except Exception as error:
        raise RunError(f"benchmark {name!r} failed at step {step}: {type(error).__name__}: {error}") from error
