"""Objectives as a `compute_loss_func`: an arm's loss, right under accumulation, fused or not, in both trainers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from batch_examples import EXAMPLES, both_calls
from torch.testing import assert_close

from eaft_verl.objectives import OBJECTIVES
from eaft_verl.recipe.objective import build_stateless
from eaft_verl.training.hf_loss import IGNORED, hf_loss

LACKING = {"flow", "masked", "pilot_mask", "talr", "psft", "mile", "idft", "prift", "gift", "finch"}
LACKING |= {"sft_kl", "asft", "mask_target"}
STATELESS = [(name, {}) for name in OBJECTIVES if name not in LACKING] + [
    ("masked", {"threshold": 0.3}),
    ("talr", {"tau": 1.5}),
    ("mile", {"weight_norm": "none"}),
    ("idft", {"warmup": 0.0, "transition": 0.0}),
]
WIDTH = 50  # vocabulary of the examples' logits


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Labels [B, S] of the examples as a collator makes them, and float64 logits [B, S, V]."""
    longest = max(len(example.input_ids) for example in EXAMPLES)
    labels = torch.full((len(EXAMPLES), longest), IGNORED)
    for row, example in enumerate(EXAMPLES):
        for place, (token, trained) in enumerate(zip(example.input_ids, example.loss_mask, strict=True)):
            labels[row, place] = token if trained else IGNORED
    draw = torch.Generator().manual_seed(0)
    return labels, torch.randn(*labels.shape, WIDTH, generator=draw, dtype=torch.float64) * 3


@pytest.mark.parametrize(("name", "params"), STATELESS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_loss_is_the_arms(name: str, params: dict[str, Any]) -> None:
    """Value and gradient of verl's hook on the packed rows, of this function on the padded ones: equal to 1e-5."""
    from verl.utils import tensordict_utils as tu

    from eaft_verl.training.sft.batches import make_batch
    from eaft_verl.training.sft.loss import BATCH_FLAGS, TokenLoss

    labels, logits = padded()
    lengths = [len(example.input_ids) for example in EXAMPLES]
    packed = torch.cat([row[:length] for row, length in zip(logits, lengths, strict=True)]).float()[None]
    ours, theirs = logits.float().requires_grad_(), packed.requires_grad_()
    trained = int((labels[:, 1:] != IGNORED).sum())
    batch = make_batch(EXAMPLES, list(range(len(EXAMPLES))), {**BATCH_FLAGS, "dp_size": 1}, None)
    tu.assign_non_tensor(batch, batch_num_tokens=trained)
    arm = both_calls(TokenLoss(build_stateless(name, **params)), batch, theirs)
    loss = hf_loss(name, **params)({"logits": ours}, labels, num_items_in_batch=torch.tensor(trained))
    assert loss.item() == pytest.approx(arm.item(), rel=1e-5)
    loss.backward()
    arm.backward()
    found = torch.cat([row[:length] for row, length in zip(ours.grad, lengths, strict=True)])
    assert_close(found, theirs.grad[0], rtol=1e-5, atol=1e-8)


def test_without_a_count_it_is_the_mean_of_what_it_was_given() -> None:
    labels, logits = padded()
    trained = int((labels[:, 1:] != IGNORED).sum())
    loss = hf_loss("sft")
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    assert loss({"logits": logits}, labels).item() == pytest.approx(expected.item() / trained, rel=1e-9)
    assert loss({"logits": logits}, labels, num_items_in_batch=7).item() == pytest.approx(expected.item() / 7, rel=1e-9)
    assert loss({"logits": logits}, torch.full_like(labels, IGNORED)).item() == 0.0


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("prift", {}, "forward pass of the starting model"),
        ("eaft", {"stats": "base"}, "forward pass of the starting model"),
        ("masked", {}, "forward pass of the starting model"),
        ("talr", {}, "give a number, e.g. tau=1"),
        ("idft", {}, "warmup=0, transition=0"),
        ("mile", {}, "weight_norm=none"),
        ("psft", {}, "an earlier model"),
        ("sft_kl", {}, "frozen reference"),
        ("finch", {}, "learning rate"),
        ("eaft", {"anchor": {"kind": "l2", "coef": 1.0}}, "starting weights"),
        ("eaft", {"powr": 2}, "objective.powr is unknown"),
        ("eeaft", {}, "is unknown; choose one of"),
    ],
)
def test_what_a_loss_function_is_not_given_is_named(name: str, params: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="objective") as caught:
        hf_loss(name, **params)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_every_name_either_runs_or_says_what_it_lacks() -> None:
    for name in OBJECTIVES:
        if name in LACKING:
            with pytest.raises(ValueError, match="as an arm of `eaft train` only"):
                hf_loss(name)
        else:
            hf_loss(name)


