"""Answers written in several calls, rows leaving when they end, against transformers' own loop over each row alone."""

import contextlib
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval.models.huggingface
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import DynamicLayer

from eaft_verl.attention.grouped import use_grouped
from eaft_verl.data.parquet import Example
from eaft_verl.errors import DataError
from eaft_verl.evaluation import decoding, harness, loading
from eaft_verl.evaluation.decoding import LEAVE, Roomy, decode, in_parts
from eaft_verl.evaluation.settings import EvaluateSettings
from eaft_verl.evaluation.shared_prefix import open_cache
from eaft_verl.evaluation.teacher_forced import answer_logits

SIZES = {"vocab_size": 61, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "pad_token_id": 0}
SIZES |= {"max_position_embeddings": 256, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 1}
GROUPED = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48}
KINDS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8},
    "gpt2": {**SIZES, "n_positions": 256},
    # values of another size than keys
    "deepseek_v3": GROUPED
    | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
    | {"v_head_dim": 6, "head_dim": 4, "first_k_dense_replace": 2},
}
PROMPTS = [[5 + (3 * row + place * place) % 50 for place in range(3 + row % 5)] for row in range(12)]
NEW = 24


def model_of(kind: str, grouped: bool = False) -> Any:
    torch.manual_seed(11)
    config = AutoConfig.for_model(kind, **KINDS[kind])
    config.initializer_range = 0.4
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.generation_config = GenerationConfig(eos_token_id=[1], pad_token_id=0)  # as `load_model` leaves it
    assert not grouped or use_grouped(model)
    return model


def padded(prompts: list[list[int]] = PROMPTS) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = [[0] * (width - len(row)) + row for row in prompts]
    return torch.tensor(ids), torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])


def alone(model: Any, prompt: list[int], **how: Any) -> list[int]:
    """The answer, end token included."""
    ids = torch.tensor([prompt])
    how = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **how}
    return list(model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist())


def ends_of(model: Any) -> list[int]:
    """End tokens with which some rows end early, some late, some not at all."""
    free = [alone(model, prompt, eos_token_id=[]) for prompt in PROMPTS]
    counts = {token: sum(token in answer for answer in free) for answer in free for token in answer}
    ends = sorted(counts, key=lambda token: -counts[token])[1:3]
    lengths = {len(alone(model, prompt, eos_token_id=ends)) for prompt in PROMPTS}
    assert len(lengths) > 2
    return ends


