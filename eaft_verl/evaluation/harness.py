"""A checkpoint behind lm-evaluation-harness: plain transformers or vLLM."""

import contextlib
import functools
import importlib.metadata
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import lm_eval.models.huggingface
import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from eaft_verl.data.template import template_arguments
from eaft_verl.errors import DataError
from eaft_verl.evaluation.benchmarks import Benchmark
from eaft_verl.evaluation.decoding import decode, in_parts
from eaft_verl.evaluation.endpoint import Endpoint, serve_loaded, serve_vllm
from eaft_verl.evaluation.model_files import positions_of
from eaft_verl.evaluation.quiet import quiet
from eaft_verl.evaluation.records import Fit, Sample, convert
from eaft_verl.evaluation.responses import STOPS
from eaft_verl.evaluation.settings import EvaluateSettings
from eaft_verl.grading.answers import marks_thinking
from eaft_verl.models import hub_arguments, load_tokenizer

SEED = 1234
BATCH_SIZE = 32
_OF_THE_HARNESS = ("batch_size", "max_batch_size", "max_gen_toks", "think_end_token", "add_bos_token")
PLAIN_CHAT = (  # see `plain_chat`
    r"{% for message in messages %}{% set text = message['content'] | trim %}"
    r"{% if message['role'] == 'assistant' %}{{ ' ' + text }}{% else %}{{ '' if loop.first else '\n\n' }}"
    r"{% if message['role'] == 'system' or text.endswith((':', '\uff1a')) %}{{ text }}"
    r"{% else %}{{ 'Question: ' + text + '\nAnswer:' }}{% endif %}{% endif %}{% endfor %}"
)
_PLAIN_CHAT = jinja2.Template(PLAIN_CHAT)
_MORE = 2  # tokens before a stop's own that may hold a part of it, as the harness has it
MIN_ANSWER = 64  # tokens that a prompt must leave for a longer answer


def language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluateSettings,
    batch_size: int | str | None = None,
) -> LM:
    """The harness's view of a loaded model. It sorts requests by length and text: their order does not matter.

    It takes `max_length` tokens, or as many as the model knows positions: beyond these a model writes anything.
    """
    batch_size = batch_size or settings.backend_args.get("batch_size", BATCH_SIZE)
    with quiet():
        language = _Prompted(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=_length(model.config, settings)
        )
    return _speak(language, settings)


class _Prompted(lm_eval.models.huggingface.HFLM):
    """The harness's model of transformers, without the work that it does twice or for nothing: see `decoding`."""

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        mask, settings = kwargs.pop("attention_mask"), dict(kwargs)
        if settings.get("temperature", 0.0) == 0.0 and not settings.get("do_sample"):
            settings = {name: value for name, value in settings.items() if name != "temperature"} | {"do_sample": False}
        if not in_parts(self.model, settings):
            return super()._model_generate(context, max_length, stop, attention_mask=mask, **kwargs)
        longest = _MORE + max((len(self.tokenizer.encode(one, add_special_tokens=False)) for one in stop), default=0)

        def ended(ids_BA: Tensor) -> Tensor:
            texts = self.tokenizer.batch_decode(ids_BA[:, -longest:])
            return torch.tensor([any(one in text for one in stop) for text in texts])

        settings["pad_token_id"] = self.tokenizer.pad_token_id
        return decode(self.model, context, mask, max_length, ended if stop else None, **settings)


def vllm_model(path: Path | str, settings: EvaluateSettings) -> LM:
    """The harness's vLLM engine on a checkpoint; backend_args are its arguments (tensor_parallel_size, ...)."""
    from lm_eval.api.registry import get_model

    return _speak(get_model("vllm")(**_engine_arguments(path, settings)), settings)


def _engine_arguments(path: Path | str, settings: EvaluateSettings) -> dict[str, Any]:
    source = hub_arguments(path)
    arguments = {"pretrained": source.pop("pretrained_model_name_or_path"), **source, "dtype": "bfloat16", "seed": SEED}
    arguments["generation_config"] = "vllm"  # its server would sample as the model's file says, penalties and all
    length = _length(AutoConfig.from_pretrained(**hub_arguments(path)), settings)
    return arguments | {"max_model_len": length, **settings.backend_args}


def _length(model: Any, settings: EvaluateSettings) -> int:
    return min(settings.max_length, positions_of(model) or settings.max_length)


def server(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: EvaluateSettings, new_tokens: int
) -> contextlib.AbstractContextManager[Endpoint]:
    """A loaded model behind an OpenAI-compatible address; no progress bar of one answer each."""
    language = language_model(model, tokenizer, settings)
    vars(language)["generate_until"] = functools.partial(language.generate_until, disable_tqdm=True)
    return serve_loaded(language, new_tokens)


def vllm_server(
    path: Path | str, served: str, settings: EvaluateSettings, new_tokens: int, log: Path
) -> contextlib.AbstractContextManager[Endpoint]:
    """vLLM's server on a checkpoint, with the arguments of `vllm_model`; its turns are rendered as `_speak` has it."""
    arguments = _engine_arguments(path, settings)
    for name in _OF_THE_HARNESS:
        arguments.pop(name, None)
    if settings.chat_template_kwargs:
        arguments["default_chat_template_kwargs"] = dict(settings.chat_template_kwargs)
    if not load_tokenizer(path).chat_template:
        arguments["chat_template"] = PLAIN_CHAT
    return serve_vllm(arguments.pop("pretrained"), served, arguments, new_tokens, log)


