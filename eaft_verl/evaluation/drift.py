"""How far a model has moved from its base on text the base would write: KL divergence and agreement per token.

Dimension letters: B prompts of a batch, T answer tokens of one example, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eaft_verl.data.columns import PROMPT_KEYS, RESPONSE_KEYS
from eaft_verl.data.encode import encode, render
from eaft_verl.data.formats import to_messages
from eaft_verl.data.parquet import Example, read_examples, write_examples
from eaft_verl.data.sources import read_rows
from eaft_verl.data.spec import RowError
from eaft_verl.errors import DataError
from eaft_verl.evaluation.decoding import decode, in_parts
from eaft_verl.evaluation.model_files import positions_of
from eaft_verl.evaluation.records import Sample, check_ids, digest
from eaft_verl.evaluation.settings import DriftSettings
from eaft_verl.evaluation.teacher_forced import TOKEN_BUDGET, answer_logits, labels, rows_at_once, token_weighted
from eaft_verl.files import computed_once

PROBE_BATCH = 32
_CONVERSATION_KEYS = ("messages", "conversations", *RESPONSE_KEYS)
_HIGHER_IS_BETTER = {"kl": False, "agreement": True, "nll": False}


def prompts_of(settings: DriftSettings, kwargs: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The first `rows` rows of the source as {id, messages, tools}; messages end with an answer if the rows have one.

    kwargs: what their template is called with besides a row's own. Raises DataError if only some rows have an answer.
    """
    rows = read_rows(settings.data)[: settings.rows]
    if not rows:
        raise DataError(f"evaluate.drift.data={settings.data!r} holds no rows")
    prompts = [{"id": str(row.get("id", number)), **_prompt(row, kwargs)} for number, row in enumerate(rows)]
    answered = [number for number, prompt in enumerate(prompts, 1) if prompt["messages"][-1]["role"] == "assistant"]
    if answered and len(answered) < len(prompts):
        raise DataError(
            f"{settings.data}: {len(answered)} of {len(prompts)} rows have an answer; drift needs answers in all of "
            "them, or in none (the base model then writes them)"
        )
    return prompts


def _prompt(row: dict[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """{messages, tools, chat_template_kwargs}; a prompt alone is a user turn, which training formats do not allow."""
    prompt = next((row[key] for key in PROMPT_KEYS if isinstance(row.get(key), str)), None)
    if prompt is not None and not any(row.get(key) is not None for key in _CONVERSATION_KEYS):
        return {"messages": [{"role": "user", "content": prompt}], "tools": None, "chat_template_kwargs": given}
    messages, extra = to_messages(row)
    kwargs = {**(given or {}), **extra.get("chat_template_kwargs", {})}
    return {"messages": messages, "tools": extra.get("tools"), "chat_template_kwargs": kwargs}


def task_prompts(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """The prompts of prepared examples: all that stands before the last answer, in the form of `prompts_of`."""
    return [
        {
            "id": example.id,
            "messages": example.messages[: _last_answer(example.messages)],
            "tools": example.tools,
            "chat_template_kwargs": example.chat_template_kwargs,
        }
        for example in examples
    ]


def _last_answer(messages: list[dict[str, Any]]) -> int:
    return max(index for index, message in enumerate(messages) if message["role"] == "assistant")


def has_answers(prompts: list[dict[str, Any]]) -> bool:
    """Whether the answers are given."""
    return prompts[-1]["messages"][-1]["role"] == "assistant"


def given_probe(
    tokenizer: PreTrainedTokenizerBase, prompts: list[dict[str, Any]], settings: DriftSettings, max_length: int
) -> Sequence[Example]:
    """Given answers, one example per assistant turn, each cut after its first `new_tokens` answer tokens.

    Raises DataError naming the row whose answer the chat template cannot write, or that has none within max_length.
    """
    examples = []
    for number, prompt in enumerate(prompts, 1):
        try:
            how = ("truncate", "split", prompt["tools"], prompt.get("chat_template_kwargs"))
            turns = encode(tokenizer, prompt["messages"], max_length, *how)
        except RowError as error:
            raise DataError(f"{settings.data} row {number}: {error}") from error
        for ordinal, one in enumerate(turns):
            name = f"{prompt['id']}/{ordinal}" if len(turns) > 1 else prompt["id"]
            end = [index for index, marked in enumerate(one.loss_mask) if marked][: settings.new_tokens][-1] + 1
            examples.append(Example(name, prompt["messages"][: one.turn + 1], one.input_ids[:end], one.loss_mask[:end]))
    check_ids(({"id": example.id} for example in examples), settings.data)
    return examples


def probe_path(
    work: Path, base_key: str, tokenizer: PreTrainedTokenizerBase, prompts: list[dict[str, Any]], new_tokens: int
) -> Path:
    """Where the base's answers are kept: the name is made of all they depend on, so stale answers are never found."""
    key = digest([base_key, tokenizer.chat_template, prompts, new_tokens])
    return work / f"drift-probe-{key[:16]}.parquet"


def own_answers(
    work: Path,
    base_key: str,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict[str, Any]],
    new_tokens: int,
    load: Callable[[], PreTrainedModel],
) -> Sequence[Example]:
    """`make_probe`'s greedy answers, kept in `work`; by the model that `load` gives where they are not there yet."""
    path = probe_path(work, base_key, tokenizer, prompts, new_tokens)

    def make(empty: Path) -> None:
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        write_examples(empty / path.name, make_probe(load(), tokenizer, prompts, new_tokens))

    return read_examples(computed_once(path.with_suffix(""), path.stem, make) / path.name)


@torch.inference_mode()
def make_probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict[str, Any]],
    new_tokens: int,
    **sampling: Any,
) -> Sequence[Example]:
    """The base's own answers of at most new_tokens tokens, its end token included where it came to an end.

    None goes on beyond the positions that the model knows: what is said there is noise.

    sampling: arguments of transformers' generate; greedy without any.
    """
    texts = [
        render(tokenizer, prompt["messages"], prompt["tools"], generate=True, kwargs=prompt.get("chat_template_kwargs"))
        for prompt in prompts
    ]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    for start in range(0, len(order), PROBE_BATCH):
        batch = order[start : start + PROBE_BATCH]
        answers |= dict(
            zip(batch, _generate(model, tokenizer, [ids[index] for index in batch], new_tokens, sampling), strict=True)
        )
    written = {index: tokenizer.decode(found, skip_special_tokens=True) for index, found in answers.items()}
    return [
        Example(
            id=prompt["id"],
            messages=[*prompt["messages"], {"role": "assistant", "content": written[index]}],
            input_ids=ids[index] + answers[index],
            loss_mask=[0] * len(ids[index]) + [1] * len(answers[index]),
            tools=prompt["tools"],
            chat_template_kwargs=prompt.get("chat_template_kwargs"),
        )
        for index, prompt in enumerate(prompts)
    ]


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    new_tokens: int,
    sampling: dict[str, Any],
) -> list[list[int]]:
    """Continuations of a left-padded batch, cut after the first end token."""
    shipped = model.generation_config.eos_token_id
    ends = shipped if isinstance(shipped, list) else [tokenizer.eos_token_id]
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
    room = (positions_of(model.config) or math.inf) - batch["input_ids"].shape[1]
    padded, mask = batch["input_ids"], batch["attention_mask"]
    how = {"do_sample": False, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id, **sampling}
    length = padded.shape[1] + int(min(new_tokens, max(1, room)))
    if in_parts(model, how):
        output = decode(model, padded, mask, length, **how)
    else:
        output = cast(Any, model).generate(padded, attention_mask=mask, max_length=length, **how)
    continuations = output[:, padded.shape[1] :].tolist()
    return [_until(tokens, ends) for tokens in continuations]