@contextlib.contextmanager
def rows_seen(model: Any) -> Iterator[list[int]]:
    """Rows of every pass of one token."""
    seen: list[int] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            seen.append(len(kwargs["input_ids"]))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    hook.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_each_row_alone_and_no_work_is_done_for_ended_ones(kind: str) -> None:
    model = model_of(kind)
    ends = ends_of(model)
    ids, mask = padded()
    how = {"do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
    assert in_parts(model, how)
    with rows_seen(model) as seen:
        found = decode(model, ids, mask, ids.shape[1] + NEW, **how)
    lengths = []
    for row, prompt in enumerate(PROMPTS):
        expected = alone(model, prompt, eos_token_id=ends)
        answer = found[row, ids.shape[1] :].tolist()
        assert answer == expected + [0] * (len(answer) - len(expected))
        lengths.append(len(expected))
    assert found.shape[1] == ids.shape[1] + max(lengths)
    going = [sum(length > step for length in lengths) for step in range(1, max(lengths))]  # rows that need a step
    computed = seen[-len(going) :]
    assert computed[-1] < len(PROMPTS) and all(  # fewer than one in LEAVE of what is computed is for nobody
        need <= done < need * LEAVE / (LEAVE - 1) + 1e-9 for need, done in zip(going, computed, strict=True)
    )


def test_answers_with_a_model_whose_rows_begin_alike() -> None:
    begin = [7 + place % 13 for place in range(30)]
    prompts = [begin + prompt for prompt in PROMPTS]
    model, plain = model_of("llama", grouped=True), model_of("llama")
    ends = ends_of(plain)
    ids, mask = padded(prompts)
    found = decode(model, ids, mask, ids.shape[1] + NEW, eos_token_id=ends, pad_token_id=0, do_sample=False)
    for row, prompt in enumerate(prompts):
        expected = alone(plain, prompt, eos_token_id=ends)
        assert found[row, ids.shape[1] :][: len(expected)].tolist() == expected


def test_a_penalty_on_what_was_said_holds_across_calls() -> None:
    model = model_of("qwen3")
    ends = ends_of(model)
    prompts = [[*prompt, *prompt, *prompt][:7] for prompt in PROMPTS]  # as long: padding would count as said
    ids, mask = padded(prompts)
    how: dict[str, Any] = {"repetition_penalty": 1.7, "eos_token_id": ends}
    found = decode(model, ids, mask, ids.shape[1] + NEW, do_sample=False, pad_token_id=0, **how)
    expected = [alone(model, prompt, **how) for prompt in prompts]
    for row, answer in enumerate(expected):
        assert found[row, ids.shape[1] :][: len(answer)].tolist() == answer
    assert expected != [alone(model, prompt, eos_token_id=ends) for prompt in prompts]  # it matters


def test_rows_end_by_what_the_caller_says() -> None:
    model = model_of("llama")
    free = [alone(model, prompt, eos_token_id=[]) for prompt in PROMPTS]
    after = [3 + row for row in range(len(PROMPTS))]

    def ended(ids_BA: Tensor) -> Tensor:
        """After so many tokens as their first one says."""
        wanted = {answer[0]: count for answer, count in zip(free, after, strict=True)}
        return torch.tensor([ids_BA.shape[1] >= wanted[int(first)] for first in ids_BA[:, 0]])

    ids, mask = padded()
    with rows_seen(model) as seen:
        found = decode(model, ids, mask, ids.shape[1] + NEW, ended, do_sample=False, eos_token_id=[], pad_token_id=0)
    wanted = {answer[0]: count for answer, count in zip(free, after, strict=True)}
    for row, answer in enumerate(free):
        count = wanted[answer[0]]
        assert found[row, ids.shape[1] :][:count].tolist() == answer[:count]
    assert found.shape[1] == ids.shape[1] + max(wanted[answer[0]] for answer in free)
    assert seen[-1] < len(PROMPTS) / 2


def test_samples_come_from_the_model_and_its_settings() -> None:
    """The second token of two thousand rows; those that end with the first leave before it."""
    model, many = model_of("llama"), 2000
    prompt = torch.tensor([PROMPTS[3]])
    with torch.no_grad():
        logits = model(prompt).logits[0, -1] / 1.5
        first = int(logits.argsort(descending=True)[1])
        follows = model(torch.cat([prompt, torch.tensor([[first]])], 1)).logits[0, -1] / 1.5
    ends = [int(logits.argmax())]
    how: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_k": 5, "eos_token_id": ends, "pad_token_id": 0}
    torch.manual_seed(0)
    ids = prompt.repeat(many, 1)
    found = decode(model, ids, torch.ones_like(ids), ids.shape[1] + 2, **how)[:, ids.shape[1] :]
    for tokens, scores in ((found[:, 0], logits), (found[found[:, 0] == first][:, 1], follows)):
        kept = scores.topk(5)
        expected = kept.values.softmax(0) * len(tokens)
        counts = torch.stack([(tokens == token).sum() for token in kept.indices])
        assert counts.sum() == len(tokens) > 100
        assert ((counts - expected) ** 2 / expected).sum() < 20  # chi square of 4 degrees: 1 in 2,000 beyond


@pytest.mark.parametrize(
    "setting",
    [{"min_new_tokens": 3}, {"num_beams": 2}, {"begin_suppress_tokens": [3]}, {"penalty_alpha": 0.6}, {"use": 1}],
    ids=str,
)
def test_settings_that_count_from_the_prompt_or_keep_several_answers_are_not_for_it(setting: dict[str, Any]) -> None:
    model = model_of("llama")
    assert in_parts(model, {"do_sample": True, "top_p": 0.9}) and not in_parts(model, setting)
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    assert not in_parts(model, {})


def test_another_memory_than_keys_and_values_of_all_tokens_is_not_for_it() -> None:
    config = AutoConfig.for_model("mistral", **GROUPED, sliding_window=8)
    assert not in_parts(AutoModelForCausalLM.from_config(config), {})


def test_a_model_without_a_memory_is_not_for_it() -> None:
    """Its forward would take one for a word of another's, and `generate` refuses it."""
    sizes = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("openai-gpt", **sizes))
    assert open_cache(model) is None and not in_parts(model, {})


@given(
    changes=st.lists(
        st.one_of(
            st.tuples(st.just("more"), st.integers(1, 40)),
            st.tuples(st.just("keep"), st.lists(st.integers(0, 5), min_size=1, max_size=5)),
            st.tuples(st.just("crop"), st.integers(1, 50)),
            st.tuples(st.just("turn"), st.none()),
        ),
        max_size=12,
    )
)
def test_a_layer_with_room_holds_what_one_without_does(changes: list[tuple[str, Any]]) -> None:
    draw = torch.Generator().manual_seed(0)
    plain, rows = DynamicLayer(), 3
    plain.update(torch.randn(rows, 2, 5, 4, generator=draw), torch.randn(rows, 2, 5, 3, generator=draw))
    roomy = Roomy.of(plain)
    assert Roomy.of(DynamicLayer()).get_seq_length() == 0
    for what, value in changes:
        if what == "more":
            keys, values = (torch.randn(rows, 2, value, size, generator=draw) for size in (4, 3))
            for one, other in zip(plain.update(keys, values), roomy.update(keys, values), strict=True):
                assert one.equal(other)
        elif what == "keep":
            kept = torch.tensor([number % rows for number in value])
            plain.batch_select_indices(kept)
            roomy.batch_select_indices(kept)
            rows = len(kept)
        elif what == "turn":
            plain.reorder_cache(torch.arange(rows).flip(0))
            roomy.reorder_cache(torch.arange(rows).flip(0))
        else:
            plain.crop(value)
            roomy.crop(value)
        assert plain.keys.equal(roomy.keys) and plain.values.equal(roomy.values)
        assert plain.get_seq_length() == roomy.get_seq_length()


