"""`eaft analyze`: what a model says of every trained token of a data set, and the page that shows it."""

import argparse
import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from eaft_verl.analysis.gates import WORDS, read_gates
from eaft_verl.analysis.page import PAGE, write_page
from eaft_verl.analysis.store import TokenStore
from eaft_verl.data.parquet import Example, file_hash
from eaft_verl.data.prepare import Prepared
from eaft_verl.errors import ConfigError, DataError, require
from eaft_verl.evaluation.model_files import check_model_files
from eaft_verl.experiment.answers import ROLLOUTS, own_answers, rollouts_of
from eaft_verl.experiment.gate_lab import gate_lab, is_store
from eaft_verl.experiment.token_dynamics import token_dynamics
from eaft_verl.experiment.token_stats import fill, identity, store_path, vocabulary_size
from eaft_verl.files import locked, read_json, write_json
from eaft_verl.models import load_tokenizer, model_key, resolve_model
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.datasets import prepare_data
from eaft_verl.recipe.matching import OWN_DATA
from eaft_verl.recipe.resolve import Recipe, load_recipe, resolve
from eaft_verl.recipe.shipped import find_recipe
from eaft_verl.recipe.views import objective_of
from eaft_verl.training.sft.inference import token_statistics
from eaft_verl.training.sft.run import check_lengths

MARK = ".analysis.json"  # in a folder that an analysis has made
SCHEMA = 1


@dataclass(frozen=True)
class Panel:
    """One data set under the model: `name` data, own or rollouts; where its store is, and what it must say."""

    name: str
    examples: Sequence[Example]
    path: Path
    meta: dict[str, Any]


def analyze_command(options: argparse.Namespace) -> None:
    """The stores of every panel that is asked for, made or found, the page beside them, samples on the terminal."""
    gates = options.gates if options.gates is not None else WORDS
    if is_store(options.what):
        return _of_stores(options, gates)
    read_gates(gates)
    config = configured(options.what, options.overrides, options.out)
    _check_options(options)
    out = options.out or (Path(config.output) / "analysis" if is_recipe(options.what) else Path(config.output))
    model = resolve_model(config.model)
    check_model_files(model)
    k, vocab = objective_of(config).k, vocabulary_size(model)
    require(k <= vocab, f"objective.k={k} is more than the {vocab} tokens that {config.model} knows; lower it")
    tokenizer = load_tokenizer(model)
    with _folder(out):
        data = prepare_data(config, tokenizer, "train")
        check_lengths(config, data.examples)
        panels = list(_panels(options, config, data, tokenizer, out))
        for panel in panels[1:]:
            check_lengths(config, panel.examples)
        stores = _filled(config, panels, tokenizer, str(model), k)
        for panel, store in zip(panels, stores, strict=True):
            print(f"{panel.name}: {store.meta['tokens']:,} tokens of {store.meta['samples']:,} samples in {store.path}")
        measured = _fidelity(str(model), data.examples[: options.fidelity]) if options.fidelity else None
        found = write_page(
            out, stores, tokenizer, gates=gates, examples=data.examples, show=options.show, measured=measured
        )
        print("\n".join(sentence["text"] for sentence in found["verdict"]["sentences"]))
        print(f"wrote {out / PAGE}")
        _show(options.show, panels, stores, tokenizer)


def _check_options(options: argparse.Namespace) -> None:
    for name in ("own", "show", "fidelity"):
        require(vars(options)[name] >= 0, f"--{name} {vars(options)[name]} must be a number of samples, 0 or more")
    for name in ("temperature", "top_p", "new_tokens"):
        useless = name in vars(options).get("given", ()) and not options.own
        require(not useless, f"--{name.replace('_', '-')} is of --own N, the model's own answers to N prompts")
    require(0 < options.top_p <= 1, f"--top-p {options.top_p} must be above 0 and at most 1")
    require(options.new_tokens >= 1, f"--new-tokens {options.new_tokens} must be 1 or more")


def _of_stores(options: argparse.Namespace, gates: Sequence[str]) -> None:
    """What needs no model: gates on one store, or what moved from the first of several to the others."""
    if wrong := [word for word in options.overrides if not is_store(word)]:
        raise ConfigError(f"{options.what} is a store of token statistics and {wrong[0]} is none; leave it out")
    for name in ("own", "show", "fidelity", "rollouts"):
        require(not vars(options)[name], f"--{name} needs a model and its data; {options.what} is a store")
    require(options.out is None or not options.out.is_file(), f"--out {options.out} is a file; give a folder")
    if options.overrides:
        require(options.gates is None, "--gates takes one store; leave out the others")
        return token_dynamics(Path(options.what), [Path(word) for word in options.overrides], options.out)
    return gate_lab(Path(options.what), gates, options.out)


def is_recipe(what: str) -> bool:
    """Whether the first word names a recipe file rather than a model."""
    return find_recipe(Path(what)).suffix in (".yaml", ".yml")


