"""`eaft init`: a look at a data file, and a short recipe: limits, rates and a held-out split that follow from it."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from eaft_verl.data.account import rows_used
from eaft_verl.data.held_out import Split, held_out
from eaft_verl.data.profile import LOOKED_AT, Profile, profile
from eaft_verl.data.spec import Columns
from eaft_verl.errors import ConfigError
from eaft_verl.evaluation.model_files import positions_of
from eaft_verl.files import write_text
from eaft_verl.models import load_config, load_tokenizer, resolve_model
from eaft_verl.planning.arm_plan import ArmPlan, plan_arm
from eaft_verl.planning.machine import gpus_here, machine_of
from eaft_verl.planning.remedies import remedies
from eaft_verl.planning.text import duration, gib
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.model_fit import modules_of
from eaft_verl.recipe.resolve import check_name, load_recipe, resolve

USUAL_REJECTED = 0.1  # data.max_rejected's default
RATES = ((5e8, 4e-5), (3e9, 2e-5))  # full fine-tuning: up to so many weights, this rate; the paper's 1e-5 above
PAPER_RATE, LORA_RATE = 1e-5, 2e-4
UPDATES_PER_EPOCH, LARGEST_BATCH, SMALLEST_BATCH = 32, 64, 4
PATIENCE_S, TRY_S = 1800, 600
SHORT = 10_000  # rows up to which an epoch is not enough


def init(source: str, model: str, out: Path | None = None, columns: Columns | None = None) -> Path:
    """Look at the source, say what is there, write the recipe and its two data files; the recipe's path.

    Nothing is overwritten: ConfigError where one of the three exists. DataError where no row can be used.
    """
    out = out or Path(f"{_name_of(source)}.yaml")
    split_files = [out.with_suffix(f".{part}.jsonl").absolute() for part in ("train", "heldout")]
    if there := next((path for path in (out, *split_files) if path.exists()), None):
        raise ConfigError(f"{there} exists and is never overwritten; choose another --out")
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out {out} must be a recipe, NAME.yaml")
    check_name(out.stem)
    resolved = resolve_model(model)
    found = profile(source, load_tokenizer(resolved), columns)
    print("\n".join(described(found, model)))
    described_model = load_config(resolved)
    limit, kept = length_limit(found, positions_of(described_model))
    split = held_out(found, *split_files)
    settings = settings_for(split, limit, modules_of(described_model).num_parameters())
    write_text(out, recipe_text(found, split, model, settings, kept))
    plan = _fit(out, found, split, model, settings, kept)
    print("\n".join(_said(out, found, split, kept, plan, settings)))
    return out


def _name_of(source: str) -> str:
    """A file name that a recipe may have, from the source's."""
    stem = Path(source).name.split(".")[0] if "://" not in source else source.rpartition("/")[2].split(".")[0]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("._-")[:100] or "mine"


def described(found: Profile, model: str) -> list[str]:
    """What was found, in lines."""
    half, most, nearly, longest = found.quantiles
    examples = len(found.lengths_E)
    trained = found.trained_E.sum() / found.lengths_E.sum()
    turns = Counter(found.turns_E.tolist())
    shares = {"system prompts": found.system, "tools": found.tools, "reasoning": found.reasoning}
    lines = [
        f"{found.source}: {found.kind}; columns {', '.join(found.columns)}",
        f"rows: {rows_used(found.manifest)}",
        f"tokens of {model} in an example: median {half:,}, 90 % {most:,}, 99 % {nearly:,}, longest {longest:,}; "
        f"{trained:.0%} of them trained",
        f"assistant turns: {turns.most_common(1)[0][0]}{f' mostly, {min(turns)} to {max(turns)}' * (len(turns) > 1)}; "
        + ", ".join(f"{what} in {count:,} of {examples:,}" for what, count in shares.items()),
    ]
    if found.graded[0]:
        lines.append("answers that can be checked (a number): {} of {} tried".format(*found.graded))
    if found.manifest["counts"]["read"] >= LOOKED_AT != found.total:
        lines.insert(2, f"looked at: the first {LOOKED_AT:,} rows")
    if found.turns == "split":
        lines.append("turns are trained one by one (turns: split): the chat template writes earlier ones differently")
    if found.control_tokens == "escape":
        lines.append("special tokens stand inside messages; they are broken up (control_tokens: escape)")
    return lines