def test_room_is_made_now_and_then() -> None:
    layer, made = Roomy(), set()
    one = torch.zeros(1, 1, 1, 2)
    for _ in range(400):
        layer.update(one, one)
        made.add(layer.room[0].data_ptr())
    assert layer.keys.shape[2] == 400 and len(made) < 30
    assert layer.room[0].shape[2] <= 400 * (1 + 1 / decoding.SPARE) + decoding.LEAST_SPARE


def test_what_rows_that_left_had_is_not_kept() -> None:
    layer = Roomy()
    layer.update(torch.zeros(8, 1, 100, 2), torch.zeros(8, 1, 100, 2))
    room = [weakref.ref(one.untyped_storage()) for one in layer.room]
    layer.batch_select_indices(torch.arange(6))
    assert [one() for one in room] == [None, None]


# behind the harness


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Ours, and the harness's own of the same model."""
    settings = EvaluateSettings(max_length=256)
    path = tiny_model(tmp_path_factory.mktemp("model"), hidden=32, seed=4)
    model, tokenizer = loading.load_model(path, settings)
    ours = harness.language_model(model, tokenizer, settings, 8)
    theirs = lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, max_length=256)
    return ours, theirs


TEXTS = ["one two three four", "five", "nine eight seven six five four", "ten ten", "a b c d e f g", "zero"]


def answers(language: Any, **kwargs: Any) -> list[str]:
    from lm_eval.api.instance import Instance

    rows = [
        Instance("generate_until", {}, (text, {"max_gen_toks": 20, **kwargs}), number)
        for number, text in enumerate(TEXTS)
    ]
    return list(lm_eval.models.huggingface.HFLM.generate_until(language, rows, disable_tqdm=True))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("stops", [0, 1, 4])
def test_the_harness_hears_what_its_own_model_says(languages: tuple[Any, Any], stops: int, beams: int) -> None:
    ours, theirs = languages
    free = answers(theirs, until=[])
    until = [text[len(text) // 2 :][:3] for text in free[:stops] if len(text) > 6]
    kwargs: dict[str, Any] = {"until": until} | ({"num_beams": beams} if beams > 1 else {})
    expected = answers(theirs, **kwargs)
    assert answers(ours, **kwargs) == expected
    assert (expected == free) == (stops == 0) or beams > 1
    assert not any(one in text for one in until for text in expected)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotations_that_change_when_a_row_becomes_long_are_not_for_it(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    name = "phi3" if kind == "longrope" else "llama"
    config = AutoConfig.for_model(name, **GROUPED, sliding_window=None, rope_parameters=rope | factors)
    plain = AutoConfig.for_model(name, **GROUPED, sliding_window=None)
    model, usual = AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(plain)
    assert open_cache(usual) is not None and open_cache(model) is None


def test_keys_that_lie_beside_the_cache_are_not_for_it() -> None:
    model = model_of("llama")
    assert in_parts(model, {})
    model.model.layers[1].self_attn._cached_keys = None
    assert not in_parts(model, {})


def test_prompts_that_leave_no_room_are_refused() -> None:
    ids, mask = padded()
    with pytest.raises(DataError, match=r"a prompt of 7 tokens leaves nothing of max_length=7"):
        decode(model_of("llama"), ids, mask, ids.shape[1])


def test_a_model_that_adds_a_loss_of_its_router_is_evaluated(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, hidden=32, seed=4)
    words = AutoConfig.from_pretrained(folder).vocab_size
    named = GROUPED | {"vocab_size": words, "num_local_experts": 3, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("mixtral", **named, output_router_logits=True)
    made: Any = AutoModelForCausalLM.from_config(config)
    made.save_pretrained(folder)
    model, _ = loading.load_model(folder, EvaluateSettings(max_length=256))
    ids, mask = padded()
    assert decode(model, ids, mask, ids.shape[1] + 4).shape == (len(PROMPTS), ids.shape[1] + 4)
    rows = [Example(str(n), [], row, [0] + [1] * (len(row) - 1)) for n, row in enumerate(PROMPTS)]
    found = dict(answer_logits(model, rows))
    made.config.output_router_logits = False
    with torch.no_grad():
        alone = made.eval()(torch.tensor([PROMPTS[4]])).logits[0, :-1]
    torch.testing.assert_close(found[4], alone, rtol=0, atol=2e-5)
