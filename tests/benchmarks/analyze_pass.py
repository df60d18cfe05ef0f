"""What the statistics of `eaft analyze` cost: its pass against the plain forward pass of the same model.

`python tests/benchmarks/analyze_pass.py MODEL DATA [--rows 32] [--rounds 4] [key=value ...]`. All run in one process
on the same engine, threads, dtype and packed micro-batches, in turns:

plain         the logits of every token, and of each the label's: no softmax.
statistics    what the workers of `eaft analyze` give back instead.
store         the whole pass: the same, roles and sources, written as a store.

Prints tokens per second of CPU time and of the wall clock (of a GPU the latter counts, and on a machine that does other
work the former), each by the median over rounds, with the ratio to `plain` of each round.
"""

import argparse
import inspect
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from eaft_verl.data.parquet import lengths_of
from eaft_verl.experiment.analyze import configured
from eaft_verl.experiment.token_stats import fill, identity
from eaft_verl.models import load_tokenizer, resolve_model
from eaft_verl.recipe.datasets import prepare_data
from eaft_verl.recipe.views import objective_of
from eaft_verl.training.sft.inference import token_statistics
from eaft_verl.training.sft.order import sequential_batches

KEYS = {"model": "m", "data": "d", "template": "t"}


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
    parser.add_argument("--rounds", type=int, default=4)
    options, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        config = configured(options.model, [options.data, f"data.rows={options.rows}", *words], Path(folder))
        model = resolve_model(config.model)
        tokenizer = load_tokenizer(model)
        examples = prepare_data(config, tokenizer, "train").examples
        k, size = objective_of(config).k, config.verl.data.train_batch_size
        meta, stores = identity(config, KEYS, k, examples), iter(range(options.rounds + 1))
        with token_statistics(config, str(model), k) as infer:
            from eaft_verl.training.sft.token_pass import EmitDistribution

            worker = inspect.getclosurevars(infer).nonlocals["worker"]

            def alone(hook: Any) -> None:
                worker.set_loss_fn(hook)
                for indices in sequential_batches(len(examples), size):
                    infer(examples, indices)

            def store() -> None:
                worker.set_loss_fn(EmitDistribution(k))
                fill(Path(folder) / f"store{next(stores)}", meta, examples, tokenizer, size, partial(infer, examples))

            passes = {
                "plain": partial(alone, gather_hook()),
                "statistics": partial(alone, EmitDistribution(k)),
                "store": store,
            }
            took = _in_turns(passes, options.rounds)
    tokens, trained = int(lengths_of(examples).sum()), int(examples.trained.sum())
    print(f"{tokens} tokens, {trained} trained, {config.device}")
    for clock, seconds in took.items():
        for name, each in seconds.items():
            ratios = [plain / own for plain, own in zip(seconds["plain"], each, strict=True)]
            print(
                f"{clock:5} {name:11} {tokens / statistics.median(each):7.0f} tokens/s, "
                f"throughput / plain {statistics.median(ratios):.3f}  {[round(ratio, 3) for ratio in sorted(ratios)]}"
            )


def _in_turns(passes: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """{clock: {pass: seconds of each round}}; a round before them warms up."""
    clocks = {"CPU": time.process_time, "wall": time.perf_counter}
    took: dict[str, dict[str, list[float]]] = {name: {each: [] for each in passes} for name in clocks}
    for turn in range(rounds + 1):
        for name, run in passes.items():
            started = {clock: read() for clock, read in clocks.items()}
            run()
            if turn:
                for clock, read in clocks.items():
                    took[clock][name].append(read() - started[clock])
    return took


if __name__ == "__main__":
    main()