def _until(tokens: list[int], ends: list[int]) -> list[int]:
    first = next((index for index, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: first + 1]


def divergence(base_TV: Tensor, model_TV: Tensor, labels_T: Tensor) -> dict[str, Tensor]:
    """{kl, agreement, nll}, each [T] float32: forward KL over the whole vocabulary, same likeliest token, label's NLL.

    KL(base || model) = sum_v p_base(v) (log p_base(v) - log p_model(v)), nats; words that the base gives no
    probability (-inf logits of a padded vocabulary) contribute nothing, one that only the model gives none makes it
    infinite, NaN logits make it NaN. Equally likely words: the lowest token id is the likeliest. nll is the model's.
    """
    parts, rows = [], rows_at_once(model_TV)
    for base, model, right in zip(*(tensor.split(rows) for tensor in (base_TV, model_TV, labels_T)), strict=True):
        log_base = base.float().log_softmax(dim=-1)
        log_model = model.float().log_softmax(dim=-1)
        p_base = log_base.exp()
        kl = (p_base * (log_base - log_model).masked_fill_(p_base == 0, 0.0)).sum(dim=-1)
        agreement = (base.argmax(dim=-1) == model.argmax(dim=-1)).float()
        parts.append((kl, agreement, -log_model.gather(-1, right[:, None]).squeeze(-1)))
    return {name: torch.cat(values) for name, values in zip(_HIGHER_IS_BETTER, zip(*parts, strict=True), strict=True)}


def drift(
    model: PreTrainedModel | None, examples: Sequence[Example], base: list[Tensor], token_budget: int = TOKEN_BUDGET
) -> tuple[dict[str, Any], list[Sample]]:
    """(record fields, samples): kl, agreement and nll per answer token, weighted by tokens.

    model None: the base itself, compared with its own logits, so that kl is 0 and agreement 1 exactly. A sample's
    `kl_T` is the KL of each of its tokens, to six digits: a mean hides whether few tokens moved far or all a little.
    """
    scores: dict[int, dict[str, float]] = {}
    kl: dict[int, list[float]] = {}
    pairs = enumerate(base) if model is None else answer_logits(model, examples, token_budget)
    for index, logits_TV in pairs:
        labels_T = torch.tensor(labels(examples[index]), device=logits_TV.device)
        values = divergence(base[index].to(logits_TV.device), logits_TV, labels_T)
        scores[index] = {name: value_T.double().mean().item() for name, value_T in values.items()}
        kl[index] = [float(f"{value:.6g}") for value in values["kl"].tolist()]
    record, samples = token_weighted(examples, scores, _HIGHER_IS_BETTER)
    return record, [{**sample, "kl_T": kl[index]} for index, sample in enumerate(samples)]
