"""Checkpoints of a run -> its eval/ and samples/ folders. Heavy imports happen when there is something to evaluate."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaft_verl.errors import RunError
from eaft_verl.evaluation.settings import EvaluateSettings, evaluation_key
from eaft_verl.models import model_key, resolve_model
from eaft_verl.runs import Run, step_name

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from eaft_verl.evaluation.benchmarks import Benchmark
    from eaft_verl.evaluation.teacher_forced import Example

__all__ = ["EvaluateSettings", "evaluate_checkpoints", "evaluation_key"]
Outcome = tuple[dict[str, Any], list[dict[str, Any]]]


@dataclass
class _Session:
    """What one call of evaluate_checkpoints shares between its steps."""

    run: Run
    settings: EvaluateSettings
    base: Path | str
    work: Path
    benchmarks: dict[str, "Benchmark"] = field(default_factory=dict)
    probe: list["Example"] = field(default_factory=list)
    base_logits: list["Tensor"] = field(default_factory=list)
    base_key: str = ""
    loaded: tuple[Path | str, "PreTrainedModel", "PreTrainedTokenizerBase"] | None = None
    mark: float = field(default_factory=time.perf_counter)

    def model(self, path: Path | str) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
        """The checkpoint and its tokenizer; one model is held at a time, the last one is kept."""
        from eaft_verl.evaluation import harness

        if self.loaded is None or self.loaded[0] != path:
            self.free()
            self.loaded = (path, *harness.load_model(path, self.settings))
        return self.loaded[1:]

    def free(self) -> None:
        """Release the held model."""
        from eaft_verl.evaluation import harness

        self.loaded = None
        harness.release()

    def book_time(self) -> None:
        """Add the seconds since the last call to run.json, so that a killed evaluation has booked what it did."""
        now = time.perf_counter()
        self.run.update(eval_seconds=round(self.run.info.get("eval_seconds", 0.0) + now - self.mark, 3))
        self.mark = now


def evaluate_checkpoints(
    run: Run,
    checkpoints: dict[int, Path | str],
    settings: EvaluateSettings,
    base_model: str,
    work: Path,
    full_steps: set[int],
) -> None:
    """Evaluate every checkpoint that has not been, writing one record per benchmark through `run`.

    At every step: `heldout`, `drift` and the target tasks; the general tasks only at full_steps. A benchmark whose
    record exists is skipped, so a killed evaluation goes on where it stopped. The base run passes {0: base_model}.
    work: folder of the experiment for the probe set (the base's own answers), shared by its runs.
    Raises ConfigError or DataError before any model is loaded; RunError naming the benchmark that failed.
    """
    settings.check()
    pending = _pending(run, checkpoints, settings, full_steps)
    if not pending:
        return
    session = _Session(run, settings, resolve_model(base_model), Path(work))
    paths = {step: resolve_model(checkpoints[step]) for step in pending}
    _load_benchmarks(session, {name for names in pending.values() for name in names})
    if any("drift" in names for names in pending.values()):
        with _named("drift", 0):
            _prepare_drift(session)
    for step, names in pending.items():
        _evaluate_step(session, step, paths[step], names)


def _pending(
    run: Run, checkpoints: dict[int, Path | str], settings: EvaluateSettings, full_steps: set[int]
) -> dict[int, list[str]]:
    """{step: names of the benchmarks still to run}, steps ascending, steps with nothing to do left out."""
    always = [name for name, wanted in (("heldout", settings.heldout), ("drift", settings.drift_settings())) if wanted]
    always += [entry.task for entry in settings.entries("target")]
    general = [entry.task for entry in settings.entries("general")]
    done = run.evals()
    pending = {}
    for step in sorted(checkpoints):
        names = always + (general if step in full_steps else [])
        if missing := [name for name in names if name not in done.get(step, {})]:
            pending[step] = missing
    return pending


def _load_benchmarks(session: _Session, names: set[str]) -> None:
    entries = [entry for side in ("target", "general") for entry in session.settings.entries(side)]
    wanted = [entry for entry in entries if entry.task in names]
    if wanted:
        from eaft_verl.evaluation.benchmarks import load_benchmark

        session.benchmarks = {entry.task: load_benchmark(entry) for entry in wanted}


def _prepare_drift(session: _Session) -> None:
    """Probe and base logits; after this the base model itself is not needed any more."""
    from eaft_verl.evaluation import drift

    wanted = session.settings.drift_settings()
    prompts = drift.prompts_of(wanted)
    session.base_key = model_key(session.base)
    model, tokenizer = session.model(session.base)
    if drift.has_answers(prompts):
        session.probe = drift.given_probe(tokenizer, prompts, wanted, session.settings.max_length)
    else:
        path = drift.probe_path(session.work, session.base_key, tokenizer, prompts, wanted.new_tokens)
        if not path.exists():
            drift.write_probe(path, drift.make_probe(model, tokenizer, prompts, wanted.new_tokens), tokenizer)
        session.probe = drift.read_probe(path)
    session.base_logits = drift.base_logits(model, session.probe, _token_budget(session.settings))


def _token_budget(settings: EvaluateSettings) -> int:
    from eaft_verl.evaluation.teacher_forced import TOKEN_BUDGET

    return settings.backend_args.get("token_budget", TOKEN_BUDGET) if settings.backend == "hf" else TOKEN_BUDGET


def _evaluate_step(session: _Session, step: int, path: Path | str, names: list[str]) -> None:
    """Teacher-forced benchmarks first: with vLLM their model must be gone before the engine takes the memory."""
    from eaft_verl.evaluation import harness

    for name in names:
        if name in ("heldout", "drift"):
            _record(session, step, name, lambda name=name: _forced(session, name, path), "hf")
    generated = [session.benchmarks[name] for name in names if name in session.benchmarks]
    if not generated:
        return
    if session.settings.backend == "vllm":
        session.free()
        language = harness.vllm_model(path, session.settings)
    else:
        language = harness.language_model(*session.model(path), session.settings)
    for benchmark in generated:
        harness.give_room(language, benchmark)
    for benchmark in generated:
        measure = functools.partial(harness.run_benchmark, language, benchmark)
        _record(session, step, benchmark.name, measure, session.settings.backend)


def _forced(session: _Session, name: str, path: Path | str) -> Outcome:
    """The `heldout` or the `drift` benchmark."""
    from eaft_verl.data.sources import read_rows
    from eaft_verl.evaluation import drift, teacher_forced

    settings, budget = session.settings, _token_budget(session.settings)
    if name == "drift" and model_key(path) == session.base_key:
        return drift.drift(None, session.probe, session.base_logits, budget)
    model, tokenizer = session.model(path)
    if name == "drift":
        return drift.drift(model, session.probe, session.base_logits, budget)
    rows = read_rows(settings.heldout)[: settings.limit]
    examples = teacher_forced.encode_examples(tokenizer, rows, settings.max_length, settings.heldout, settings.turns)
    return teacher_forced.heldout(model, examples, budget)


def _record(session: _Session, step: int, name: str, measure: Callable[[], Outcome], backend: str) -> None:
    started = time.perf_counter()
    with _named(name, step):
        outcome, samples = measure()
    seconds = round(time.perf_counter() - started, 3)
    targets = {entry.task for entry in session.settings.entries("target")} | {"heldout"}
    side = "drift" if name == "drift" else "target" if name in targets else "general"
    record = {"benchmark": name, "side": side, "step": step, "backend": backend, "seconds": seconds, **outcome}
    session.run.write_eval(step, name, record, samples)
    session.book_time()
    best = outcome["metrics"][outcome["metric"]]
    error = "" if best["stderr"] is None else f" ± {best['stderr']:.4f}"
    score = f"{outcome['metric']} {best['score']:.4f}{error}"
    print(f"{session.run.path.name} {step_name(step)} {name}: {score} (n={outcome['n']}, {seconds:.1f} s)", flush=True)


@contextlib.contextmanager
def _named(name: str, step: int) -> Iterator[None]:
    """Whatever fails inside is reported with the benchmark and the step it failed in."""
    try:
        yield
    except Exception as error:
        raise RunError(f"benchmark {name!r} failed at step {step}: {type(error).__name__}: {error}") from error