def _speak(language: Any, settings: EvaluateSettings) -> LM:
    """The model, asked by its chat template as training renders it, or by `plain_chat` where it has none.

    Its answers are text without special tokens but for those that mark thinking, which the scores leave out: the
    harness's model of transformers prints none of them, its model of vLLM all.
    vLLM's model of the harness forgets `enable_thinking: false` and refuses true, so neither calls the template itself.
    """
    kwargs = template_arguments(settings.chat_template_kwargs)
    template = functools.partial(_templated, language.tokenizer, kwargs)
    given: dict[str, Any] = {"apply_chat_template": template if language.tokenizer.chat_template else plain_chat}
    given["tok_decode"] = functools.partial(language.tokenizer.decode, skip_special_tokens=False)
    given["generate_until"] = functools.partial(_generated, language.generate_until, _unsaid(language.tokenizer))
    vars(language).update(given)
    return language


def _unsaid(tokenizer: Any) -> re.Pattern[str]:
    """Its special tokens, but for those that mark thinking."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = {token for token in [*tokenizer.all_special_tokens, *added] if token and not marks_thinking(token)}
    return re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))


def _generated(
    generate: Callable[..., list[str]], unsaid: re.Pattern[str], requests: list[Any], disable_tqdm: bool = False
) -> list[str]:
    return [unsaid.sub("", text) for text in generate(requests, disable_tqdm)]


def _templated(
    tokenizer: Any, kwargs: dict[str, Any], history: list[dict[str, str]], add_generation_prompt: bool = True
) -> str:
    how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
    return tokenizer.apply_chat_template(history, tokenize=False, **how, **kwargs)


def plain_chat(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """A conversation for a model without a chat template: `Question: ...`, `Answer: ...`, a blank line between turns.

    A question that asks for its answer itself, at its end, is left as it is.
    """
    return _PLAIN_CHAT.render(messages=history)


def give_room(language: Any, benchmark: Benchmark) -> None:
    """Set each task's answer limit to what its longest prompt leaves of the context, if that is less than it asks for.

    The harness cuts prompts instead, from the left, and says so in a log line. One limit for all answers of a task:
    they are batched by it. Raises DataError where fewer than MIN_ANSWER tokens (or all it asks for) would be left.
    """
    for name, task in benchmark.tasks.items():
        if task.OUTPUT_TYPE != "generate_until":
            continue
        if not language.tokenizer.chat_template and not task.get_config("generation_kwargs").get("until"):
            task.set_config(key="generation_kwargs", value={"until": STOPS}, update=True)
        with quiet():
            task.build_all_requests(
                samples=benchmark.documents and benchmark.documents[name],
                apply_chat_template=True,
                fewshot_as_multiturn=True,
                chat_template=language.apply_chat_template,
            )
        longest = max(len(language.tok_encode(request.args[0])) for request in task.instances)
        asked = normalize_gen_kwargs(task.get_config("generation_kwargs"), language.max_gen_toks)
        wanted = int(asked["max_gen_toks"])
        room = language.max_length - longest
        if room < min(wanted, MIN_ANSWER):
            raise DataError(
                f"a prompt of {longest} tokens leaves {max(room, 0)} of data.max_length={language.max_length} for the "
                f"answer, and {name} asks for {wanted}; raise data.max_length or leave the task out"
            )
        task.set_config(key="generation_kwargs", value={"max_gen_toks": min(wanted, room)}, update=True)


def run_benchmarks(language: Any, benchmarks: list[Benchmark]) -> list[tuple[dict[str, Any], list[Sample]]]:
    """(record fields, samples) of each, all asked at once: as the task files say, chat template applied, seeds fixed.

    Calls the harness's `evaluate`, not `simple_evaluate`, which inspects packages and git at each call.
    """
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    tasks = {name: task for one in benchmarks for name, task in one.tasks.items()}
    groups = {name: group for one in benchmarks for name, group in one.groups.items()}
    documents = {name: chosen for one in benchmarks for name, chosen in (one.documents or {}).items()}
    # without a template, choices are weighed where the task's own text ends
    writes = any(task.OUTPUT_TYPE == "generate_until" for task in tasks.values())
    as_chat = writes or bool(language.tokenizer.chat_template)
    with quiet():
        results = evaluate(
            lm=language,
            task_dict={"tasks": tasks, "groups": groups},
            samples=documents or None,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=as_chat,
            fewshot_as_multiturn=as_chat,
        )
    fit = Fit(language.max_length, lambda text: len(language.tok_encode(text, add_special_tokens=False)))
    outcomes = []
    for one in benchmarks:
        own = {**results, "samples": {name: rows for name, rows in results["samples"].items() if name in one.tasks}}
        record, samples = convert(own, one.name, one.metric, fit)
        outcomes.append(({**record, "task_version": one.version, "harness": harness_version()}, samples))
    return outcomes


def harness_version() -> str:
    """'lm_eval 0.4.13'."""
    return f"lm_eval {importlib.metadata.version('lm_eval')}"
