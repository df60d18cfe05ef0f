"""What the statistics of `eaft analyze` cost: its pass against the plain forward pass of the same model.

`python tests/benchmarks/analyze_pass.py MODEL DATA [--rows 32] [--turn 4] [--rounds 4] [key=value ...]`. All run in one
process on the same engine, threads, dtype and packed micro-batches, in turns of a few rows:

plain         the logits of every token, and of each the label's: no softmax, and every row by itself.
statistics    what the workers of `eaft analyze` give back instead.
store         the whole pass: the same, roles and sources, written as a store.

Prints tokens per second of CPU time and of the wall clock (of a GPU the latter counts, and on a machine that does other
work the former) over all turns, and the ratio to `plain` with its interval.
"""

import argparse
import contextlib
import inspect
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from eaft_verl.data.parquet import Example, lengths_of
from eaft_verl.experiment.analyze import configured
from eaft_verl.experiment.token_stats import fill, identity
from eaft_verl.models import load_tokenizer, resolve_model
from eaft_verl.recipe.datasets import prepare_data
from eaft_verl.recipe.views import objective_of
from eaft_verl.training.sft.inference import token_statistics


def gather_hook() -> Any:
    """The least that a pass over logits can do: the label's logit."""
    import torch

    from eaft_verl.training.sft.loss import LogitsHook, local_shard, shifted

    class Gather(LogitsHook):
        def _statistics(self, logits_TV: Any, data: Any) -> dict[str, Any]:
            labels_T = local_shard(shifted(data)[0], data)
            return {"logit": logits_TV.gather(-1, labels_T[:, None]).squeeze(-1)[None]}

        def _loss(self, model_output: Any, data: Any) -> Any:
            return torch.zeros(())

    return Gather()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--turn", type=int, default=4, help="rows of a turn")
    parser.add_argument("--rounds", type=int, default=4)
    options, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        config = configured(options.model, [options.data, f"data.rows={options.rows}", *words], Path(folder))
        model = resolve_model(config.model)
        tokenizer = load_tokenizer(model)
        examples = prepare_data(config, tokenizer, "train").examples
        k, stores = objective_of(config).k, itertools.count()
        meta = identity(config, {"model": "m", "data": "d", "template": "t"}, k, examples)
        turns = [examples[start : start + options.turn] for start in range(0, len(examples), options.turn)]
        with token_statistics(config, str(model), k) as infer, contextlib.redirect_stderr(io.StringIO()):
            from eaft_verl.training.sft.token_pass import EmitDistribution

            worker = inspect.getclosurevars(infer).nonlocals["worker"]

            def alone(hook: Any, chosen: Sequence[Example]) -> None:
                worker.set_loss_fn(hook)
                infer(chosen, list(range(len(chosen))))

            def store(chosen: Sequence[Example]) -> None:
                worker.set_loss_fn(EmitDistribution(k))
                path = Path(folder) / f"store{next(stores)}"
                fill(path, meta, chosen, tokenizer, len(chosen), partial(infer, chosen))

            def plain(chosen: Sequence[Example]) -> None:
                by_itself = "eaft_verl.training.sft.fused_head.each_once"  # what rows share goes through once otherwise
                with mock.patch(by_itself, lambda module, inputs, offsets: inputs):
                    alone(gather_hook(), chosen)

            passes: dict[str, Callable[[Sequence[Example]], None]] = {
                "plain": plain,
                "statistics": partial(alone, EmitDistribution(k)),
                "store": store,
            }
            took = _in_turns(passes, [turns[0], *turns * options.rounds])
    tokens, trained = int(lengths_of(examples).sum()), int(examples.trained.sum())
    print(
        f"{tokens} tokens, {trained} trained, {config.device}, {len(took['CPU']['plain'])} turns of {options.turn} rows"
    )
    for clock, seconds in took.items():
        for name, each in seconds.items():
            low, high = _interval(seconds["plain"], each)
            print(
                f"{clock:5} {name:11} {tokens * options.rounds / sum(each):7.0f} tokens/s, throughput / plain "
                f"{sum(seconds['plain']) / sum(each):.3f} ({low:.3f} to {high:.3f})"
            )


def _in_turns(
    passes: dict[str, Callable[[Sequence[Example]], None]], turns: Sequence[Sequence[Example]]
) -> dict[str, dict[str, list[float]]]:
    """{clock: {pass: seconds of each turn}}; the first turn warms up."""
    clocks = {"CPU": time.process_time, "wall": time.perf_counter}
    took: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in passes} for clock in clocks}
    for number, chosen in enumerate(turns):
        for name, run in passes.items():
            started = {clock: read() for clock, read in clocks.items()}
            run(chosen)
            if number:
                for clock, read in clocks.items():
                    took[clock][name].append(read() - started[clock])
    return took


def _interval(plain: Sequence[float], own: Sequence[float]) -> tuple[float, float]:
    """Of the ratio of the sums, 95 %: turns resampled in pairs."""
    pairs_N2 = np.array([plain, own]).T
    drawn_RN = np.random.default_rng(0).integers(len(pairs_N2), size=(2000, len(pairs_N2)))
    sums_R2 = pairs_N2[drawn_RN].sum(axis=1)
    low, high = np.quantile(sums_R2[:, 0] / sums_R2[:, 1], [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    main()
