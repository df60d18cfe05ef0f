"""A checkpoint behind an OpenAI-compatible address on this machine: vLLM's server, or transformers behind a small one.

Only for programs that ask no other way. It listens on loopback and answers to a key made for the occasion.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from eaft_verl.errors import RunError

STARTS_IN = 1800.0  # seconds that a server may take to load a model
_MOST = 64 * 2**20  # bytes of a request


@dataclass(frozen=True)
class Endpoint:
    """Where the model answers: base address, ending in /v1, and key.

    max_length: tokens of prompt and answer together; new_tokens: of an answer, where a request does not ask for fewer.
    """

    url: str
    key: str
    max_length: int
    new_tokens: int


@contextlib.contextmanager
def serve_loaded(language: Any, new_tokens: int) -> Iterator[Endpoint]:
    """The harness's view of a loaded transformers model, one greedy answer at a time; no tools, no streaming."""
    key, lock = secrets.token_hex(16), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            if self.headers.get("Authorization") != f"Bearer {key}" or not 0 < size <= _MOST:
                return self._reply(401, {"error": {"message": "wrong key or size"}})
            try:
                asked = json.loads(self.rfile.read(size))
                turns = [{name: turn[name] for name in ("role", "content")} for turn in asked["messages"]]
            except (ValueError, KeyError, TypeError) as error:
                return self._reply(400, {"error": {"message": f"no chat completion request: {error}"}})
            try:
                with lock:
                    code, answer = _complete(language, turns, {"max_tokens": new_tokens, **asked})
            except Exception as error:  # whatever a model raises: the client must not take it for an answer
                code, answer = 500, {"error": {"message": f"{type(error).__name__}: {error}"}}
            self._reply(code, answer)

        def _reply(self, code: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the answers are kept elsewhere."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1", key, language.max_length, new_tokens)
    finally:
        server.shutdown()
        server.server_close()


def _complete(language: Any, turns: list[dict[str, str]], asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """(HTTP status, chat completion) for a request's messages."""
    from lm_eval.api.instance import Instance

    prompt = language.apply_chat_template(turns)
    used = len(language.tok_encode(prompt))
    room = language.max_length - used
    if room < 1:
        return 400, {
            "error": {"message": f"the maximum context length is {language.max_length}; the prompt has {used}"}
        }
    most = min(room, *(asked[name] for name in ("max_tokens", "max_completion_tokens") if asked.get(name)))
    settings = {"until": asked.get("stop") or [], "do_sample": False, "max_gen_toks": most}
    (text,) = language.generate_until([Instance("generate_until", {}, (prompt, settings), 0)])
    written = len(language.tok_encode(text, add_special_tokens=False))
    choice = {"index": 0, "finish_reason": "length" if written >= most else "stop"}
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": used, "completion_tokens": written, "total_tokens": used + written}
    about = {"id": secrets.token_hex(8), "object": "chat.completion", "created": int(time.time())}
    return 200, {**about, "model": asked.get("model", ""), "choices": [{**choice, "message": message}], "usage": usage}


@contextlib.contextmanager
def serve_vllm(
    path: Path | str, served: str, arguments: dict[str, Any], new_tokens: int, log: Path
) -> Iterator[Endpoint]:
    """vLLM's own server in a process of its own, whose end gives the GPUs back. arguments: of its engine.

    new_tokens: see `Endpoint`; a request that names a limit itself would be refused where its prompt leaves less.

    Raises RunError naming the log where it does not come up.
    """
    key = secrets.token_hex(16)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    generation = {**arguments.get("override_generation_config", {}), "max_new_tokens": new_tokens}
    arguments = {**arguments, "override_generation_config": generation}
    options = [_option(name, value) for name, value in arguments.items() if value is not None]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={path}", "--host=127.0.0.1"]
    command += [f"--port={port}", f"--served-model-name={served}", *options]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        environment = {**os.environ, "VLLM_API_KEY": key}  # not in the command, which every user can list
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _await(process, f"http://127.0.0.1:{port}/health", log)
            yield Endpoint(f"http://127.0.0.1:{port}/v1", key, int(arguments["max_model_len"]), new_tokens)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _option(name: str, value: Any) -> str:
    """An engine argument on its server's command line: --dtype=float32, --no-enforce-eager, JSON for mappings."""
    words = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{words}" if value else f"--no-{words}"
    return f"--{words}={json.dumps(value) if isinstance(value, dict | list) else value}"


def _await(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + STARTS_IN
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RunError(f"vLLM's server ended with code {process.returncode} before it answered; see {log}")
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(1.0)
    raise RunError(f"vLLM's server did not answer within {STARTS_IN / 60:.0f} minutes; see {log}")
