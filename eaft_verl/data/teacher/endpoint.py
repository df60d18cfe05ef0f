"""One request to an OpenAI-compatible endpoint: asked again with growing pauses until it is answered or given up.

The client's own retries are off: it would not ask again for a reply that is no JSON or holds no text, and one worker
would not hear of another's Retry-After.
"""

import asyncio
import importlib.util
import json
import random
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time
from typing import TYPE_CHECKING, Any

from eaft_verl.data.spec import RowError
from eaft_verl.data.teacher.prompts import Prompt
from eaft_verl.data.teacher.spec import Endpoint, Sampling
from eaft_verl.data.validate import check_fields
from eaft_verl.errors import ConfigError, Lost

if TYPE_CHECKING:
    import openai

PACKAGE = "eaft synthesize needs the package openai, which is not installed: pip install 'eaft-verl[synthesize]'"
LONGEST_PAUSE = 60.0  # seconds between attempts, unless Retry-After asks for more
MOST_PATIENCE = 600.0  # seconds that Retry-After may ask for; beyond it is a quota, and the run ends
_AGAIN = {408, 409, 425, 429}  # and 5xx
_FATAL = {401, 404}  # of every request alike
_WHOLE = ("stop", "tool_calls", "function_call")


class BrokenReply(Exception):
    """A reply with status 200 that is no answer. final: it is one, but nothing to train on, and would be again."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


@dataclass
class Trouble:
    """What an attempt failed with. again: whether asking again may help; pause: seconds that the endpoint asks for.

    final: the model has answered, with nothing to train on; a later run does not ask again.
    """

    words: str
    again: bool = True
    pause: float | None = None
    final: bool = False


def check_package() -> None:
    """ConfigError with the command that installs it, unless openai is there."""
    if importlib.util.find_spec("openai") is None:
        raise ConfigError(PACKAGE)


class Teacher:
    """An endpoint under its limits of rate and patience. To be made and used within one event loop."""

    def __init__(self, endpoint: Endpoint, sampling: Sampling) -> None:
        import openai

        self.endpoint, self.sampling = endpoint, sampling
        self.client = openai.AsyncOpenAI(
            base_url=endpoint.url, api_key=endpoint.api_key or "none", max_retries=0, timeout=endpoint.timeout
        )
        self._next = 0.0  # loop time at which the next request may start
        self._spacing = 60 / endpoint.requests_per_minute if endpoint.requests_per_minute else 0.0

    async def served(self) -> list[str]:
        """Ids of the models that the endpoint lists; [] where it keeps no list. ConfigError if it cannot be reached."""
        import openai

        try:
            raw = await asyncio.wait_for(self.client.models.with_raw_response.list(), min(self.endpoint.timeout, 30))
            listed = json.loads(raw.http_response.text)
            return [str(one["id"]) for one in listed["data"]]
        except (openai.APIConnectionError, asyncio.TimeoutError) as error:
            raise ConfigError(
                f"endpoint.url={self.endpoint.url} cannot be reached ({_first_line(error)}); is the server "
                "up, and does the address end in /v1?"
            ) from None
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise ConfigError(f"{self.endpoint.url} refuses: {_status(error)}; {_KEY_ADVICE}") from None
            return []
        except (ValueError, KeyError, TypeError, RecursionError):
            return []

    async def refusal(self, model: str) -> str:
        """Why the endpoint refuses a model that it does not list, asked for one token; '' if it does not.

        Trouble that may pass (no connection, 429, 5xx) is no refusal: requests deal with it.
        """
        import openai

        asked = self.client.chat.completions.with_raw_response.create(
            model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=1
        )
        try:
            await asyncio.wait_for(asked, self.endpoint.timeout)
        except openai.APIStatusError as error:
            passing = error.status_code in _AGAIN or error.status_code >= 500
            return "" if passing else _status(error)
        except (openai.APIConnectionError, asyncio.TimeoutError):
            return ""
        return ""

    async def answer(self, prompt: Prompt, sample: int, model: str) -> dict[str, Any]:
        """A row of the answer file. Raises Lost where no request can be answered any more."""
        body = self._body(prompt, sample, model)
        trouble = Trouble("never asked")
        for attempt in range(1, self.endpoint.attempts + 1):
            await self._turn()
            try:
                found = await asyncio.wait_for(self._ask(body), self.endpoint.timeout)
                return {"key": prompt.key, "sample": sample, "outcome": "answered", **found, "attempts": attempt}
            except Exception as error:
                trouble = self._trouble(error)
            if not trouble.again or attempt == self.endpoint.attempts:
                break
            await self._pause(attempt, trouble)
        failed = {"key": prompt.key, "sample": sample, "outcome": "failed"}
        return {**failed, "error": trouble.words, "final": trouble.final, "attempts": attempt}

    async def close(self) -> None:
        """Close its connections."""
        await self.client.close()

    def _body(self, prompt: Prompt, sample: int, model: str) -> dict[str, Any]:
        settings = self.sampling
        body: dict[str, Any] = {
            "model": model,
            "messages": [_sent(turn) for turn in prompt.messages],
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_tokens,
            "seed": int(prompt.key[:7], 16) + sample,  # the same request is the same wherever it is asked again
        }
        if prompt.tools:
            body["tools"] = prompt.tools
        return body | ({"extra_body": dict(settings.extra)} if settings.extra else {})

    async def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        raw = await self.client.chat.completions.with_raw_response.create(**body)
        return read_reply(raw.http_response.text)

    async def _turn(self) -> None:
        """Wait for this request's place in the rate, and for whatever pause the endpoint has asked of all."""
        loop = asyncio.get_running_loop()
        start = max(loop.time(), self._next)
        self._next = start + self._spacing
        await asyncio.sleep(max(0.0, start - loop.time()))

    async def _pause(self, attempt: int, trouble: Trouble) -> None:
        if trouble.pause is not None:  # of all requests: the limit is that of the key
            self._next = max(self._next, asyncio.get_running_loop().time() + trouble.pause)
            return
        longest = min(LONGEST_PAUSE, self.endpoint.backoff * 2 ** (attempt - 1))
        await asyncio.sleep(longest * random.uniform(0.5, 1))  # not all at the same instant

    def _trouble(self, error: Exception) -> Trouble:
        """What to do about an error; Lost, or the error itself, where nothing can be done."""
        import openai

        if isinstance(error, BrokenReply):
            return Trouble(str(error), final=error.final)
        if isinstance(error, openai.APIConnectionError | asyncio.TimeoutError):
            hung = isinstance(error, openai.APITimeoutError | asyncio.TimeoutError)
            return Trouble(f"no reply within {self.endpoint.timeout:g} s" if hung else _first_line(error))
        if not isinstance(error, openai.APIStatusError):
            raise error
        words = _status(error)
        if error.status_code in _FATAL:
            advice = _KEY_ADVICE if error.status_code == 401 else "is endpoint.model the name of a model there?"
            raise Lost(f"{self.endpoint.url} refuses: {words}; {advice}")
        pause = _retry_after(error)
        if pause is not None and pause > MOST_PATIENCE:
            raise Lost(f"{self.endpoint.url} asks to come back in {pause / 60:.0f} minutes ({words}); try again then")
        again = error.status_code in _AGAIN or error.status_code >= 500
        return Trouble(words, again, pause)


