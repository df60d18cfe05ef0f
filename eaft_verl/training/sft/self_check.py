"""The model computes what it should, on the user's own rows, before the first step.

A few rows go through the engine packed together, then one by one, then packed behind other tokens, and through a plain
forward pass of transformers. Packing must change nothing: attention that overlooks where a row begins, or a state that
is carried over, trains every row on what stood before it, and no loss would show it.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eaft_verl.data.parquet import Example, lengths_of
from eaft_verl.errors import Diverged, RunError
from eaft_verl.recipe.config import Config
from eaft_verl.training.sft.batches import make_batch
from eaft_verl.training.sft.loss import BATCH_FLAGS

ROWS, LENGTH = 4, 128  # of the data, and the first tokens of each
SMALLEST = 8  # tokens of a row
LARGEST = 4e9  # weights of a model that is loaded a second time
SHARE = 0.5  # of the free memory that the second model may take
EPS = {"fp32": 2.0**-23, "float32": 2.0**-23, "bf16": 2.0**-8, "bfloat16": 2.0**-8, "fp16": 2.0**-11}
EPS["float16"] = EPS["fp16"]
LOGIT = 45.0  # eps times this is allowed: of 20 small models the largest seen in bfloat16 was eps times 17
FLOOR = 1e-3  # nats: float32, where 5e-6 was seen; and what other tokens before a row may change, where 0 was


@dataclass(frozen=True)
class SelfCheck:
    """Mean NLL of the rows, nats per token, three ways; the largest mean difference of a row; what is allowed.

    leak: how much a row changes with the tokens before it, of which noise is what changes without any reason.
    """

    rows: int
    tokens: int
    packed: float
    single: float
    plain: float | None
    leak: float
    noise: float
    difference: float
    plain_difference: float | None
    tolerance: float
    skipped: str

    @property
    def line(self) -> str:
        """For the terminal."""
        plain = plain_said(self.plain, self.skipped)
        return (
            f"self-check: {self.rows} rows, {self.tokens} tokens: NLL packed {self.packed:.5f}, one by one "
            f"{self.single:.5f}, {plain}; a row differs by {max(self.difference, self.plain_difference or 0):.2g} "
            f"({self.tolerance:.2g} allowed), by {self.leak:.2g} with other tokens before it"
        )


def plain_said(plain: float | None, skipped: str) -> str:
    """What the line says of the plain pass."""
    return f"plain transformers {plain:.5f}" if plain is not None else f"no plain pass: {skipped}"


def known(found: Any) -> dict[str, Any]:
    """The fields of a check that have a value, for run.json."""
    return {name: value for name, value in asdict(found).items() if value not in (None, "")}


def self_check(config: Config, group: Any, examples: Sequence[Example], model: str) -> dict[str, Any]:
    """Check, print the line, and return it for run.json; RunError with both numbers and the remedy for a mismatch."""
    rows = chosen(examples)
    if len(rows) < 2:
        return {"skipped": f"no two rows of {SMALLEST} tokens"}
    shared = {row.id: shared_with(row, [other for other in rows if other is not row]) for row in rows}
    rows.sort(key=lambda row: shared[row.id] - len(row.input_ids))  # first the one with the most tokens of its own
    copies = _ranks(config, group)
    packed, single = (engine_nll(group, rows, together, copies) for together in (len(rows), 1))
    behind = [number for number in range(len(packed)) if number % len(rows)]  # all but the first of each pack
    other = [reversed_row(rows[0], shared[rows[0].id]), *rows[1:]]
    leak = apart(packed, engine_nll(group, other, len(rows), copies), behind)
    noise = apart(packed, engine_nll(group, rows, len(rows), copies), behind) if leak > FLOOR else 0.0
    plain, skipped = group.plain_nll(model, [list(row.input_ids) for row in rows], SHARE, adapter=True)[0]
    found = SelfCheck(
        rows=len(rows),
        tokens=sum(map(len, packed[: len(rows)])),
        packed=mean_of(packed),
        single=mean_of(single),
        plain=mean_of(plain) if plain else None,
        leak=leak,
        noise=noise,
        difference=apart(packed, single),
        plain_difference=apart(single, plain * copies) if plain else None,
        tolerance=tolerance(_precision(config)),
        skipped=skipped,
    )
    print(f"eaft: {found.line}", flush=True)
    require_equal(found, packing=config.verl.model.use_remove_padding)
    return known(found)


def check_export(config: Config, group: Any, examples: Sequence[Example], folder: str, dtype: str) -> None:
    """RunError where an exported folder, loaded again, is not the model in the engine, as far as memory lets us see;
    Diverged where that model has no finite loss on its own data."""
    rows = chosen(examples)[:2]
    plain, _ = group.plain_nll(folder, [list(row.input_ids) for row in rows], SHARE, adapter=False)[0]
    if not plain:
        return
    copies, allowed = _ranks(config, group), max(tolerance(_precision(config)), tolerance(dtype))
    single = engine_nll(group, rows, 1, copies)
    if not math.isfinite(mean_of(single)):
        raise Diverged(
            f"the trained model's NLL of its own data is {mean_of(single)}: nothing is exported. Choose a lower "
            "verl.optim.lr, and choose another output="
        )
    if not (difference := apart(single, plain * copies)) <= allowed:
        raise RunError(
            f"{folder} is not the model that was trained: NLL {mean_of(plain):.5f} loaded again, {mean_of(single):.5f} "
            f"in the engine; a row differs by {difference:.2g} (allowed {allowed:.2g}). The export is removed, the "
            "state kept"
        )


def _ranks(config: Config, group: Any) -> int:
    return int(group.world_size // config.verl.engine.ulysses_sequence_parallel_size)


def _precision(config: Config) -> str:
    return str((config.verl.engine.mixed_precision or {}).get("param_dtype", "bf16"))


def chosen(examples: Sequence[Example]) -> list[Example]:
    """The first LENGTH tokens of ROWS rows, evenly spaced in the data, every token but the first predicted."""
    usable = [index for index, length in enumerate(lengths_of(examples).tolist()) if length >= SMALLEST]
    places = sorted({usable[number * len(usable) // ROWS] for number in range(ROWS)} if usable else ())
    found = []
    for index in places:
        ids = list(examples[index].input_ids)[:LENGTH]
        found.append(Example(examples[index].id, [], ids, [0] + [1] * (len(ids) - 1)))
    return found


def shared_with(row: Example, others: Sequence[Example]) -> int:
    """Tokens that it begins with and one of the others too."""
    pairs = (zip(row.input_ids, other.input_ids, strict=False) for other in others)
    return max(sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], pair)) for pair in pairs)


def reversed_row(row: Example, after: int) -> Example:
    """Other tokens in its place, as many; the first `after` stay, so that rows which share them share them still."""
    ids = list(row.input_ids)
    return Example(row.id, [], ids[:after] + ids[after:][::-1], row.loss_mask)


def engine_nll(group: Any, rows: Sequence[Example], together: int, ranks: int) -> list[Tensor]:
    """NLL [L - 1] of every row on every data-parallel rank, `together` rows in a micro-batch."""
    layout = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": together}
    batch = make_batch(rows, list(range(len(rows))) * ranks, {**BATCH_FLAGS, **layout})
    return [nll[:-1].double() for nll in group.infer_batch(batch).get()["nll"].unbind()]


def tolerance(dtype: str) -> float:
    """Nats by which the mean NLL of a row may differ between two ways of computing it in a dtype.

    A logit comes with an error of some eps times its size, and the NLL adds the label's to the others' average. The
    errors of tokens have either sign, so their absolute mean is compared. float32 is limited by FLOOR instead.
    """
    return max(FLOOR, LOGIT * EPS.get(dtype, 2.0**-8))


def require_equal(found: SelfCheck, *, packing: bool) -> None:
    """RunError for the first comparison that is not within tolerance."""
    remedy = (
        "set verl.model.use_remove_padding=false, which pads instead of packing"
        if packing
        else "set verl.data.use_dynamic_bsz=false and verl.data.micro_batch_size_per_gpu=1"
    )
    allowed = FLOOR + 3 * found.noise
    if not (found.difference <= found.tolerance and found.leak <= allowed):
        raise RunError(
            f"self-check: the model lets rows of one micro-batch see each other: NLL {found.packed:.5f} together, "
            f"{found.single:.5f} one by one; a row differs by {found.difference:.2g} (allowed {found.tolerance:.2g}) "
            f"and by {found.leak:.2g} when only the tokens before it change (allowed {allowed:.2g}): {remedy}"
        )
    if found.plain_difference is not None and not found.plain_difference <= found.tolerance:
        raise RunError(
            f"self-check: the engine computes another model than transformers does: NLL {found.single:.5f} and "
            f"{found.plain:.5f}, a row differs by {found.plain_difference:.2g} (allowed {found.tolerance:.2g}): set "
            "verl.model.override_config.attn_implementation=eager, or leave out use_liger and external_lib"
        )


def plain_nll(
    model: str, config: Any, adapter: str | None, rows: Sequence[Sequence[int]], device: Any, free: float
) -> tuple[list[Tensor], str]:
    """NLL [L - 1] of each row by transformers alone, in float32, or none and why.

    config: the configuration that the engine uses; free: bytes that a second model may take.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > LARGEST or 4 * size > free:
        return [], f"{size / 1e9:.3g} billion weights in float32 and {max(free, 0) / 2**30:.3g} GiB for them"
    found: Any = AutoModelForCausalLM.from_pretrained(
        model, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    if adapter:
        from peft import PeftModel

        found = PeftModel.from_pretrained(found, str(Path(adapter).expanduser()))
    found.to(device).eval()
    nlls = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([list(row)], device=device)
            logits = found(input_ids=ids, use_cache=False).logits[0, :-1].double()
            nlls.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").cpu())
    return nlls, ""


def mean_of(nlls: Sequence[Tensor]) -> float:
    """Over all tokens of all rows."""
    return torch.cat(list(nlls)).mean().item()


def apart(first: Sequence[Tensor], second: Sequence[Tensor], numbers: Sequence[int] | None = None) -> float:
    """The largest mean difference of a row, over these rows."""
    places = range(len(first)) if numbers is None else numbers
    return max((first[number] - second[number]).abs().mean().item() for number in places)
