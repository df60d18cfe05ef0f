"""The small server in front of a loaded model: what it answers, and to whom."""

import json
import urllib.error
import urllib.request
from typing import Any

import pytest
from scripted import Scripted

from eaft_verl.errors import RunError
from eaft_verl.evaluation.endpoint import Endpoint, serve_loaded, serve_vllm


def post(endpoint: Endpoint, content: dict[str, Any], key: str | None = None) -> tuple[int, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {key or endpoint.key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{endpoint.url}/chat/completions", json.dumps(content).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_it_answers_as_the_chat_template_asks():
    language = Scripted(
        lambda prompt, number: "Four." if prompt.endswith("2 + 2?<|im_end|>\n<|im_start|>assistant\n") else "?"
    )
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    with serve_loaded(language, new_tokens=40) as endpoint:
        assert (endpoint.max_length, endpoint.new_tokens) == (language.max_length, 40)
        assert endpoint.url.startswith("http://127.0.0.1:")
        code, answer = post(endpoint, {"model": "m", "messages": turns, "temperature": 0.0})
        assert code == 200 and answer["choices"][0]["finish_reason"] == "stop"
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Four."}
        assert answer["usage"]["prompt_tokens"] == len(language.tok_encode(language.apply_chat_template(turns)))
        assert (language.settings[-1]["max_gen_toks"], language.settings[-1]["until"]) == (40, [])
        assert post(endpoint, {"messages": turns}, key="guessed")[0] == 401
        assert post(endpoint, {"messages": turns, "max_tokens": 2})[1]["choices"][0]["finish_reason"] == "length"
        assert language.settings[-1]["max_gen_toks"] == 2
        post(endpoint, {"messages": turns, "max_completion_tokens": 3, "stop": ["\n"]})
        assert (language.settings[-1]["max_gen_toks"], language.settings[-1]["until"]) == (3, ["\n"])
        language.max_length = 10
        code, answer = post(endpoint, {"messages": turns})
        assert code == 400 and "maximum context length is 10" in answer["error"]["message"]
        assert post(endpoint, {"messages": "no list"})[0] == 400
        language.max_length, language.answers = 1000, None  # what breaks while it answers is an error, no wrong answer
        assert post(endpoint, {"messages": turns})[0] == 500
    with pytest.raises(urllib.error.URLError):
        post(endpoint, {"messages": turns})


def test_a_vllm_server_that_does_not_come_up_is_named_with_its_log(tmp_path, monkeypatch):
    """Its command line: `echo` stands in for Python and leaves it in the log."""
    monkeypatch.setattr("sys.executable", "/bin/echo")
    log = tmp_path / "server.log"
    arguments = {"dtype": "float32", "enforce_eager": True, "revision": None, "max_model_len": 64}
    with (
        pytest.raises(RunError, match=r"ended with code 0 before it answered; see .*server.log"),
        serve_vllm("m", "eaft", arguments, 40, log),
    ):
        pass
    said = log.read_text()
    assert "--dtype=float32 --enforce-eager --max-model-len=64" in said and "revision" not in said
    assert """--override-generation-config={"max_new_tokens": 40}""" in said
