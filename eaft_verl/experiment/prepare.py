"""What `eaft prepare` does with its arguments."""

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from eaft_verl.data.account import check_rejected, rows_used
from eaft_verl.data.leakage import Against, summary
from eaft_verl.data.prepare import Prepared, check_leakage, load_prepared, manifest_path, prepare
from eaft_verl.data.show import show
from eaft_verl.data.spec import LEAKAGE, REPEATED, DataSpec
from eaft_verl.errors import ConfigError, DataError
from eaft_verl.models import load_tokenizer, resolve_model
from eaft_verl.recipe.datasets import file_questions, recipe_questions
from eaft_verl.recipe.resolve import load_recipe, resolve
from eaft_verl.recipe.shipped import find_recipe

# keys of a recipe in messages, which are options here
_KEY = re.compile(r"(?<![\w/.])data\.(max_length|over_long|control_tokens|turns|rows|max_rejected|leakage)\b(?!\.\w)=?")
_DECIDED = ("max_length", "over_long", "control_tokens", "turns", "rows")  # by what a prepared file was prepared with


def prepare_command(options: argparse.Namespace) -> None:
    """Prepare SOURCE into OUT (or open SOURCE, if it is prepared data), say what came of it, show examples."""
    try:
        _prepare(options)
    except (ConfigError, DataError) as error:
        raise type(error)(_KEY.sub(_as_option, str(error))) from None


def _as_option(key: re.Match[str]) -> str:
    """'--over-long ' for 'data.over_long=', so that what a message advises can be typed."""
    return f"--{key[1].replace('_', '-')}{' ' * key[0].endswith('=')}"


def _prepare(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(resolve_model(options.model))
    source = Path(options.source)
    with tempfile.TemporaryDirectory() as scratch:
        if options.out is None and source.suffix == ".parquet" and manifest_path(source).exists():
            _require_undecided(options)
            prepared = check_leakage(load_prepared(source, tokenizer), _against(options))
            check_rejected(prepared.manifest, options.max_rejected)
        elif options.out is None and not options.show:
            raise ConfigError(
                f"OUT is missing: name the .parquet file that {options.source} is to be prepared into, or only look at "
                "it: --show 3"
            )
        else:
            out = options.out or Path(scratch) / "shown.parquet"
            prepared = prepare(_spec(options), tokenizer, out, _against(options), options.max_rejected)
        print(_KEY.sub(_as_option, _summary(prepared)))
        if scratch in str(prepared.path):
            print(f"nothing is kept of this: name OUT.parquet, or write data.train={options.source} into a recipe")
        if options.show:
            show(prepared, tokenizer, options.show, sys.stdout)


def _require_undecided(options: argparse.Namespace) -> None:
    given = [name for name in _DECIDED if name in vars(options).get("given", ())] + ["column"] * bool(options.column)
    if given:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} has no effect: {options.source} is prepared data, which decides this "
            "itself; leave it out, or prepare the raw file again"
        )


def _spec(options: argparse.Namespace) -> DataSpec:
    return DataSpec(
        source=options.source,
        max_length=options.max_length,
        over_long=options.over_long,
        control_tokens=options.control_tokens,
        turns=options.turns,
        rows=options.rows,
        columns=columns_of(options.column),
    )


def columns_of(named: list[str]) -> dict[str, Any] | None:
    """--column ROLE=NAME as data.columns has it; NAME empty: no column has the role; some roles may be repeated."""
    columns: dict[str, Any] = {}
    for item in named:
        role, equals, name = item.partition("=")
        if not equals:
            raise ConfigError(f"--column {item!r} must be ROLE=NAME, for example prompt=Question")
        if role in columns and role not in REPEATED:
            raise ConfigError(f"--column {role} is given twice; one column has it (several: {', '.join(REPEATED)})")
        before = columns.get(role) or []
        listed = [*([before] if isinstance(before, str) else before), name]
        columns[role] = listed if before or role == "ignore" else name or None
    return columns or None


def _against(options: argparse.Namespace) -> Against | None:
    """Questions of a recipe (its first arm, as all arms share their benchmarks) or of a data source."""
    if options.leakage not in LEAKAGE:
        raise ConfigError(f"--leakage {options.leakage!r} is unknown; choose one of {', '.join(LEAKAGE)}")
    if options.against is None:
        if options.leakage != "warn":
            raise ConfigError(
                f"--leakage {options.leakage} needs --against RECIPE or FILE: what to compare the rows with"
            )
        return None
    if find_recipe(Path(options.against)).suffix not in (".yaml", ".yml"):
        return file_questions(options.against, options.leakage)
    recipe = load_recipe(options.against)
    return recipe_questions(resolve(recipe, next(iter(recipe.arms))), options.leakage)


def _summary(prepared: Prepared) -> str:
    counts, tokens = prepared.manifest["counts"], prepared.manifest["tokens"]
    lines = [
        f"{prepared.path}: {counts['examples']} examples from {counts['read']} rows, {tokens['total']:,} tokens, "
        f"{tokens['trained']:,} trained; manifest {manifest_path(prepared.path)}",
        rows_used(prepared.manifest),
    ]
    if counts.get("open_turns"):
        lines.append(f"{counts['open_turns']} turns train no end-of-turn token: the chat template writes none")
    if unused := prepared.manifest.get("columns_not_used"):
        named = ", ".join(f"{name} ({rows} rows)" for name, rows in sorted(unused.items()))
        lines.append(f"columns not used: {named}")
    if left := prepared.manifest.get("turns_left_out"):
        lines.append(f"{left} turns are too long and left out of their conversations")
    for name, part in prepared.manifest.get("sources", {}).items():
        lines.append(
            f"{name}: {part['kept']} rows, {part['tokens']['trained']:,} tokens trained, {part['left_out']} left out"
        )
    if leakage := prepared.manifest.get("leakage"):
        lines += summary(leakage)
    return "\n".join(lines)
