"""What the statistics of `eaft analyze` cost: its pass against the same engine's forward pass with a label gather.

`python tests/benchmarks/analyze_pass.py MODEL DATA [--rows 32] [key=value ...]`. Both run on the same micro-batches in
one process, in turns; prints tokens per second (of CPU time on a CPU, which other work does not change) and the ratio
of the medians.
"""

import argparse
import inspect
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from eaft_verl.data.parquet import lengths_of
from eaft_verl.experiment.analyze import configured
from eaft_verl.models import load_tokenizer, resolve_model
from eaft_verl.recipe.datasets import prepare_data
from eaft_verl.recipe.views import objective_of
from eaft_verl.training.sft.inference import token_statistics

ROUNDS = 4


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
    parser.add_argument("overrides", nargs="*")
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        words = [options.data, f"data.rows={options.rows}", *options.overrides, *rest]
        config = configured(options.model, words, Path(folder))
        model = resolve_model(config.model)
        examples = prepare_data(config, load_tokenizer(model), "train").examples
        k, rows = objective_of(config).k, list(range(len(examples)))
        with token_statistics(config, str(model), k) as infer:
            from eaft_verl.training.sft.token_pass import EmitDistribution

            worker = inspect.getclosurevars(infer).nonlocals["worker"]
            hooks = {"forward + label gather": gather_hook(), "eaft analyze": EmitDistribution(k)}
            clock = time.process_time if config.device == "cpu" else time.perf_counter
            took: dict[str, list[float]] = {name: [] for name in hooks}
            for turn in range(ROUNDS + 1):
                for name, hook in hooks.items():
                    worker.set_loss_fn(hook)
                    started = clock()
                    infer(examples, rows)
                    if turn:  # the first warms up
                        took[name].append(clock() - started)
    tokens, trained = int(lengths_of(examples).sum()), int(examples.trained.sum())
    print(f"{tokens} tokens, {trained} trained, {config.device}")
    for name, seconds in took.items():
        print(f"{name:24} {tokens / statistics.median(seconds):10.0f} tokens/s  {sorted(seconds)}")
    plain, ours = (statistics.median(seconds) for seconds in took.values())
    print(f"throughput of the pass / plain forward: {plain / ours:.3f}")


if __name__ == "__main__":
    main()
