"""BFCL: bfcl-eval's files read by hand-made ones; and, where its environment exists, a stub that answers as told."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from eaft_verl.errors import ConfigError, RunError
from eaft_verl.evaluation import bfcl
from eaft_verl.evaluation.endpoint import Endpoint
from eaft_verl.evaluation.settings import EvaluateSettings

NOWHERE = Endpoint("http://127.0.0.1:9/v1", "key", max_length=100, new_tokens=20)


def test_a_limit_goes_around_the_categories():
    assert bfcl.counts_of(None) == dict.fromkeys(bfcl.CATEGORIES)
    assert len(bfcl.CATEGORIES) == 17
    counts = bfcl.counts_of(20)
    assert sum(counts.values()) == 20 and set(counts.values()) == {1, 2}
    assert list(bfcl.counts_of(2)) == ["simple_python", "simple_java"]


def left(folder: Path, category: str, answers: dict[str, str], wrong: list[str]) -> None:
    """A category's files as bfcl-eval leaves them."""
    header = {"accuracy": 0.0, "correct_count": len(answers) - len(wrong), "total_count": len(answers)}
    files = {
        "result": [{"id": name, "result": answer} for name, answer in answers.items()],
        "score": [header, *({"id": name, "valid": False} for name in wrong)],
    }
    for kind, rows in files.items():
        path = folder / kind / bfcl.MODEL / "group" / f"BFCL_v4_{category}_{kind}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = folder / "questions.json"
    known = json.loads(questions.read_text()) if questions.exists() else {}
    questions.write_text(json.dumps(known | {name: [[{"role": "user", "content": "Q"}]] for name in answers}))


def test_scores_are_those_of_its_files(tmp_path: Path):
    left(tmp_path, "simple_python", {"simple_python_0": "[f(a=1)]", "simple_python_1": "no"}, ["simple_python_1"])
    left(tmp_path, "irrelevance", {"irrelevance_0": "I cannot."}, [])
    record, samples = bfcl.read_scores(tmp_path, NOWHERE)
    assert {sample["id"]: sample["scores"]["accuracy"] for sample in samples} == {
        "simple_python_0": 1.0, "simple_python_1": 0.0, "irrelevance_0": 1.0,
    }  # fmt: skip
    assert record["categories"] == {"simple_python": {"right": 1, "n": 2}, "irrelevance": {"right": 1, "n": 1}}
    assert record["metrics"]["accuracy"]["score"] == pytest.approx(2 / 3)
    assert "overall" not in record["metrics"]  # not every category was asked


def test_overall_by_hand(tmp_path: Path):
    """Non-live: simple (1 + 0 + 0)/3, the four others 1, 1, 0, 0: (1/3 + 2)/5 = 7/15. Live: 1 of 12 questions.
    Multi-turn: 1, 0, 0, 0: 1/4. Overall: (7/15 + 1/12 + 1/4)/3 = 4/15."""
    right = {"simple_python", "multiple", "parallel", "multi_turn_base"}
    for category in bfcl.CATEGORIES:
        names = [f"{category}_{number}" for number in range(2)]
        wrong = [] if category in right else names[1:] if category == "live_simple" else names
        left(tmp_path, category, dict.fromkeys(names, "x"), wrong)
    record, samples = bfcl.read_scores(tmp_path, NOWHERE)
    assert (
        record["metrics"]["overall"]["score"] == pytest.approx((7 / 15 + 1 / 12 + 1 / 4) / 3) == pytest.approx(4 / 15)
    )
    assert len(samples) == record["n"] == 34


def test_answers_that_never_came_are_no_wrong_answers(tmp_path: Path):
    broken = "Error during inference: Connection error."
    left(tmp_path, "multiple", {"multiple_0": broken, "multiple_1": "x"}, ["multiple_0", "multiple_1"])
    with pytest.raises(RunError, match=r"1 of 2 questions of multiple have no answer \(Error during inference"):
        bfcl.read_scores(tmp_path, NOWHERE)
    bfcl._drop_failed(tmp_path)
    (result,) = tmp_path.rglob("*_result.json")
    assert [json.loads(line)["id"] for line in result.read_text().splitlines()] == ["multiple_1"]
    no_template = "Error during inference: Error code: 400 - {'message': 'no chat template is defined'}"
    left(tmp_path, "multiple", {"multiple_0": no_template}, ["multiple_0"])
    with pytest.raises(RunError, match="no chat template"):
        bfcl.read_scores(tmp_path, NOWHERE)
    left(tmp_path, "multiple", {"multiple_0": "x", "multiple_1": "y"}, ["multiple_0"])
    next(tmp_path.rglob("*_score.json")).write_text('{"correct_count": 2, "total_count": 2}\n{"id": "multiple_0"}\n')
    with pytest.raises(RunError, match="score of multiple counts"):
        bfcl.read_scores(tmp_path, NOWHERE)


