"""`eaft train`: a resolved configuration -> a finished run directory, resumed where an earlier attempt stopped."""

import contextlib
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eaft_verl.cluster.doctor import require_disk, require_machine
from eaft_verl.data.parquet import Example, Examples
from eaft_verl.data.prepare import Prepared
from eaft_verl.errors import Interrupted, RunError, require
from eaft_verl.evaluation.meter_probe import meter_probe
from eaft_verl.evaluation.model_files import check_model_files
from eaft_verl.evaluation.settings import evaluation_key
from eaft_verl.experiment.chain import Checkpoint, averaged_of, chain_keys, start_of
from eaft_verl.experiment.derive import Derived, derive
from eaft_verl.experiment.environment import describe, note_change
from eaft_verl.experiment.same_inputs import Again
from eaft_verl.experiment.stored import SHOWN, changeable, forbidden, settings_that_differ
from eaft_verl.experiment.token_stats import base_of, store_base
from eaft_verl.models import check_same_vocabulary, load_config, load_tokenizer, model_key, resolve_model
from eaft_verl.recipe.checks import warn_of
from eaft_verl.recipe.config import Config, as_yaml, changed, plain
from eaft_verl.recipe.datasets import prepare_data
from eaft_verl.recipe.meter import meter_of
from eaft_verl.recipe.model_fit import PACKING, check_model_fits, unpackable
from eaft_verl.recipe.views import anchor_reference, evaluate_settings, objective_of
from eaft_verl.runs import Run, cause_of, is_run, run_name
from eaft_verl.training.grpo.run import train_grpo
from eaft_verl.training.sft.run import check_lengths, check_weights, train_sft


def train(config: Config, declared: list[str], again: Again | None = None) -> Run:
    """Train one arm, or average what was trained; the returned run is finished. A failure is written and raised.

    again: the run whose configuration this is; RunError where its model, data or evaluation are not these.
    """
    require_machine(config)
    model, start, made_of = resolve_model(config.model), start_of(config), averaged_of(config)
    _check_models(config, model, [*([start] if start else []), *made_of])
    tokenizer = load_tokenizer(model)
    data = prepare_data(config, tokenizer, "train")
    heldout = prepare_data(config, tokenizer, "heldout") if config.data.heldout else None
    if not config.average:
        require_disk(config)
    if config.trainer == "sft":
        check_lengths(config, data.examples)
        check_weights(config, data)
    keys = {
        "model": model_key(config.model),
        "data": data.key,
        "template": data.manifest["template_hash"],
        "evaluation": evaluation_key(evaluate_settings(config, heldout.path if heldout else None)),
        **chain_keys(start, made_of),
    }
    derived_here = partial(derive, start=start, made_of=made_of)
    taken = (again.derived if again else derived_here)(config, declared, keys, data.examples)
    config, declared, derived = _fitted(*taken, [data, heldout] if heldout else [data])
    ends = sorted(data.manifest.get("end_of_turn", {}))
    _rehearse(config, str(model), ends)
    run = _open(config, declared, keys, derived)
    with run.locked():
        described = {"end_of_turn": ends, "sources": data.manifest.get("sources", {})}
        run.update(status="running", attempt=run.info.get("attempt", 0) + 1, error=None, **described)
        note_change(run, "train")
        try:
            _work(config, run, (data, heldout), keys, tokenizer, start, made_of)
        except BaseException as error:
            told = _noted(error, config, run)
            raise told from None if told is not error else error.__cause__
    return run


def _check_models(config: Config, model: Path | str, before: Sequence[Checkpoint]) -> None:
    """Every file that is read can be: of the model, of an anchor's reference, of what the arm is made from."""
    reference = anchor_reference(config)
    for one in (model, *([reference] if reference else []), *(made.folder for made in before)):
        check_model_files(resolve_model(one))
    if reference:
        check_same_vocabulary(model, reference)


def _work(
    config: Config,
    run: Run,
    prepared: tuple[Prepared, Prepared | None],
    keys: dict[str, str],
    tokenizer: Any,
    start: Checkpoint | None,
    made_of: Sequence[Checkpoint],
) -> None:
    """What the arm's kind is, done in its open, locked run directory."""
    data, heldout = prepared
    base_model = str(resolve_model(config.model))
    model = str(start.folder) if start else base_model
    if config.average:
        from eaft_verl.experiment.average import average_arm

        run.update(**average_arm(config, run, made_of))
    elif config.trainer == "grpo":
        run.update(**train_grpo(config, run, data, model, tokenizer))
    else:
        base = partial(base_of, config, keys, data.examples, tokenizer)
        if start and "base" in objective_of(config).needs:
            store_base(config, keys, data.examples, tokenizer, base_model)
        probe = _meter_probe(config, base_model, tokenizer)
        return train_sft(config, run, data, heldout.examples if heldout else [], model, keys, base, probe)
    run.update(status="finished", finished=time.time())


