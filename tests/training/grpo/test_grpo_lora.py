"""GRPO with an adapter, for real: the base stays, the reference is the base, exports are merged, a resume is exact."""

import signal
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_grpo import after_first_step, train_arm

from eaft_verl.errors import Interrupted
from eaft_verl.files import read_jsonl
from eaft_verl.runs import Run
from eaft_verl.training import states
from eaft_verl.training.dcp import read_model

pytestmark = pytest.mark.slow
RANK, ALPHA, STEPS = 4, 8, 6
OVERRIDES = [
    f"verl.model.lora_rank={RANK}",
    f"verl.model.lora_alpha={ALPHA}",
    "verl.model.target_modules=[q_proj,v_proj]",
    "verl.actor_rollout_ref.rollout.n=4",
    "verl.data.train_batch_size=4",  # 16 responses a step, all of which are kept
    "verl.actor_rollout_ref.actor.use_kl_loss=true",
    "verl.actor_rollout_ref.actor.kl_loss_coef=0.01",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return train_arm(folder, OVERRIDES, monkeypatch)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_only_what_carries_an_adapter_moves_and_the_base_stays(run: Run, folder: Path) -> None:
    base, trained = weights(folder / "model"), weights(run.checkpoints()[STEPS])
    assert base.keys() - {"lm_head.weight"} == trained.keys()
    moved = {name for name in trained if not torch.equal(base[name], trained[name])}
    assert moved == {name for name in base if name.endswith(("q_proj.weight", "v_proj.weight"))}
    for name in moved:  # a product of rank 4
        values = torch.linalg.svdvals((trained[name] - base[name]).double())
        assert values[RANK] < 1e-5 * values[0]


def test_the_rollout_samples_from_base_plus_adapter(run: Run, folder: Path) -> None:
    """The export after step 4 gives the log-probabilities of the responses of step 5, to float32."""
    assert mean_k3(run, 5, run.checkpoints()[4])[1] < 1e-4


def test_the_reference_is_the_base_without_the_adapter(run: Run, folder: Path) -> None:
    """kl_loss of a step is the token mean of k3 = r - ln r - 1, r = p_base / p_sampled, of its 16 responses."""
    logged = {row["step"]: row["data"]["actor/kl_loss"] for row in read_jsonl(run.path / "metrics_verl.jsonl")}
    assert logged[1] == pytest.approx(0, abs=1e-7)  # an adapter begins as nothing
    for step in (3, 6):
        assert logged[step] == pytest.approx(mean_k3(run, step, folder / "model")[0], rel=1e-3, abs=1e-7)
    assert logged[6] > 1e-5


def mean_k3(run: Run, step: int, folder: Path) -> tuple[float, float]:
    """(mean k3, largest difference of log-probabilities) of a model to the sampler, over the responses of a step."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    apart = []
    for row in (row for row in read_jsonl(run.path / "rollouts.jsonl") if row["step"] == step):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            table = model(torch.tensor([prompt + row["tokens"]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own = table.gather(-1, torch.tensor(row["tokens"])[:, None])[:, 0]
        apart.append(own.double() - torch.tensor(row["log_probs"]).double())
    assert len(apart) == 16
    difference = torch.cat(apart)
    return float((difference.exp() - difference - 1).mean()), float(difference.abs().max())


def test_a_resume_goes_on_bit_for_bit(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "out" / "grpo-seed0"
    stop = partial(signal.raise_signal, signal.SIGTERM)
    threading.Thread(target=after_first_step, args=(other, stop)).start()
    with pytest.raises(Interrupted, match="is saved at step"):
        train_arm(tmp_path, OVERRIDES, monkeypatch)
    state = max(states.whole(other).items())[1]
    saved = read_model(state / "actor")
    assert saved and all("lora_" in name for name in saved)
    resumed = train_arm(tmp_path, OVERRIDES, monkeypatch)
    kept = ("step", "reward", "tokens", "lr", "grad_norm")
    assert [[row[name] for name in kept] for row in resumed.metrics()] == [
        [row[name] for name in kept] for row in run.metrics()
    ]
    for name, weight in weights(resumed.checkpoints()[STEPS]).items():
        assert torch.equal(weight, weights(run.checkpoints()[STEPS])[name]), name
