"""A language model of the harness that says what it is told to: benchmarks are scored on answers known beforehand."""

from collections.abc import Callable
from typing import Any

from lm_eval.api.model import LM
from tiny import tiny_tokenizer


class Scripted(LM):
    """answers: (prompt, number of this answer to it) -> text. weights: (prompt, choice) -> log-likelihood."""

    max_length, max_gen_toks, tokenizer_name = 100_000, 256, "tiny"

    def __init__(
        self,
        answers: Callable[[str, int], str] = lambda prompt, number: "",
        weights: Callable[[str, str], float] = lambda prompt, choice: 0.0,
        *,
        template: bool = True,
    ) -> None:
        super().__init__()
        self.answers, self.weights, self.tokenizer = answers, weights, tiny_tokenizer()
        self.settings: list[dict[str, Any]] = []
        if not template:
            self.tokenizer.chat_template = None

    def apply_chat_template(self, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, text: str, **_: Any) -> list[int]:
        return self.tokenizer.encode(text)

    def generate_until(self, requests: list[Any]) -> list[str]:
        seen: dict[str, int] = {}
        texts = []
        for request in requests:
            prompt, settings = request.args
            self.settings.append(settings)
            texts.append(self.answers(prompt, seen.setdefault(prompt, 0)))
            seen[prompt] += 1
        return texts

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(self.weights(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError
