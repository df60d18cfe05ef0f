"""An OpenAI-compatible endpoint that misbehaves as it is told, and remembers who asked what."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "stub-teacher"


@dataclass
class Reply:
    """What is sent. cut: bytes of the body after which the connection is closed.

    hang: seconds before anything, or until the endpoint is closed.
    """

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    hang: float = 0.0


def completion(content: Any, finish: Any = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion of 10 + 5 tokens."""
    message = {"role": "assistant", "content": content, **message}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    choices = [{"index": 0, "message": message, "finish_reason": finish}]
    return {"id": "x", "object": "chat.completion", "created": 1, "model": MODEL, "choices": choices, "usage": usage}


def asked(body: dict[str, Any]) -> str:
    """The last user turn of a request."""
    return next(turn["content"] for turn in reversed(body["messages"]) if turn["role"] == "user")


def right(body: dict[str, Any]) -> Reply:
    """The sum of the two numbers of the question."""
    a, b = map(int, re.findall(r"\d+", asked(body))[:2])
    return Reply(body=completion(f"{a} + {b} = \\boxed{{{a + b}}}"))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who was killed while asking is not news."""


class StubEndpoint:
    """behave: (request, how often this prompt and seed were asked before) -> Reply. A context manager."""

    def __init__(self, behave: Callable[[dict[str, Any], int], Reply] | None = None, models: Any = (MODEL,)) -> None:
        self.behave = behave or (lambda body, before: right(body))
        self.models = models
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.times: list[float] = []
        self._counts: Counter[tuple[str, int]] = Counter()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                models = stub.models
                known = models if isinstance(models, Reply) else Reply(body={"data": [{"id": one} for one in models]})
                stub.send(self, known)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub._lock:
                    stub.keys.add(self.headers.get("Authorization", ""))
                    place = (asked(body), body.get("seed", -1))
                    before = stub._counts[place]
                    stub._counts[place] += 1
                    stub.requests.append(body)
                    stub.times.append(time.monotonic())
                stub.send(self, stub.behave(body, before))

            def log_message(self, *words: Any) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def send(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        """One reply, or what is to come of it."""
        if reply.hang:
            self._closed.wait(reply.hang)
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        try:
            handler.send_response(reply.status)
            for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data[: reply.cut])
            handler.wfile.flush()
        except OSError:  # whoever asked has gone
            pass
        if reply.cut is not None:
            handler.close_connection = True

    def asked_for(self, text: str) -> int:
        """How many requests had this text in their last user turn."""
        return sum(text in asked(body) for body in self.requests)

    def __enter__(self) -> "StubEndpoint":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
