"""Started by `bfcl` with the Python of bfcl-eval's own environment: questions, answers and scores of chosen categories.

The endpoint is in OPENAI_BASE_URL, the folder for everything in BFCL_PROJECT_ROOT, which holds request.json:
{model, counts: {category: first questions of it, or null for all}, threads, stop: texts that end an answer}. Every
model is asked by the same handler, bfcl-eval's for chat completions, with the functions in the prompt; what a model
thinks aloud is left out.
"""

import ast
import importlib.metadata
import json
import operator
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from bfcl_eval import _llm_response_generation as generation
from bfcl_eval import utils
from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING, ModelConfig
from bfcl_eval.eval_checker import eval_runner
from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils
from bfcl_eval.model_handler import utils as reading
from bfcl_eval.model_handler.api_inference.openai_completion import OpenAICompletionsHandler

from eaft_verl.grading.answers import said

_LARGE = 10**12
_PATIENCE = 3600.0  # seconds for an answer: a long one, or one behind others; the client's own are 600
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class _Handler(OpenAICompletionsHandler):
    """Answers without their thinking, in the score and in the next turn's history."""

    stop: ClassVar[list[str]] = []

    def generate_with_backoff(self, **kwargs: Any) -> Any:
        return super().generate_with_backoff(**kwargs, **({"stop": self.stop} if self.stop else {}))

    def _build_client_kwargs(self) -> dict[str, Any]:
        return {**super()._build_client_kwargs(), "timeout": _PATIENCE}

    def _parse_query_response_prompting(self, api_response: Any) -> dict[str, Any]:
        text = said(api_response.choices[0].message.content or "").strip()
        found = super()._parse_query_response_prompting(api_response)
        message = {"role": "assistant", "content": text}
        return found | {"model_responses": text, "model_responses_message_for_chat_history": message}

    def _add_reasoning_content_if_available_prompting(self, api_response: Any, response_data: dict[str, Any]) -> None:
        """Nothing: it has been left out."""


def value_of(text: str) -> Any:
    """The value of arithmetic on numbers, in an argument as a model wrote it: bfcl-eval would run it as Python."""
    return _value(ast.parse(text, mode="eval").body)


def _value(node: ast.AST) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and abs(node.value) < _LARGE:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"no arithmetic on numbers: {ast.unparse(node)[:80]}")


def called(text: str) -> Any:
    """What `instance.method(literals)` of bfcl-eval's simulated services returns; it would run any Python there."""
    node = ast.parse(text, mode="eval").body
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr.startswith("_"):
        raise ValueError("no call of a function that is offered")
    instance = node.func.value
    if not isinstance(instance, ast.Name) or not instance.id.endswith("_instance"):
        raise ValueError("no call of a function that is offered")
    method = getattr(vars(multi_turn_utils)[instance.id], node.func.attr)
    arguments = [ast.literal_eval(argument) for argument in node.args]
    return method(*arguments, **{str(item.arg): ast.literal_eval(item.value) for item in node.keywords})


def main() -> None:
    """Answers and scores as bfcl-eval's own files; questions.json besides."""
    vars(reading)["eval"] = value_of
    vars(multi_turn_utils)["eval"] = called
    folder = Path(os.environ["BFCL_PROJECT_ROOT"])
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    name, _Handler.stop = request["model"], request["stop"]
    about = {"display_name": name, "url": "", "org": "", "license": "", "is_fc_model": False}
    MODEL_CONFIG_MAPPING[name] = ModelConfig(model_name=name, model_handler=_Handler, **about)
    rows = {
        category: utils.load_dataset_entry(category, include_prereq=False)[:count]
        for category, count in request["counts"].items()
    }
    chosen = {category: [row["id"] for row in entries] for category, entries in rows.items()}
    (folder / "test_case_ids_to_generate.json").write_text(json.dumps(chosen), encoding="utf-8")
    questions = {row["id"]: row["question"] for entries in rows.values() for row in entries}
    (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
    (folder / "version.txt").write_text(importlib.metadata.version("bfcl-eval"), encoding="utf-8")
    given = {"model": [name], "test_category": list(chosen), "temperature": 0.0, "run_ids": True, "result_dir": None}
    given |= {"num_threads": request["threads"], "include_input_log": False, "exclude_state_log": True}
    generation.main(SimpleNamespace(**given, allow_overwrite=False))
    vars(eval_runner)["generate_leaderboard_csv"] = lambda *_: None  # of no use here, and no table of one question
    eval_runner.main([name], list(chosen), None, None, partial_eval=True)


if __name__ == "__main__":
    main()