def length_limit(found: Profile, positions: int | None) -> tuple[int, int]:
    """(data.max_length, examples it keeps): the longest where that is little more than 99 % of them need."""
    longest, enough = found.quantiles[-1], found.quantiles[-2]
    step = 64 if enough > 256 else 16
    limit = -(-(longest if longest <= 1.25 * enough else enough) // step) * step
    limit = min(limit, positions or limit)
    return limit, int((found.lengths_E <= limit).sum())


def settings_for(split: Split, limit: int, weights: int) -> dict[str, Any]:
    """The recipe's `data` limits and `verl` block: rate by size, batch by rows, devices of this machine."""
    devices = max(1, len(gpus_here()))
    batch = SMALLEST_BATCH
    while batch < LARGEST_BATCH and split.usable >= 2 * batch * UPDATES_PER_EPOCH:
        batch *= 2
    batch = -(-batch // devices) * devices
    rate = next((rate for size, rate in RATES if weights <= size), PAPER_RATE)
    return {
        "max_length": limit,
        "verl": {
            "optim": {"lr": rate},
            "data": {"train_batch_size": batch, "max_token_len_per_gpu": max(limit, 16384 if gpus_here() else 1024)},
            "trainer": {"total_epochs": 3 if split.usable <= SHORT else 1}
            | ({"n_gpus_per_node": devices} if devices > 1 else {}),
        },
    }


def _fit(
    out: Path, found: Profile, split: Split, model: str, settings: dict[str, Any], kept: int
) -> ArmPlan | ConfigError:
    """The plan of the recipe on this machine; where it does not fit, the recipe is written again with what makes it."""
    config = _resolved(out)
    try:
        machine = machine_of(config, None, None)
        plan = plan_arm(config, machine)
        ways = [] if plan.verdict == "fits" else remedies(config, machine)
        if way := next((way for way in ways if not any("nnodes" in key for key in way["overrides"])), None):
            lay(settings["verl"], way["overrides"])
            write_text(out, recipe_text(found, split, model, settings, kept))
            plan = plan_arm(_resolved(out), machine)
    except ConfigError as error:
        return error
    return plan


def _resolved(out: Path) -> Config:
    check(config := resolve(load_recipe(out), "eaft"))
    return config


def lay(verl: dict[str, Any], overrides: Sequence[str]) -> None:
    """Write `verl.part.key=value` overrides into the block; an adapter gets the rate of one."""
    for override in overrides:
        key, _, value = override.partition("=")
        _verl, part, *rest = key.split(".")
        verl.setdefault(part, {})[".".join(rest)] = yaml.safe_load(value)
    if verl.get("model", {}).get("lora_rank"):
        verl["optim"]["lr"] = LORA_RATE


def recipe_text(found: Profile, split: Split, model: str, settings: dict[str, Any], kept: int) -> str:
    """The recipe as it is written."""
    limit, verl, examples = settings["max_length"], settings["verl"], len(found.lengths_E)
    data = {"train": str(split.train), "heldout": str(split.heldout), "max_length": limit, "over_long": "drop"}
    notes = {
        "train": f"{split.trained:,} rows; raw or prepared by `eaft prepare`, the tokens are the same",
        "heldout": f"{split.held} rows of other questions: their NLL says what was learnt",
        "max_length": f"keeps {kept:,} of {examples:,} examples, median {found.quantiles[0]:,}; others are left out",
    }
    for key, usual in (("turns", "whole"), ("control_tokens", "error")):
        if vars(found)[key] != usual:
            data[key] = vars(found)[key]
    rejected = found.faulty / max(found.manifest["counts"]["read"] - split.held - split.copies, 1)
    if rejected > USUAL_REJECTED:
        data["max_rejected"] = min(1.0, math.ceil(100 * rejected + 1) / 100)
        notes["max_rejected"] = "share of rows that cannot be used: look at why before you train"
    if found.asked:
        data["columns"] = dict(found.asked)
    lines = [f"# {_quoted(model)} on {found.source}: written by `eaft init`", f"model: {_quoted(model)}", "data:"]
    lines += [_line(key, value, notes.get(key)) for key, value in data.items()]
    lines += [
        "evaluate:",
        "  # target: [gsm8k]              # benchmarks of what is trained, beside the held-out NLL",
        "  # general: [mmlu_chat, ifeval] # of what must not be forgotten",
        _line("drift", {"data": "generate:neutral_prompts", "rows": 48}, "how far the model moves on other texts"),
        "  points: 4",
        "verl:",
    ]
    lines += [_line(key, value, _SAID.get(key)) for key, value in verl.items()]
    lines += ["arms:", "  sft: {objective: {name: sft}}", "  eaft: {objective: {name: eaft}}"]
    return "\n".join([*lines, *(_grpo(found, limit, verl) if found.verifiable else ())]) + "\n"


_SAID = {
    "optim": "warm-up and cosine are the defaults",
    "data": "rows of an update; tokens of a micro-batch",
    "trainer": "resumable at any time; more epochs forget more",
}


def _line(key: str, value: Any, note: str | None = None) -> str:
    text = f"  {key}: {_quoted(value)}"
    return f"{text}  # {note}" if note else text


def _quoted(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip().removesuffix("\n...")


def _grpo(found: Profile, limit: int, verl: dict[str, Any]) -> list[str]:
    """The arm that learns from rewards, for rows whose answers can be checked; commented out: it takes far longer."""
    prompts_E = (found.lengths_E - found.trained_E)[found.lengths_E <= limit]
    prompt = min(-(-int(prompts_E.max()) // 16) * 16, limit - 16)
    settings = {
        "optim": {"lr": verl["optim"]["lr"] / 2, "lr_scheduler_type": "constant", "lr_warmup_steps_ratio": 0.0},
        "data": {"max_prompt_length": prompt, "max_response_length": limit - prompt},
    }
    return [
        f"  # answers can be checked (all {found.graded[1]} tried): RL can be an arm; it takes far longer",
        f"  # grpo: {_quoted({'trainer': 'grpo', 'verl': settings})}",
    ]


def _said(
    out: Path, found: Profile, split: Split, kept: int, plan: ArmPlan | ConfigError, settings: dict[str, Any]
) -> Iterator[str]:
    limit, batch = settings["max_length"], settings["verl"]["data"]["train_batch_size"]
    recipe = quote(str(out))
    looked = (
        f"the first {LOOKED_AT:,}"
        if found.manifest["counts"]["read"] < split.trained + split.held + split.copies
        else "them"
    )
    unused = f" ({split.unused:,} of {looked} at fault or copies, which are left out)" if split.unused else ""
    yield (
        f"wrote {out}: max_length {limit:,} keeps {kept:,} of {len(found.lengths_E):,} examples; "
        f"{split.trained:,} rows to train on{unused}, {split.held} held out"
        + f" (beside {split.copies:,} copies of them, which are left out)"
        * bool(split.copies)
    )
    yield f"      {split.train}\n      {split.heldout}"
    if isinstance(plan, ConfigError):
        yield f"not planned: {plan}"
    else:
        bad = "; ".join(plan.reasons)
        fit = "fits this machine" if plan.verdict == "fits" else f"does not fit this machine ({bad})"
        share = float(found.lengths_E.clip(max=limit).mean()) / limit  # the plan takes every example for the longest
        share *= split.usable / split.trained  # and every row for a good one
        seconds = max(60.0, plan.step_s * (plan.arm.updates or 0) * share)
        yield f"{fit}: {gib(plan.peak)} GiB a device, training about {duration(seconds)} an arm (`eaft plan {recipe}`)"
        if seconds > PATIENCE_S:
            rows = max(batch, min(64, int(TRY_S * split.trained / seconds)))
            fewer = f"data.rows={rows} data.heldout_rows={min(16, split.held)} output=runs/{out.stem}-try"
            yield f"first try, {duration(seconds * rows / split.trained)} an arm: eaft compare {recipe} {fewer}"
    yield f"next: eaft compare {recipe} --dry-run, then without --dry-run"
