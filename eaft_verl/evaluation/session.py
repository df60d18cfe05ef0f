"""What the evaluation of a run's checkpoints shares: the run, its settings, what was read once, the model held."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from eaft_verl.evaluation.settings import EvaluateSettings
from eaft_verl.runs import Run

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from eaft_verl.data.parquet import Example
    from eaft_verl.evaluation.benchmarks import Benchmark


@dataclass
class Session:
    """What one call of evaluate_checkpoints shares between its steps."""

    run: Run
    settings: EvaluateSettings
    base: Path | str
    work: Path
    benchmarks: dict[str, "Benchmark"] = field(default_factory=dict)
    heldout: Sequence["Example"] = ()
    probes: dict[str, tuple[Sequence["Example"], list["Tensor"]]] = field(
        default_factory=dict
    )  # with the base's logits
    loaded: tuple[Path | str, "PreTrainedModel", "PreTrainedTokenizerBase"] | None = None
    mark: float = field(default_factory=time.perf_counter)

    @property
    def of_base(self) -> bool:
        """Whether the run is the base model's: what is evaluated has then not been trained."""
        return self.run.info["kind"] == "base"

    @property
    def token_budget(self) -> int:
        """Padded tokens of a forward pass."""
        from eaft_verl.evaluation.teacher_forced import TOKEN_BUDGET

        given = self.settings.backend_args if self.settings.backend == "hf" else {}
        return given.get("token_budget", TOKEN_BUDGET)

    def model(self, path: Path | str) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
        """The checkpoint and its tokenizer; one model is held at a time, the last one is kept."""
        from eaft_verl.evaluation import loading

        if self.loaded is None or self.loaded[0] != path:
            self.free()
            self.loaded = (path, *loading.load_model(path, self.settings))
        return self.loaded[1:]

    def free(self) -> None:
        """Release the held model."""
        from eaft_verl.evaluation import loading

        self.loaded = None
        loading.release()

    def book_time(self) -> None:
        """Add the seconds since the last call to run.json, so that a killed evaluation has booked what it did."""
        now = time.perf_counter()
        self.run.update(eval_seconds=round(self.run.info.get("eval_seconds", 0.0) + now - self.mark, 3))
        self.mark = now
