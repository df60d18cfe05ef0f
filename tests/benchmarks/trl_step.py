"""TRL's SFTTrainer, one update for every line on stdin: what step_time.py runs beside the others, in TRL's environment.

python trl_step.py MODEL DTYPE ATTENTION CHECKPOINTING: the first line are the rows, [{"input_ids", "labels"}], all in
every update. Prints {seconds, cpu_seconds, bytes} for each line after that; bytes: the peak on a GPU, else 0.
"""

import json
import sys
import tempfile
import time
from typing import Any


def main(model: str, dtype: str, attention: str, checkpointing: str) -> None:
    """Train until stdin ends."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    gpu = torch.cuda if torch.cuda.is_available() else None

    class Turns(TrainerCallback):
        """Waits for its turn before an update and says afterwards what it took."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not sys.stdin.readline():
                sys.exit(0)
            if gpu:
                gpu.synchronize()
                gpu.reset_peak_memory_stats()
            self.started = time.perf_counter(), time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if gpu:
                gpu.synchronize()
            wall, cpu = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
            peak = gpu.max_memory_allocated() if gpu else 0
            print(json.dumps({"seconds": wall, "cpu_seconds": cpu, "bytes": peak}), file=told, flush=True)

    told, sys.stdout = sys.stdout, sys.stderr  # the trainer prints too
    data = Dataset.from_list(json.loads(sys.stdin.readline()))
    args = SFTConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=len(data),
        max_steps=10**6,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        bf16=dtype == "bf16",
        use_cpu=gpu is None,
        gradient_checkpointing=checkpointing == "1",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        logging_steps=10**6,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        shuffle_dataset=False,
    )
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation=attention)
    tokenizer = AutoTokenizer.from_pretrained(model)
    SFTTrainer(loaded, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[Turns()]).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