def _meter_probe(config: Config, base_model: str, tokenizer: Any) -> Sequence[Example]:
    """The texts of the arm's meter; none without one. The base answers them, wherever the arm starts."""
    if (meter := meter_of(config)) is None:
        return []
    settings, work = evaluate_settings(config), Path(config.output) / "data"
    probe = meter_probe(settings, meter.rows, meter.new_tokens, base_model, tokenizer, work)
    check_lengths(config, probe)
    return probe


def _noted(error: BaseException, config: Config, run: Run) -> BaseException:
    """What is told of an error, which run.json keeps."""
    from eaft_verl.training.failures import explained  # with it comes Ray

    told = explained(error, config, run)
    stopped = isinstance(told, Interrupted | KeyboardInterrupt)
    with contextlib.suppress(OSError):  # a full disk: whoever started this process tries again
        run.update(status="interrupted" if stopped else "failed", error=cause_of(told))
    return told


def _rehearse(config: Config, model: str, ends: list[str]) -> None:
    """Print what exports will have to repair of the base model's files; ConfigError for what they cannot."""
    from eaft_verl.training.export import rehearse  # torch takes seconds

    if notes := rehearse(model, ends):
        require(
            config.trainer == "sft",
            f"model={config.model!r}: {notes[0].partition(':')[0]}, and verl saves it as it is in a GRPO arm; mend the "
            "model's generation_config.json (a sampling setting needs do_sample: true)",
        )
        warn_of(notes)


def _fitted(config: Config, declared: list[str], derived: dict[str, Any], prepared: list[Prepared]) -> Derived:
    """The configuration as the model can be trained, what was changed recorded as derived; its notes are printed."""
    sets = [one.examples for one in prepared]
    longest = [int(one.lengths.max(initial=0)) for one in sets]
    notes = check_model_fits(config, longest, max(map(_largest_id, sets)))
    warn_of(notes)
    if not config.verl.model.use_remove_padding or not unpackable(load_config(resolve_model(config.model))):
        return Derived(config, declared, derived)
    asked = {**derived.get("asked", {}), PACKING: True}
    return Derived(changed(config, {PACKING: False}), sorted({*declared, PACKING}), {**derived, "asked": asked})


def _largest_id(examples: Examples) -> int:
    """The largest token id, read from the memory map; -1 where there is none."""
    import pyarrow.compute as pc

    chunks = [chunk.flatten() for chunk in examples.table.column("input_ids").chunks]
    return max((pc.max(ids).as_py() for ids in chunks if len(ids)), default=-1)


def _open(config: Config, declared: list[str], keys: dict[str, str], derived: dict[str, Any]) -> Run:
    """A new run directory, or the unfinished one of the same configuration, data and model."""
    folder = Path(config.output) / run_name(config.arm, config.seed)
    info = {"kind": "arm", "recipe": config.name, "arm": config.arm, "seed": config.seed, "model": config.model}
    info |= {"keys": keys, "declared": declared, "objective": plain(config.objective), "derived": derived}
    if not (is_run(folder) or (folder / "config.yaml").exists()):
        return Run.create(folder, info=info, config=as_yaml(config), env=describe())
    run = Run.describe(folder, status="failed", rebuilt=True, **info) if not _described(folder) else Run(folder)
    if run.info["status"] == "finished":
        raise RunError(
            f"{folder} holds a finished run, which is never overwritten; choose another output= or remove it"
        )
    before = run.info["keys"]
    changed = [f"{name} ({before.get(name)}, now {keys[name]})" for name in keys if before.get(name) != keys[name]]
    found = settings_that_differ(run.config, plain(config))
    if forbidden(run, config, found) or changed:
        ways = "choose another output= or remove it"
        if not changed and all(map(changeable, found)):
            ways += "; or add resume=changed to go on with this from the newest state, which run.json will say"
        raise RunError(
            f"{folder} holds an unfinished run of another configuration, model or data set: "
            f"{'; '.join((found + changed)[:SHOWN])}; {ways}"
        )
    if found:
        run.change_config(as_yaml(config))
        before = run.info.get("changes", [])
        run.update(changes=[*before, {"attempt": run.info.get("attempt", 0) + 1, "settings": found}])
    return run


def _described(folder: Path) -> bool:
    """Whether the folder's run.json can be read; where it cannot, all that it said is known from what is asked for."""
    try:
        return bool(Run(folder).info["keys"])
    except (RunError, KeyError, TypeError):
        print(f"eaft: warning: {folder}/run.json is damaged or missing and is written anew", file=sys.stderr)
        return False
