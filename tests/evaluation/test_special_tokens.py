"""What is scored of the same tokens is the same text behind transformers and vLLM, whose engine is a stub here."""

import importlib
import importlib.metadata
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from lm_eval.api.instance import Instance
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from eaft_verl.evaluation import harness
from eaft_verl.evaluation.settings import EvaluateSettings
from eaft_verl.grading.answers import said

SETTINGS = EvaluateSettings(max_length=256)
MARKS = ["[THINK]", "[/THINK]", "<|channel|>", "<|message|>", "<|start|>", "<|tool|>"]
END = "<|im_end|>"
WRITTEN = [  # (tokens as text, what is said)
    (f"It is 7.{END}", "It is 7."),
    (f"[THINK]It is 8.[/THINK]It is 7.{END}", "It is 7."),
    (f"[THINK]It is 8.{END}", ""),
    (f"<|channel|>analysis<|message|>8?<|start|>assistant<|channel|>final<|message|>It is 7.{END}", "It is 7."),
    (f"It is<|tool|> 7.<|endoftext|>{END}{END}", "It is 7."),
    (f" 7 <b>\n{END}", " 7 <b>\n"),
    ("It is 7", "It is 7"),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tiny_model(tmp_path_factory.mktemp("model"))
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    return model.eval(), tokenizer


def by_transformers(model: Any, tokenizer: Any, written: list[str]) -> list[str]:
    language: Any = harness.language_model(model, tokenizer, SETTINGS, batch_size=1)
    texts = iter(written)

    def generate(context: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([context, torch.tensor([tokenizer.encode(next(texts))])], dim=1)

    language._model_generate = generate
    return language.generate_until(requests(len(written)))


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The harness's own module; of vLLM it needs nothing but names here."""
    stub = mock.MagicMock(SamplingParams=lambda **given: SimpleNamespace(**given))
    names = ("vllm", "vllm.lora", "vllm.lora.request", "vllm.tokenizers", "vllm.renderers", "vllm.renderers.hf")
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.28.0" if name == "vllm" else version(name))
    with mock.patch.dict(sys.modules, dict.fromkeys(names, stub)):
        sys.modules.pop("lm_eval.models.vllm_causallms", None)
        yield importlib.import_module("lm_eval.models.vllm_causallms")


def by_vllm(vllm: Any, tokenizer: Any, written: list[str]) -> list[str]:
    language: Any = object.__new__(vllm.VLLM)
    about = {"tokenizer": tokenizer, "batch_size": 1, "_max_length": 256, "_max_gen_toks": 64, "think_end_token": None}
    vars(language).update(about, truncation_side="left", _rank=0, cache_hook=SimpleNamespace(add_partial=print))
    vars(language)["tok_encode"] = lambda texts: [tokenizer.encode(text) for text in texts]
    texts = iter(written)

    def generate(requests: list[Any], generate: bool, sampling_params: list[Any]) -> list[Any]:
        """As the engine: it stops at an end token, which it does not print, and prints others if it is told to."""
        tokens = tokenizer.encode(next(texts).partition(END)[0])
        text = tokenizer.decode(tokens, skip_special_tokens=sampling_params[0].skip_special_tokens)
        return [SimpleNamespace(outputs=[SimpleNamespace(text=text)])]

    language._model_generate = generate
    return harness._speak(language, SETTINGS).generate_until(requests(len(written)))


def requests(count: int) -> list[Instance]:
    """Prompts of one length, asked in their order."""
    how = {"until": [], "do_sample": False, "max_gen_toks": 64}
    return [Instance("generate_until", {}, (f"{END}{number}", how), number) for number in range(count)]


def test_both_back_ends_give_the_text_that_is_said(parts: tuple[Any, Any], vllm: Any):
    model, tokenizer = parts
    written = [text for text, _ in WRITTEN]
    texts = by_transformers(model, tokenizer, written)
    assert texts == by_vllm(vllm, tokenizer, written)
    assert [said(text) for text in texts] == [spoken for _, spoken in WRITTEN]
    assert not any(END in text or "<|tool|>" in text or "<|endoftext|>" in text for text in texts)


def test_the_engine_samples_as_it_is_asked_and_not_as_the_model_s_file_says(tmp_path: Path):
    """A repetition penalty in generation_config.json would hold for the base and not for its checkpoints."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert harness._engine_arguments(tmp_path, SETTINGS)["generation_config"] == "vllm"
    given = EvaluateSettings(backend="vllm", backend_args={"generation_config": "auto"})
    assert harness._engine_arguments(tmp_path, given)["generation_config"] == "auto"