def test_what_was_cut_is_counted_and_a_question_that_did_not_fit_is_wrong(tmp_path: Path):
    """Of 100 tokens and 20 of an answer: 20 written is cut, 5 behind a prompt of 95 too, 19 and 20 of 21 not.

    bfcl-eval finds no call in an endpoint's refusal, which is what `irrelevance` wants.
    """
    refused = "Error during inference: Error code: 400 - {'message': 'maximum context length is 100'}"
    counts = {"whole": (10, 19), "cut": (10, 20), "full": (95, 5), "turns": ([[9, 30], [95]], [[19, 1], [5]])}
    left(tmp_path, "irrelevance", {"refused": refused, **dict.fromkeys(counts, "no")}, [])
    (result,) = tmp_path.rglob("*_result.json")
    rows = [json.loads(line) for line in result.read_text().splitlines()]
    for row in rows[1:]:
        row["input_token_count"], row["output_token_count"] = counts[row["id"]]
    result.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record, samples = bfcl.read_scores(tmp_path, NOWHERE)
    found = {sample["id"]: (sample["scores"]["accuracy"], sample.get("truncated")) for sample in samples}
    assert found == {
        "refused": (0.0, "prompt"), "whole": (1.0, None), "cut": (1.0, "answer"), "full": (1.0, "answer"),
        "turns": (1.0, "answer"),
    }  # fmt: skip
    assert record["truncated"] == {"prompts": 1, "answers": 3} and record["truncation_rate"] == 4 / 5


def test_without_its_environment_the_command_to_make_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("EAFT_BFCL_PYTHON", str(tmp_path / "none"))
    settings = EvaluateSettings(target=["bfcl_v3"])
    with pytest.raises(ConfigError, match=r"evaluate.target\[0\]: bfcl_v3 .*bash examples/setup_bfcl.sh"):
        settings.check()
    settings.check(dry_run=True)


ANSWERS = {  # of the first questions: right by their text, wrong by value, name, count, or by calling where none fits
    "Find the area of a triangle with a base of 10 units": "[calculate_triangle_area(base=5*2, height=5)]",
    "Calculate the factorial of 5": "<think>[math.factorial(number=4)]</think>\n\n[math.factorial(number=5)]",
    "Calculate the hypotenuse of a right triangle": "[math.hypot(x=4, y=6)]",
    "Find the roots of a quadratic equation": "[algebra.quadratic_roots(a=1, b=__import__('os').getpid(), c=2)]",
    "Solve a quadratic equation where": "I do not know.",
    # four turns of multi_turn_base_0, played out among bfcl-eval's simulated services
    "Move 'final_report.pdf' within": "[cd(folder='document'), mkdir(dir_name='temp'), "
    "mv(source='final_report.pdf', destination='temp')]",
    "Perform a detailed search using grep": "[cd(folder='temp'), "
    "grep(file_name='final_report.pdf', pattern='budget analysis')]",
    "sort the 'final_report.pdf' by line": "[sort(file_name='final_report.pdf')]",
    "Move 'previous_report.pdf' in": "[cd(folder='..'), mv(source='previous_report.pdf', destination='temp'), "
    "cd(folder='temp'), diff(file_name1='final_report.pdf', file_name2='previous_report.pdf')]",
}
RIGHT = {"simple_python_0": 1, "simple_python_1": 1, "simple_python_2": 0, "simple_python_3": 0, "simple_python_4": 0}


class _Stub(BaseHTTPRequestHandler):
    stop: Any = None

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        _Stub.stop = asked.get("stop")
        text = next((a for q, a in ANSWERS.items() if q in asked["messages"][-1]["content"]), "I cannot do that.")
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        about: dict[str, Any] = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        body = json.dumps({**about, "choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow
def test_known_answers_get_known_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Needs bfcl-eval's environment: EAFT_BFCL_PYTHON=... (bash examples/setup_bfcl.sh makes one)."""
    if not os.environ.get("EAFT_BFCL_PYTHON"):
        pytest.skip("EAFT_BFCL_PYTHON names no Python with bfcl-eval; bash examples/setup_bfcl.sh makes one")
    counts = {"simple_python": 5, "irrelevance": 2, "multi_turn_base": 2}
    monkeypatch.setattr(bfcl, "counts_of", lambda limit: counts)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "key", max_length=4096, new_tokens=256)
    try:
        record, samples = bfcl.run_bfcl(endpoint, tmp_path / "bfcl", None, threads=2, stop=["\nQuestion:"])
    finally:
        server.shutdown()
        server.server_close()
    scores = {sample["id"]: sample["scores"]["accuracy"] for sample in samples}
    assert scores == RIGHT | {
        "irrelevance_0": 1, "irrelevance_1": 1, "multi_turn_base_0": 1, "multi_turn_base_1": 0,
    }  # fmt: skip
    assert _Stub.stop == ["\nQuestion:"] and record["truncation_rate"] == 0
    assert record["categories"]["simple_python"] == {"right": 2, "n": 5}
    assert record["harness"].startswith("bfcl-eval 20")
    monkeypatch.setattr(bfcl, "counts_of", lambda limit: {"irrelevance": 1})
    with pytest.raises(RunError, match=r"1 of 1 questions of irrelevance have no answer \(.*Connection error"):
        bfcl.run_bfcl(endpoint, tmp_path / "gone", None, threads=2)
