"""python vllm_run.py FOLDER BACKEND LIMIT MODEL...: the models evaluated one after the other, engines counted.

Writes FOLDER/answers.json: {step: {question: answer}, engines: the most at any time, left: those at the end}.
"""

import json
import sys
import threading
from pathlib import Path

import psutil

from eaft_verl.evaluation.checkpoints import evaluate_checkpoints
from eaft_verl.evaluation.settings import EvaluateSettings
from eaft_verl.runs import Run

ENGINE = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 16}


def engines() -> int:
    """Processes below this one that are vLLM's engine."""
    count = 0
    for child in psutil.Process().children(recursive=True):
        try:
            count += "EngineCore" in " ".join([child.name(), *child.cmdline()])
        except psutil.Error:
            continue
    return count


def main() -> None:
    folder, backend, limit, *models = sys.argv[1:]
    seen, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            seen.append(engines())

    threading.Thread(target=watch, daemon=True).start()
    given = ENGINE if backend == "vllm" else {}
    settings = EvaluateSettings(
        target=["sums", "products"], backend=backend, backend_args=given, max_length=256, limit=int(limit)
    )
    run = Run.create(Path(folder) / "run", info={"kind": "arm", "arm": "sft"}, config="", env={})
    checkpoints = {step: Path(model) for step, model in enumerate(models, 1)}
    evaluate_checkpoints(run, checkpoints, settings, models[0], Path(folder) / "work", len(models))
    done.set()
    answers = {
        step: {
            f"{task}:{row['id']}": row["response"] for task in ("sums", "products") for row in run.samples(step, task)
        }
        for step in checkpoints
    }
    found = {"answers": answers, "engines": max(seen), "left": engines()}
    (Path(folder) / "answers.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
