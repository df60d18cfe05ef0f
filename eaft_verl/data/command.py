"""What `eaft prepare` does with its arguments."""

import argparse
import sys
from pathlib import Path
from typing import Any

from eaft_verl.data.prepare import Prepared, load_prepared, manifest_path, prepare
from eaft_verl.data.show import show
from eaft_verl.data.spec import DataSpec
from eaft_verl.errors import ConfigError
from eaft_verl.models import hub_arguments, resolve_model


def prepare_command(options: argparse.Namespace) -> None:
    """Prepare SOURCE into OUT (or open SOURCE, if it is prepared data), say what came of it, show examples."""
    tokenizer = _tokenizer(options.model)
    source = Path(options.source)
    if options.out is None:
        if not (source.suffix == ".parquet" and manifest_path(source).exists()):
            raise ConfigError(f"OUT is missing: name the .parquet file that {options.source} is to be prepared into")
        prepared = load_prepared(source, tokenizer)
    else:
        spec = DataSpec(
            source=options.source,
            max_length=options.max_length,
            over_long=options.over_long,
            control_tokens=options.control_tokens,
            turns=options.turns,
            rows=options.rows,
        )
        prepared = prepare(spec, tokenizer, options.out)
    print(_summary(prepared))
    if options.show:
        show(prepared, tokenizer, options.show, sys.stdout)


def _summary(prepared: Prepared) -> str:
    counts, tokens = prepared.manifest["counts"], prepared.manifest["tokens"]
    lines = [
        f"{prepared.path}: {counts['examples']} examples from {counts['read']} rows, {tokens['total']:,} tokens, "
        f"{tokens['trained']:,} trained; manifest {manifest_path(prepared.path)}"
    ]
    lines += [f"rejected row {entry['row']}: {entry['reason']}" for entry in prepared.manifest["rejected"][:5]]
    if counts.get("open_turns"):
        lines.append(f"{counts['open_turns']} turns train no end-of-turn token: the chat template writes none")
    if (more := len(prepared.manifest["rejected"]) - 5) > 0:
        lines.append(f"... and {more} more rejected rows, listed in the manifest")
    return "\n".join(lines)


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(**hub_arguments(resolve_model(model)))
