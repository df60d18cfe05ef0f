"""Numbers that are not finite, memory and disks that are full, graders and servers that hang."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eaft_verl.runs import Run

from .matrix import ARM, STEPS, Lab, Outcome, fault
from .stops import assert_one_line, family, info, orphans

NO_MEMORY, DISK_FULL, HUNG, DIVERGED = 4, 5, 6, 7
GRPO = """
model: {model}
output: {folder}/out
device: cpu
data: {{train: {folder}/questions.jsonl, max_length: 48}}
reward: {{grader: "grpo_fixtures:digit_share", seconds: 1}}
evaluate: {{target: [sums], points: 2}}
compare: {{match: none}}
verl:
  engine: {{mixed_precision: {{param_dtype: fp32, reduce_dtype: fp32}}}}
  optim: {{lr: 1.0e-2, lr_scheduler_type: constant, lr_warmup_steps_ratio: 0.0}}
  data: {{train_batch_size: 4, max_token_len_per_gpu: 1024}}
  trainer: {{total_training_steps: 8}}
arms:
  eaft: {{trainer: grpo, verl: {{data: {{max_response_length: 16}}}}}}
"""


def grpo(lab: Lab) -> dict[str, str]:
    """The laboratory with a GRPO arm of the same name; variables for its commands."""
    fixtures = Path(__file__).parents[1] / "training" / "grpo"
    sys.path.insert(0, str(fixtures))
    import grpo_fixtures

    lab.model = grpo_fixtures.character_model(lab.folder / "characters")
    grpo_fixtures.write_questions(lab.folder / "questions.jsonl", 32)
    lab.write_recipe(GRPO)
    return {"PYTHONPATH": f"{Path(__file__).parents[2]}:{fixtures}", "LAB": str(lab.run)}


@fault("a row whose gradient overflows, once an epoch", "those updates skipped, counted, rows named", slow=True)
def _one_bad_row(lab: Lab) -> Outcome:
    for name, weight in (("train", 1e38), ("heldout", 1)):  # row 6 is in steps 3, 7, 11, 14 and 17
        file = lab.folder / f"{name}.jsonl"
        rows = [json.loads(line) | {"weight": 1} for line in file.read_text().splitlines()]
        rows[min(6, len(rows) - 1)]["weight"] = weight
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = lab.train("data.columns={weight: weight}")
    assert seen.code == 0, seen.said
    bad = [row["step"] for row in lab.rows() if row["grad_norm"] == "inf" or row["grad_norm"] == "nan"]
    assert len(bad) == 5 and info(lab)["skipped_steps"] == 5, bad
    assert seen.said.count("update skipped (1 of at most 5 in a row)") == 5
    for step in bad:
        kept = json.loads((lab.run / "nonfinite" / f"step_{step:06d}.json").read_text())
        assert 6 in [row["row"] for row in kept["rows"]] and len(kept["rows"]) == 4
    lr = [row["lr"] for row in lab.rows()]
    assert all(lr[step] == lr[step - 1] for step in bad), "the rate went on without an update"
    assert len(set(lr)) >= STEPS - 5
    return Outcome("5 of 20 updates skipped, finished")


@fault("lr=1e9, 4 steps in all", "never finished: exit 7", slow=True)
def _few_bad_steps(lab: Lab) -> Outcome:
    seen = lab.train("verl.optim.lr=1e9", "verl.trainer.total_epochs=1", "verl.optim.lr_warmup_steps_ratio=0")
    assert seen.code == DIVERGED, seen.said
    line = assert_one_line(seen.said)
    assert "choose another output=" in line and info(lab)["status"] == "failed"
    return Outcome(f"exit 7: {line}"[:100])


@fault("lr=1e9, then the same command twice more", "exit 7 at the same step each time", slow=True)
def _no_further_by_repetition(lab: Lab) -> Outcome:
    steps = []
    for _ in range(2):
        seen = lab.train("verl.optim.lr=1e9", "verl.optim.lr_warmup_steps_ratio=0")
        assert seen.code == DIVERGED and "choose another output=" in assert_one_line(seen.said), seen.said
        steps.append(len(lab.rows()))
    assert steps[0] == steps[1] < STEPS, steps
    return Outcome(f"exit 7 at step {steps[0]}, twice")


@fault("a NaN in the base model's weights", "refused; the model and the weight are named", slow=True)
def _broken_base(lab: Lab) -> Outcome:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    broken = lab.folder / "broken"
    model = AutoModelForCausalLM.from_pretrained(lab.model, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(lab.model).save_pretrained(broken)
    seen = lab.train(f"model={broken}")
    line = assert_one_line(seen.said)
    assert seen.code == 2 and str(broken) in line and "layers.1.mlp.up_proj" in line, seen.said
    return Outcome(f"exit 2: {line}"[:100])


@fault("a micro-batch that does not fit", "exit 4 with a smaller one to try, which is accepted", slow=True)
def _out_of_memory(lab: Lab) -> Outcome:
    own = "objective.name='tests.faults.broken_objectives:NoMemory'"
    seen = lab.train(own, "verl.data.max_token_len_per_gpu=2048")
    line = assert_one_line(seen.said)
    assert seen.code == NO_MEMORY and "up to 2048 tokens" in line, seen.said
    tried = line.partition("try ")[2].partition(";")[0]
    assert tried == "verl.data.max_token_len_per_gpu=1024"
    again = lab.train(own, tried)
    assert again.code == NO_MEMORY and "up to 1024 tokens" in again.last_line, "the override was not accepted"
    return Outcome(f"exit 4: {line}"[:100])


@fault("a worker raises what nobody foresaw", "one line; the traceback is in the file it names", slow=True)
def _worker_raises(lab: Lab) -> Outcome:
    seen = lab.train("objective.name='tests.faults.broken_objectives:Faulty'")
    line = assert_one_line(seen.said)
    file = lab.run / "failures" / "attempt_1.txt"
    assert seen.code == 1 and "IndexError: index out of range in self" in line and str(file) in line, seen.said
    assert "broken_objectives.py" in file.read_text()
    return Outcome(f"exit 1: {line}"[:100])


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 64 MiB; skipped where it may not be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@fault("the disk is full at step 5, then there is room", "one line, exit 5; goes on exactly", slow=True)
def _disk_full(lab: Lab) -> Outcome:
    lab.whole()  # before there is a mount in the way
    with small_disk(lab.out):
        with lab.started("train", lab.recipe, "--arm", ARM, LAB=str(lab.run)) as process:
            lab.wait_for_step(process, 5)
            with contextlib.suppress(OSError), (lab.out / "ballast").open("wb") as stream:
                while True:
                    stream.write(bytes(1 << 16))
            code, said = process.wait(timeout=600), lab.said(process)
        assert code == DISK_FULL and "no space left while writing" in assert_one_line(said), said
        (lab.out / "ballast").unlink()
        again = lab.train()
        assert again.code == 0, again.said
        lab.assert_exact()
    return Outcome("exit 5; resumed from step 4, every row equal", lost=1)


@fault("GRPO: the grader hangs, on demonstrations too", "refused before work, after three rows", slow=True)
def _grader_that_always_hangs(lab: Lab) -> Outcome:
    (lab.folder / "hanging.py").write_text("import time\ndef grade(response, answer):\n    time.sleep(1e9)\n")
    env = grpo(lab)
    env["PYTHONPATH"] += f":{lab.folder}"
    seen = lab.train("reward.grader='hanging:grade'", **env)
    line = assert_one_line(seen.said)
    assert seen.code == 2 and "hangs or crashes on 3 demonstrations one after the other" in line, seen.said
    assert not lab.rows() and not orphans(lab.run)
    return Outcome(f"exit 2: {line}"[:100])


@fault("GRPO: every grade of an answer is a timeout", "ends after the first step that shows it", slow=True)
def _hanging_grader(lab: Lab) -> Outcome:
    hangs = "import time\ndef grade(response, answer):\n    return 1.0 if response == answer else time.sleep(1e9)\n"
    (lab.folder / "hanging.py").write_text(hangs)
    env = grpo(lab)
    env["PYTHONPATH"] += f":{lab.folder}"
    small = ("verl.actor_rollout_ref.rollout.n=2", "verl.data.train_batch_size=2")
    seen = lab.train("reward.grader='hanging:grade'", *small, **env)
    line = assert_one_line(seen.said)
    assert seen.code == 2 and "none of 4 responses could be graded: 4 times the grader hung" in line, seen.said
    assert not orphans(lab.run)
    return Outcome(f"exit 2: {line}"[:100])


@fault("GRPO: the rollout server is stopped for ever", "exit 6, the silent server named", slow=True)
def _hung_server(lab: Lab) -> Outcome:
    with lab.started("train", lab.recipe, "--arm", ARM, **grpo(lab), EAFT_HANG_SECONDS="90") as process:
        lab.wait_for_step(process, 2)
        (server,) = family(process, "ray::HfServer")
        server.suspend()
        code, said, left = process.wait(timeout=600), lab.said(process), orphans(lab.run)
    line = assert_one_line(said)
    assert code == HUNG and f"(pid {server.pid} on" in line and not left, (code, said, left)
    assert "HfServer" in line and len(list((lab.run / "stacks").glob("*--*.txt"))) >= 4
    return Outcome(f"exit 6: {line}"[:100])


@fault("GRPO: Ctrl-C at step 3 of 8 with default saves", "saved, 130; the same command goes on", slow=True)
def _grpo_ctrl_c(lab: Lab) -> Outcome:
    env = grpo(lab)
    with lab.started("train", lab.recipe, "--arm", ARM, **env) as process:
        lab.wait_for_step(process, 3)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        code, said, left = process.wait(timeout=600), lab.said(process), orphans(lab.run)
        seconds = time.monotonic() - started
    step = len(lab.rows())
    assert code == 130 and f"Ctrl-C: {lab.run} is saved at step {step} of 8" in assert_one_line(said), said
    assert not left and Run(lab.run).info["status"] == "interrupted"
    before = lab.rows()
    assert (seen := lab.train(**env)).code == 0, seen.said
    assert lab.rows()[:step] == before and len(lab.rows()) == 8
    return Outcome(f"130 after {seconds:.0f} s; goes on", lost=0)


METER = "meter={every: 3, rows: 4, new_tokens: 8, alarm: {kl: 1.0e-6}}"


@fault(
    "killed at update 10 while the forgetting meter reads, resumed on two workers",
    "the training without a meter, bit for bit on one worker; readings go on; the alarm is told",
    slow=True,
)
def _meter(lab: Lab) -> Outcome:
    lab.whole()
    with lab.started("train", lab.recipe, "--arm", ARM, METER) as process:
        lab.wait_for_step(process, 10)
        os.killpg(process.pid, signal.SIGKILL)
        assert lab.said(process).count("above meter.alarm.kl=1e-06; training goes on") == 1
    seen = lab.train(METER)
    assert seen.code == 0 and "meter.alarm" not in seen.said, seen.said  # it was told before
    lab.assert_exact()
    run = Run(lab.run)
    readings = run.metrics("meter")
    assert [row["step"] for row in readings] == [3, 6, 9, 12, 15, 18]
    assert all(row["kl"] > 0 and row["read_s"] > 0 for row in readings)
    shutil.rmtree(lab.run)
    assert (seen := lab.train(METER, "verl.trainer.n_gpus_per_node=2")).code == 0, seen.said
    two = run.metrics("meter")
    apart = max(abs(a["kl"] - b["kl"]) / a["kl"] for a, b in zip(readings, two, strict=True))
    assert apart < 1e-3, apart  # as far as the trainings themselves differ
    return Outcome(f"six readings, KL {readings[-1]['kl']:.3g}; on two workers within {apart:.1g}", lost=0)