def test_labels_of_another_shape_are_refused() -> None:
    labels, logits = padded()
    for wrong in (None, labels[:, 1:]):
        with pytest.raises(ValueError, match="do not belong to logits"):
            hf_loss("eaft")({"logits": logits}, wrong)


def test_the_guard_looks_at_the_first_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    from eaft_verl.objectives import Eaft

    labels, logits = padded()
    monkeypatch.setattr(Eaft, "weight", lambda self, stats: stats.logprob_T * 0 + 1)
    with pytest.raises(RuntimeError, match="weight of Eaft differs from its definition"):
        hf_loss("eaft")({"logits": logits.requires_grad_()}, labels)


# --- the trainers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_model_path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, list[int]]]:
    """Eight rows of 5 to 26 tokens, the first third of each not trained."""
    draw = torch.Generator().manual_seed(1)
    made = []
    for number in range(8):
        ids = torch.randint(384, (5 + 3 * number,), generator=draw).tolist()
        made.append({"input_ids": ids, "labels": [IGNORED] * (len(ids) // 3) + ids[len(ids) // 3 :]})
    return made


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])
        for name, value in fill.items()
    }


def settings(folder: Path, accumulated: int) -> dict[str, Any]:
    return {
        **{"output_dir": str(folder), "use_cpu": True, "report_to": [], "save_strategy": "no", "max_steps": 2},
        **{"per_device_train_batch_size": 8 // accumulated, "gradient_accumulation_steps": accumulated},
        **{"learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 1e9},
        **{"logging_steps": 1, "disable_tqdm": True, "seed": 3, "remove_unused_columns": False},
    }


def by_hand(model: Any, rows: list[Any]) -> dict[str, torch.Tensor]:
    """Two steps of SGD on EAFT's definition over the whole batch, float64."""
    from torch.special import entr

    model = copy.deepcopy(model).double()
    batch = collate(rows)
    for _ in range(2):
        model.zero_grad()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        entropy = entr(logits.detach().topk(20).values.softmax(-1)).sum(-1).flatten()
        (nll * entropy).sum().div((labels != IGNORED).sum() * torch.tensor(20.0).log()).backward()
        for parameter in model.parameters():
            parameter.data -= 0.1 * parameter.grad
    return model.state_dict()


@pytest.mark.parametrize("fused", [False, True], ids=["whole", "fused"])
@pytest.mark.parametrize("accumulated", [1, 4])
def test_transformers_trainer(accumulated: int, fused: bool, model: Any, rows: list[Any], tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    trained = copy.deepcopy(model)
    loss = hf_loss("eaft", model=trained if fused else None)
    arguments = TrainingArguments(**settings(tmp_path, accumulated))
    trainer = Trainer(trained, arguments, data_collator=collate, train_dataset=rows, compute_loss_func=loss)
    trainer.train()
    expected = by_hand(model, rows)
    for name, weight in trained.state_dict().items():
        assert_close(weight.double(), expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert loss.guarded and (loss.head is not None) == fused
    assert trainer.evaluate(rows)["eval_loss"] > 0
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        assert trained.eval()(input_ids=ids).logits.shape == (1, 5, 384), "whoever asks for logits gets them"


@pytest.mark.parametrize("fused", [False, True], ids=["whole", "fused"])
def test_trl(fused: bool, model: Any, rows: list[Any], tiny_model_path: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is in the extra `bench`")
    from datasets import Dataset
    from transformers import AutoTokenizer

    trained = copy.deepcopy(model)
    arguments = trl.SFTConfig(**settings(tmp_path, 4), dataset_kwargs={"skip_prepare_dataset": True}, bf16=False)
    trainer = trl.SFTTrainer(
        trained,
        arguments,
        data_collator=collate,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
        compute_loss_func=hf_loss("eaft", model=trained if fused else None),
    )
    trainer.train()
    expected = by_hand(model, rows)
    for name, weight in trained.state_dict().items():
        assert_close(weight.double(), expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_head_that_cannot_be_fused_is_refused(model: Any) -> None:
    capped = copy.deepcopy(model)
    capped.config.logit_scale = 0.5
    with pytest.raises(ValueError, match="changes its logits after the head"):
        hf_loss("eaft", model=capped)


def test_it_loads_without_verl() -> None:
    import subprocess
    import sys

    code = "import sys; sys.modules['verl'] = None; from eaft_verl.training.hf_loss import hf_loss; hf_loss('eaft')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
