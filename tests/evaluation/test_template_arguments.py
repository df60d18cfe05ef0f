"""Benchmarks and drift prompts are written as the training data are: with the recipe's chat_template_kwargs."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from eaft_verl.data.template import render
from eaft_verl.evaluation.drift import prompts_of
from eaft_verl.evaluation.settings import DriftSettings, EvaluateSettings, evaluation_key

QWEN3 = Path(__file__).parents[1] / "templates" / "qwen3.jinja"
MESSAGES = [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.mark.parametrize("kwargs", [None, {"enable_thinking": False}, {"enable_thinking": True}])
def test_a_benchmark_is_asked_as_training_was_rendered(tmp_path: Path, kwargs: dict[str, bool] | None) -> None:
    from eaft_verl.evaluation.harness import language_model
    from eaft_verl.evaluation.loading import load_model

    settings = EvaluateSettings(target=["sums"], chat_template_kwargs=kwargs, max_length=256)
    model, tokenizer = load_model(tiny.tiny_model(tmp_path), settings)
    tokenizer.chat_template = QWEN3.read_text(encoding="utf-8")
    asked = language_model(model, tokenizer, settings).apply_chat_template(MESSAGES)
    assert asked == render(tokenizer, MESSAGES, generate=True, kwargs=kwargs)
    assert ("</think>" in asked) == (kwargs == {"enable_thinking": False})


def test_scores_with_other_arguments_are_not_compared() -> None:
    plain = EvaluateSettings(target=["sums"])
    assert evaluation_key(replace(plain, chat_template_kwargs={})) == evaluation_key(plain)
    assert evaluation_key(replace(plain, chat_template_kwargs={"enable_thinking": False})) != evaluation_key(plain)


def test_a_rows_own_arguments_come_on_top(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "Hello"}\n'
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], '
        '"chat_template_kwargs": {"enable_thinking": true}}\n',
        encoding="utf-8",
    )
    first = prompts_of(DriftSettings(str(file), rows=1), {"enable_thinking": False, "style": "x"})
    assert first[0]["chat_template_kwargs"] == {"enable_thinking": False, "style": "x"}
    file.write_text(file.read_text(encoding="utf-8").splitlines()[1] + "\n", encoding="utf-8")
    (own,) = prompts_of(DriftSettings(str(file), rows=1), {"enable_thinking": False, "style": "x"})
    assert own["chat_template_kwargs"] == {"enable_thinking": True, "style": "x"}


@pytest.mark.parametrize(("asked", "taken"), [(64, 64), (100_000, 512)])
def test_a_model_takes_no_more_than_it_knows_positions(tmp_path: Path, asked: int, taken: int) -> None:
    from eaft_verl.evaluation.harness import _engine_arguments, language_model
    from eaft_verl.evaluation.loading import load_model

    settings = EvaluateSettings(target=["sums"], max_length=asked)
    folder = tiny.tiny_model(tmp_path)
    model, tokenizer = load_model(folder, settings)
    assert model.config.max_position_embeddings == 512
    assert vars(language_model(model, tokenizer, settings))["_max_length"] == taken
    assert _engine_arguments(folder, settings)["max_model_len"] == taken


def test_a_tied_head_in_float32_stays_so_behind_the_harness(tmp_path: Path) -> None:
    """The harness ties the weights of every model that it is given, and bfloat16 took the head's place."""
    from lm_eval.api.instance import Instance

    from eaft_verl.evaluation.harness import language_model
    from eaft_verl.evaluation.loading import load_model

    settings = EvaluateSettings(target=["sums"], max_length=64, backend_args={"dtype": "bfloat16", "device": "cpu"})
    language = language_model(*load_model(tiny.tiny_model(tmp_path), settings), settings)
    model = vars(language)["_model"]
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight.dtype == torch.float32
    asked = {"until": [], "do_sample": False, "max_gen_toks": 2}
    assert len(language.generate_until([Instance("generate_until", {}, ("2 + 2", asked), 0)], disable_tqdm=True)) == 1