def configured(what: str, words: Sequence[str], out: Path | None) -> Config:
    """The configuration that the pass runs with: of a recipe's first SFT arm, or of a model and a data set alone."""
    data, overrides = [word for word in words if "=" not in word], [word for word in words if "=" in word]
    if is_recipe(what):
        require(not data, f"{what} is a recipe, which names its data; leave out {' '.join(data)}, or data.train=OTHER")
        recipe = load_recipe(what)
        trainers = {name: own.get("trainer", recipe.shared.get("trainer", "sft")) for name, own in recipe.arms.items()}
        special = {name for name, own in recipe.arms.items() if any(own.get(key) for key in ("average", *OWN_DATA))}
        arm = next((name for name, trainer in trainers.items() if trainer == "sft" and name not in special), "")
        require(arm, f"{what} has no arm with trainer: sft, whose engine and objective the analysis runs with")
        config = resolve(recipe, arm, overrides)
    else:
        if len(data) != 1:
            came = f"{len(data)} data sets" if data else "no data"
            raise ConfigError(
                f"eaft analyze takes RECIPE, or MODEL and DATA; {what!r} is no recipe, and {came} came after"
            )
        config = resolve(_alone(what, data[0], out), "eaft", overrides)
    check(config, trains=False)
    return config


def _alone(model: str, data: str, out: Path | None) -> Recipe:
    """A recipe of one arm that nobody wrote down."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"analyze-{Path(model).name}-{Path(data).stem}")[:100].rstrip("-")
    shared = {"model": model, "data": {"train": data}, "name": name, **({"output": str(out)} if out else {})}
    return Recipe(Path("eaft analyze"), name, shared, {"eaft": {"objective": {"name": "eaft"}}})


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[None]:
    """Hold OUT for this process; DataError, and nothing is written, where it holds something else."""
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file; give a folder")
    if out.exists() and any(out.iterdir()):
        schema = read_json(out / MARK).get("schema") if (out / MARK).exists() else "no analysis"
        if schema != SCHEMA:
            raise DataError(
                f"--out {out} holds something else (schema {schema}, this version writes {SCHEMA}); nothing was "
                "written, give another folder"
            )
    out.mkdir(parents=True, exist_ok=True)
    if not (out / MARK).exists():
        write_json(out / MARK, {"schema": SCHEMA})
    with locked(out / ".lock", busy=f"another process analyzes into {out}", wait=True):
        yield


def _panels(options: argparse.Namespace, config: Config, data: Prepared, tokenizer: Any, out: Path) -> Iterator[Panel]:
    keys = {"model": model_key(config.model), "data": data.key, "template": data.manifest["template_hash"]}
    k = objective_of(config).k
    meta = identity(config, keys, k, data.examples)
    yield Panel("data", data.examples, store_path(config, k), meta)
    if options.own:
        from eaft_verl.evaluation.answers import Sampling

        sampling = Sampling(options.temperature, options.top_p, options.new_tokens, config.seed)
        chosen = data.examples[: options.own]
        said = {"prompts": len(chosen), **asdict(sampling)}
        found = {**meta, "origin": "own", "sampling": said, "samples": len(chosen)}
        folder = out / _name("own", found)
        yield Panel("own", own_answers(config, chosen, sampling, keys, folder / "answers"), folder / "tokens", found)
    if options.rollouts:
        examples = rollouts_of(config, options.rollouts, tokenizer, keys["template"], meta["vocab"])
        known = {**keys, "data": file_hash(options.rollouts / ROLLOUTS)}
        found = {**meta, "keys": known, "origin": "rollouts", "samples": len(examples)}
        found["sampling"] = {"run": options.rollouts.resolve().name}
        yield Panel("rollouts", examples, out / _name("rollouts", found) / "tokens", found)


def _name(origin: str, meta: dict[str, Any]) -> str:
    """Folder of a panel: other settings, another folder."""
    return f"{origin}-{hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:12]}"


def _filled(config: Config, panels: Sequence[Panel], tokenizer: Any, model: str, k: int) -> list[TokenStore]:
    """The stores, whole; the engine is started for the first part that is missing."""
    with contextlib.ExitStack() as stack:
        opened: list[Any] = []

        def infer(examples: Sequence[Example], rows: list[int]) -> Any:
            if not opened:
                opened.append(stack.enter_context(token_statistics(config, model, k)))
            return opened[0](examples, rows)

        size = config.verl.data.train_batch_size
        return [
            fill(panel.path, panel.meta, panel.examples, tokenizer, size, partial(infer, panel.examples))
            for panel in panels
        ]


def _fidelity(model: str, examples: Sequence[Example]) -> dict[str, Any]:
    """`fidelity.measure` of these samples, by transformers alone: other K need logits, and a store keeps none."""
    from eaft_verl.analysis.fidelity import measure
    from eaft_verl.evaluation.loading import load_model
    from eaft_verl.evaluation.settings import EvaluateSettings
    from eaft_verl.evaluation.teacher_forced import answer_logits

    loaded, _ = load_model(model, EvaluateSettings())
    return measure(logits_TV for _, logits_TV in answer_logits(loaded, examples))


def _show(count: int, panels: Sequence[Panel], stores: Sequence[TokenStore], tokenizer: Any) -> None:
    if count:
        from eaft_verl.analysis.xray import show_samples

        for panel, store in zip(panels, stores, strict=True):
            show_samples(store, panel.examples, tokenizer, count, sys.stdout)