_KEY_ADVICE = "endpoint.api_key: ${oc.env:NAME} takes the key from a variable (default: OPENAI_API_KEY)"


def read_reply(text: str) -> dict[str, Any]:
    """finish, content, reasoning, tool_calls and tokens of a chat completion; BrokenReply where it has no answer.

    Reasoning is taken from `reasoning_content` (vLLM, DeepSeek) or `reasoning` (vLLM from 0.12, OpenRouter).
    """
    try:
        found = _reply_parts(json.loads(text))
    except (ValueError, RecursionError):
        raise BrokenReply(f"the reply is no JSON: {text[:60]!r}") from None
    except (KeyError, IndexError, TypeError, AttributeError):
        raise BrokenReply(f"the reply is no chat completion: {text[:60]!r}") from None
    content, finish = found["content"], found["finish"]
    if not isinstance(content, str) or not isinstance(found["reasoning"], str | None):
        raise BrokenReply("the reply's content is no text")
    if finish == "content_filter":
        raise BrokenReply("the endpoint's content filter cut the answer", final=True)
    if finish not in (*_WHOLE, "length"):
        raise BrokenReply(f"the reply has finish_reason {finish!r}: it may not be whole")
    if finish != "length" and not content.strip() and not found["tool_calls"]:
        raise BrokenReply("the answer is empty", final=True)
    try:
        check_fields({key: found[key] for key in ("content", "reasoning", "tool_calls")})
    except RowError as error:
        raise BrokenReply(f"the answer cannot be trained on: {error}", final=True) from None
    return found


def _reply_parts(reply: Any) -> dict[str, Any]:
    choice, usage = reply["choices"][0], reply.get("usage") or {}
    message = choice["message"]
    return {
        "finish": choice.get("finish_reason"),
        "content": message.get("content") or "",
        "reasoning": message.get("reasoning_content") or message.get("reasoning"),
        "tool_calls": message.get("tool_calls") or None,
        **{key: None if usage.get(key) is None else int(usage[key]) for key in _USAGE},
    }


_USAGE = ("prompt_tokens", "completion_tokens")


def _sent(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn as the API takes it: arguments of tool calls are text there."""
    sent = {key: turn[key] for key in ("role", "content", "name", "tool_call_id") if turn.get(key) is not None}
    if calls := turn.get("tool_calls"):
        sent["tool_calls"] = [_call(call, at) for at, call in enumerate(calls)]
    return sent


def _call(call: dict[str, Any], at: int) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    named = {"name": function.get("name", ""), "arguments": text}
    return {"id": str(call.get("id") or f"call_{at}"), "type": "function", "function": named}


def _retry_after(error: "openai.APIStatusError") -> float | None:
    """Seconds of the header Retry-After, which holds seconds or a date; None without a sensible one."""
    value = error.response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except (ValueError, TypeError):
        return None


def _status(error: "openai.APIStatusError") -> str:
    return f"HTTP {error.status_code}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (said if cause is error or not str(cause) else f"{said} {str(cause).splitlines()[0]}")[:200]
