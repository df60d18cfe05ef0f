"""The `eaft` command: one verb per stage. Heavy imports happen inside a verb, so that `eaft --help` answers at once."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote

from eaft_verl.boundary import guard_streams, masked, python_command
from eaft_verl.errors import (
    ENDED,
    REFUSED,
    UNREAD,
    ConfigError,
    DataError,
    Interrupted,
    RunError,
    did_you_mean,
    refusal,
)
from eaft_verl.experiment.arguments import DEFAULT_RECIPE, parser
from eaft_verl.experiment.processes import CAUSE_FILE, Ending, begin_stage, run_stage
from eaft_verl.planning.machine import waiting_threads
from eaft_verl.training.interruption import is_stage


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; its exit code is one of `errors.EXIT_CODES`. An error that the user can act on is one line."""
    guard_streams()
    ending = Ending()
    try:
        try:
            with ending:
                code = _run(arguments)
            return ENDED if ending.code == ENDED else code  # who watched a job, or typed, has ended without a word
        finally:
            sys.stdout.flush()  # what is left in the buffer finds a closed pipe here and not at the interpreter's end
    except KeyboardInterrupt:
        kept = "what was finished before is kept; run the same command again"
        print(f"eaft: {ending.name}: ended; {kept}", file=sys.stderr)
        return ending.code
    except BrokenPipeError:  # `| head` has read what it wanted
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        return UNREAD


def _run(arguments: Sequence[str] | None) -> int:
    options = _parsed(sys.argv[1:] if arguments is None else arguments)
    os.environ.update({"TOKENIZERS_PARALLELISM": "false", **waiting_threads(), **os.environ})
    if is_stage():
        begin_stage()
    try:
        return VERBS[options.verb](options) or 0
    except Interrupted as error:
        if not error.said:
            print(f"eaft: {error}", file=sys.stderr)
        return error.code
    except (ConfigError, DataError, RunError) as error:
        print(f"eaft: error: {error}", file=sys.stderr)
        if path := os.environ.get(CAUSE_FILE):
            with contextlib.suppress(OSError):  # on a full disk the report says what run.json does
                Path(path).write_text(masked(f"{type(error).__name__}: {error}"), encoding="utf-8")
        return error.code if isinstance(error, RunError) else REFUSED
    except (OSError, RuntimeError) as error:
        if (told := refusal(error)) is None:
            raise
        print(f"eaft: error: {told[1]}", file=sys.stderr)
        return told[0]


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The verb and its options; ends the program with one line where they are not known, or say two things at once."""
    words = parser()
    if arguments and arguments[0] not in VERBS and not arguments[0].startswith("-"):
        near = did_you_mean(arguments[0], VERBS.keys()) or f"; the verbs are {', '.join(VERBS)}"
        words.error(f"there is no verb {arguments[0]!r}{near}")
    options, rest = words.parse_known_args(arguments)  # argparse leaves positional words behind an option over
    if wrong := [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in options]:
        words.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    said: dict[str, str] = {}
    for word in [vars(options).get("recipe") or "", *vars(options).get("overrides", ())]:
        key, _, value = word.partition("=")
        if key and said.setdefault(key, value) != value:
            words.error(f"{key} is given twice, {said[key]} and {value}; give it once")
    return options


def _recipe_arguments(options: argparse.Namespace) -> tuple[str, list[str]]:
    """`eaft train verl.optim.lr=1e-5 --arm sft` means the default recipe: the first word is no recipe but a key."""
    from eaft_verl.recipe.shipped import find_recipe

    if "=" in options.recipe and not Path(options.recipe).exists():
        return str(find_recipe(Path(DEFAULT_RECIPE))), [options.recipe, *options.overrides]
    return str(find_recipe(Path(options.recipe))), options.overrides


def _init(options: argparse.Namespace) -> None:
    from eaft_verl.experiment.init import init
    from eaft_verl.experiment.prepare import columns_of

    init(options.source, options.model, options.out, columns_of(options.column))


def _recipes(options: argparse.Namespace) -> None:
    from eaft_verl.recipe.file import read_recipe
    from eaft_verl.recipe.shipped import find_recipe, listing

    if options.name:
        file = find_recipe(Path(options.name))
        read_recipe(file)  # says what is wrong, and which there are
        print(file.read_text(encoding="utf-8"), end="")
    else:
        print("\n".join(listing()))


def _prepare(options: argparse.Namespace) -> None:
    from eaft_verl.experiment.prepare import prepare_command

    prepare_command(options)


def _synthesize(options: argparse.Namespace) -> None:
    from eaft_verl.experiment.synthesize import synthesize_command

    synthesize_command(options)


def _train(options: argparse.Namespace) -> int:
    from eaft_verl.cluster.doctor import idle_gpus
    from eaft_verl.experiment.chain import missing_before
    from eaft_verl.planning.machine import gpus_here
    from eaft_verl.recipe.checks import check, pending, warn, warn_of
    from eaft_verl.recipe.config import as_yaml
    from eaft_verl.recipe.model_fit import notes_at_hand
    from eaft_verl.recipe.resolve import declared_keys, load_recipe, resolve
    from eaft_verl.runs import run_name

    path, overrides = _recipe_arguments(options)
    recipe = load_recipe(path)
    config = resolve(recipe, options.arm, overrides)
    check(config, dry_run=options.dry_run)
    if not (is_stage() or options.dry_run):
        from eaft_verl.experiment.supervision import supervised

        command = python_command("eaft_verl.cli", "train", path, "--arm", options.arm, *overrides)
        folder = Path(config.output) / run_name(config.arm, config.seed)
        return supervised(lambda: run_stage(command), folder, options.max_restarts)
    if options.dry_run:
        print(as_yaml(config), end="", flush=True)  # before what is said of it
        warn_of([*notes_at_hand(config), *idle_gpus(config, len(gpus_here()))])
        warn([*pending(config, contents=True), *missing_before(config)])
        return 0
    from eaft_verl.experiment.train import train

    run = train(config, declared_keys(recipe, options.arm, overrides))
    print(f"trained {run.path}")
    return 0


def _evaluate(options: argparse.Namespace) -> None:
    from eaft_verl.experiment.evaluate import evaluate_command

    run = evaluate_command(options.what, options.recipe, options.out, options.overrides, options.base)
    print(f"evaluated {run.path}")
    if run.path.parent.name == "models":
        print(f"beside its base and arms, once these are evaluated: eaft report {quote(str(run.path.parents[1]))}")


def _compare(options: argparse.Namespace) -> int:
    from eaft_verl.experiment.compare import compare, parse_seeds

    path, overrides = _recipe_arguments(options)
    arms, seeds = options.arms.split(",") if options.arms else None, parse_seeds(options.seeds)
    return compare(path, arms, seeds, overrides, options.max_restarts, dry_run=options.dry_run, alone=options.alone)


def _report(options: argparse.Namespace) -> None:
    from eaft_verl.reporting.paper import require_table
    from eaft_verl.reporting.report import report
    from eaft_verl.reporting.summary import runs_of, summary

    if options.paper:
        require_table(options.paper)  # before any run is read
    runs = runs_of(options.runs, evaluated=True)
    out = options.out or runs[0].resolve().parent / "report"
    found = report(runs, out, force=options.force, paper=options.paper)
    print("\n".join([*summary(found), f"wrote {out / 'report.html'}"]))


def _chat(options: argparse.Namespace) -> None:
    from eaft_verl.experiment.chat import chat_command

    chat_command(options.what, options.prompt, options.system, options.new_tokens, options.temperature)


def _export(options: argparse.Namespace) -> None:
    from eaft_verl.experiment.use import export, how_to_use
    from eaft_verl.runs import Run

    if options.public and not options.push:
        raise ConfigError("--public is of --push ORG/NAME")
    run = Run(options.folder)
    if options.out or options.push:
        print(f"wrote {export(run, options.step, options.out, options.push, public=options.public)}")
    else:
        print("\n".join(how_to_use(run, options.step)))


def _choose(options: argparse.Namespace) -> None:
    from eaft_verl.experiment.choose import choose_command

    print(choose_command(options.what, options.overrides, copy=options.copy))


def _doctor(options: argparse.Namespace) -> int:
    from eaft_verl.cluster.doctor import doctor
    from eaft_verl.recipe.checks import check
    from eaft_verl.recipe.resolve import load_recipe, resolve

    path, overrides = _recipe_arguments(options)
    recipe = load_recipe(path)
    config = resolve(recipe, options.arm or next(iter(recipe.arms)), overrides)
    check(config, dry_run=True)  # what is still missing is one of the findings
    return doctor(config, wait_s=options.wait)


def _checkpoints(options: argparse.Namespace) -> None:
    from eaft_verl.experiment.checkpoints import export_step, listing
    from eaft_verl.runs import Run

    run = Run(options.folder)
    if options.export is None:
        print("\n".join(listing(run, options.out)))
    else:
        print(f"wrote {export_step(run, options.export, options.out)}")


def _plan(options: argparse.Namespace) -> int:
    from eaft_verl.planning.command import plan_command

    return plan_command(options, *_recipe_arguments(options))


def _analyze(options: argparse.Namespace) -> None:
    from eaft_verl.experiment.analyze import analyze_command

    analyze_command(options)


def _reproduce(options: argparse.Namespace) -> int:
    from eaft_verl.experiment.reproduce import reproduce

    return reproduce(options.run, options.output, options.overrides, force=options.force)


def _launch(options: argparse.Namespace) -> int:
    from eaft_verl.launch.places import launch
    from eaft_verl.launch.request import Launch

    path, overrides = _recipe_arguments(options)
    given = (tuple(overrides), options.wait, tuple(options.env), options.recipe_hash, options.max_restarts)
    wanted = Launch(path, options.arm, options.seeds, *given)
    return launch(wanted, options.on, dry_run=options.dry_run)


def _tasks(options: argparse.Namespace) -> None:
    from eaft_verl.experiment.tasks import tasks_listing

    print("\n".join(tasks_listing()))


VERBS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "init": _init,
    "recipes": _recipes,
    "prepare": _prepare,
    "synthesize": _synthesize,
    "train": _train,
    "evaluate": _evaluate,
    "compare": _compare,
    "report": _report,
    "chat": _chat,
    "export": _export,
    "choose": _choose,
    "doctor": _doctor,
    "launch": _launch,
    "plan": _plan,
    "checkpoints": _checkpoints,
    "analyze": _analyze,
    "reproduce": _reproduce,
    "tasks": _tasks,
}


if __name__ == "__main__":
    sys.exit(main())
