"""Pieces of synthesis: specs, rows as prompts, replies, the file of answers, the account. No network."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from eaft_verl.data.leakage import Against
from eaft_verl.data.spec import RowError
from eaft_verl.data.teacher.account import Account, choose
from eaft_verl.data.teacher.answer_file import AnswerFile
from eaft_verl.data.teacher.asking import Verdicts, cost_of, draw_order
from eaft_verl.data.teacher.endpoint import BrokenReply, read_reply
from eaft_verl.data.teacher.prompts import Prompt, Screen, iter_prompts
from eaft_verl.data.teacher.spec import NAMED, parse_spec
from eaft_verl.data.teacher.verify import GradingPool, Verdict, judge
from eaft_verl.errors import ConfigError, DataError, DiskFull, RunError

URL = "http://127.0.0.1:1/v1"


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# spec


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({}, "prompts is missing: a file, a hub id, or numina_math, big_math_verified"),
        ({"prompts": "a.jsonl", "sample": 2}, "unknown key sample; did you mean samples?"),
        ({"prompts": "a.jsonl", "endpoint": {"url": URL, "concurency": 2}}, "did you mean endpoint.concurrency?"),
        ({"prompts": {"a": {"sourc": "x"}}}, "unknown key prompts.a.sourc; did you mean prompts.a.source?"),
        ({"prompts": {"a": {"rows": 3}}}, "prompts.a.source is missing"),
        ({"prompts": {"a": {"source": "x", "columns": {"promt": "q"}}}}, "prompts.a.columns.promt is unknown"),
        (
            {"prompts": "a.jsonl", "endpoint": {"url": "localhost:8000"}},
            "endpoint.url='localhost:8000' must be http://",
        ),
        *(
            ({"prompts": "a.jsonl", "endpoint": url}, f"endpoint.url={url!r} must be http://")
            for url in ("http:///v1", "http://[::1/v1", "http://host:99999/v1", "ftp://host/v1", "")
        ),
        ({"prompts": "a.jsonl", "endpoint": {"url": URL, "prices": {"prompt": 1}}}, "endpoint.prices="),
        ({"prompts": "a.jsonl", "samples": 0}, "samples=0 must be a whole number of at least 1"),
        ({"prompts": "a.jsonl", "rows": 1.5}, "rows=1.5 must be a whole number"),
        ({"prompts": "a.jsonl", "sampling": {"temperature": "hot"}}, "sampling.temperature='hot' must be a number"),
        ({"prompts": "a.jsonl", "sampling": {"top_p": 0}}, "sampling.top_p=0 must be a number in (0, 1]"),
        ({"prompts": "a.jsonl", "keep": 2}, "keep=2 is more than samples=1"),
        ({"prompts": "a.jsonl", "grader": "nmber"}, "grader='nmber' is unknown; choose one of number"),
        ({"prompts": "a.jsonl", "instruction": 5}, "instruction=5 must be text"),
        ({"prompts": ["x/a.jsonl", "y/a.jsonl"]}, "two sources are called 'a'"),
        ({"prompts": "a.jsonl", "keep_instruction": "no"}, "keep_instruction='no' must be true or false"),
    ],
)
def test_a_wrong_key_or_value_is_named(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_spec(tree, "spec.yaml")
    assert words in str(error.value) and "spec.yaml" in str(error.value)


def test_prompts_are_a_name_a_file_a_list_or_a_mapping() -> None:
    sources = parse_spec({"prompts": ["numina_math", "d/mine.jsonl"]}, "s").prompts
    assert sources["numina_math"].source == "AI-MO/NuminaMath-CoT" and sources["mine"].source == "d/mine.jsonl"
    sources = parse_spec({"prompts": {"big_math_verified": {"source": "local.parquet", "rows": 5}}}, "s").prompts
    assert sources["big_math_verified"].columns == {"prompt": "problem", "answer": "answer"}
    assert (sources["big_math_verified"].source, sources["big_math_verified"].rows) == ("local.parquet", 5)
    assert parse_spec({"prompts": {"source": "d/x.jsonl", "rows": 2}}, "s").prompts["x"].rows == 2
    assert {parse_spec({"prompts": name}, "s").prompts[name].source for name in NAMED} == {
        one["source"] for one in NAMED.values()
    }


# rows as prompts


def prompts(tmp_path: Path, *rows: dict[str, Any], **keys: Any) -> list[Any]:
    source = write(tmp_path / "p.jsonl", *rows)
    one = {key: keys.pop(key) for key in ("columns", "difficulty", "thinking") if key in keys}
    return list(iter_prompts(parse_spec({"prompts": {"p": {"source": source, **one}}, **keys}, "s")))


@pytest.mark.parametrize(
    ("row", "columns", "asked", "answer"),
    [
        ({"question": "2+3?", "answer": "5"}, None, ["2+3?"], "5"),
        ({"question": "2+3?", "answer": "so\n#### 5"}, None, ["2+3?"], "5"),
        ({"problem": "2+3?", "solution": "is \\boxed{5}"}, None, ["2+3?"], "5"),
        ({"problem": "2+3?", "solution": "it is five"}, None, ["2+3?"], ""),
        ({"problem": "2+3?", "solution": "\\boxed{9}", "answer": "5"}, None, ["2+3?"], "5"),
        ({"problem": "2+3?"}, None, ["2+3?"], ""),
        ({"Q": "2+3?", "A": "5"}, {"prompt": "Q", "answer": "A"}, ["2+3?"], "5"),
        ({"messages": [{"role": "user", "content": "a"}], "answer": "5"}, None, ["a"], "5"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\\boxed{5}"}]},
            *(None, ["a"], "5"),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b"},
                    {"from": "human", "value": "c"},
                ]
            },
            *(None, ["a", "b", "c"], ""),
        ),
        (
            {"prompt": [{"role": "user", "content": "a"}], "reward_model": {"ground_truth": "5", "style": "rule"}},
            *({"prompt": "prompt", "answer": "reward_model.ground_truth"}, ["a"], "5"),
        ),
        (
            {"x": {"q": "a", "r": "5", "level": 3}},
            *({"prompt": "x.q", "answer": "x.r"}, ["a"], "5"),
        ),
    ],
)
def test_a_row_as_a_prompt(tmp_path: Path, row: Any, columns: Any, asked: list[str], answer: str) -> None:
    (prompt,) = prompts(tmp_path, row, columns=columns)
    assert isinstance(prompt, Prompt), prompt
    assert [turn["content"] for turn in prompt.messages] == asked and prompt.answer == answer


def test_system_and_instruction_are_asked_and_change_the_key(tmp_path: Path) -> None:
    (bare,) = prompts(tmp_path, {"prompt": "2+3?"})
    (told,) = prompts(tmp_path, {"prompt": "2+3?"}, system="Be brief.", instruction="Box it.")
    assert [turn["content"] for turn in told.messages] == ["Be brief.", "2+3?\nBox it."]
    assert told.plain == bare.messages == bare.plain and told.key != bare.key


def test_an_absent_column_is_named_with_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"prompts.p.columns.prompt='Problem': there is no such column; .* has problem, x"
    ):
        prompts(tmp_path, {"problem": "a", "x": 1}, columns={"prompt": "Problem"})
    with pytest.raises(DataError, match=r"prompts.p.difficulty='level'"):
        prompts(tmp_path, {"problem": "a"}, difficulty="level")


def test_rows_that_cannot_be_asked_say_why(tmp_path: Path) -> None:
    thought = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "c"}]}
    found = prompts(tmp_path, {"foo": 1}, {"prompt": "nul \0"}, {"prompt": ""}, thought, thinking=False)
    assert [one[2].kind for one in found] == ["format", "nul", "format", "thinking"]


def test_advice_is_in_the_words_of_the_spec(tmp_path: Path) -> None:
    ((_, _, error),) = prompts(tmp_path, {"problem": "a", "question": "b"})
    assert str(error).endswith("or say which by 'prompts.p.columns={prompt: problem, ignore: [question]}'")


def test_screen_finds_copies_leaks_and_answers_that_cannot_be_graded(tmp_path: Path) -> None:
    leaked = "how many clips did natalia sell altogether in april and may"
    rows = [
        {"prompt": "What is 2 + 3?", "answer": "5"},
        {"prompt": "what is  2 + 3 ?", "answer": "5"},
        {"prompt": leaked + "?", "answer": "72"},
        {"prompt": "What is x?", "answer": "a blue car"},
        {"prompt": "What is y?"},
    ]
    grading = GradingPool("number", 5, 1)
    screen, kinds = Screen(Against({"gsm8k": [leaked]}), grading), []
    for prompt in prompts(tmp_path, *rows):
        try:
            screen.check(prompt)
            kinds.append("")
        except RowError as error:
            kinds.append(error.kind)
    grading.close()
    assert kinds == ["", "duplicate", "leaked", "unverifiable", "unverifiable"]


# replies


def reply(**message: Any) -> str:
    finish = message.pop("finish", "stop")
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}], "usage": {"completion_tokens": 5}})


def test_replies() -> None:
    found = read_reply(reply(content="x", reasoning_content="r"))
    assert found == {
        **{"finish": "stop", "content": "x", "reasoning": "r", "tool_calls": None},
        **{"prompt_tokens": None, "completion_tokens": 5},
    }
    assert read_reply(reply(content="", reasoning="r", finish="length"))["finish"] == "length"
    assert (
        read_reply(reply(content=None, tool_calls=[{"function": {"name": "f"}}], finish="tool_calls"))["content"] == ""
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON"),
        ('{"choices": [{"mess', "no JSON"),
        ("<html>502</html>", "no JSON"),
        ("[" * 100_000, "no JSON"),
        *((text, "no chat completion") for text in ("5", "[1]", "{}", '{"choices": []}', '{"choices": 5}')),
        ('{"choices": [{"message": null}]}', "no chat completion"),
        ('{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "usage": [1]}', "no chat completion"),
        (reply(content=""), "empty"),
        (reply(content="  \n", reasoning_content="long"), "empty"),
        (reply(content="half", finish=None), "may not be whole"),
        (reply(content="x", finish="content_filter"), "content filter"),
        (reply(content=["x"]), "no text"),
        (reply(content="\ud800"), "cannot be trained on"),
        (reply(content="a\0b"), "cannot be trained on"),
    ],
)
def test_a_reply_that_is_no_answer_says_why(text: str, words: str) -> None:
    with pytest.raises(BrokenReply, match=words):
        read_reply(text)


# the file of answers


def answered(key: str, sample: int = 0, **more: Any) -> dict[str, Any]:
    row = {"key": key, "sample": sample, "outcome": "answered", "finish": "stop", "content": f"{key}{sample}"}
    return {**row, "reasoning": None, "tool_calls": None, "prompt_tokens": 3, "completion_tokens": 2, **more}


def failed(key: str, *, final: bool = False) -> dict[str, Any]:
    return {"key": key, "sample": 0, "outcome": "failed", "error": "HTTP 500", "final": final}


def test_the_file_of_answers_survives_a_cut_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    file = AnswerFile(path)
    for key in ("a", "b", "ü"):
        file.add(answered(key))
    file.close()
    whole = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == 10]
    for cut in sorted({*range(0, len(whole), 29), *ends, *(end - 1 for end in ends)}):
        path.write_bytes(whole[:cut])
        file = AnswerFile(path)
        lines = sum(end <= cut for end in ends)
        assert len(file) == lines and file.mended == cut - max([0, *ends[:lines]])
        assert file.spent == {"prompt_tokens": 3 * lines, "completion_tokens": 2 * lines}
        file.add(answered("z"))
        file.close()
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["key"] for row in rows] == [*["a", "b", "ü"][:lines], "z"]


def test_failures_are_asked_again_unless_final_and_an_answer_stays(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "answers.jsonl")
    for row in (failed("a"), failed("b", final=True), failed("c"), answered("c"), answered("c", content="later")):
        file.add(row)
    for _ in range(2):  # as written, as read
        assert [file.has((key, 0)) for key in "abcd"] == [False, True, True, False]
        assert (file.get(("c", 0)) or {})["content"] == "c0" and file.get(("d", 0)) is None
        assert file.last_failure() == "HTTP 500"
        file.close()
        file = AnswerFile(file.path)
    file.close()


@pytest.mark.parametrize("line", [b"{half\n", b'{"key": 5}\n', b"\xff\n", b"\n"])
def test_a_damaged_line_that_is_not_the_last_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(line + json.dumps(answered("a")).encode() + b"\n")
    with pytest.raises(RunError, match=r"answers.jsonl:1 is damaged"):
        AnswerFile(path)


# verdicts and account


def test_judge() -> None:
    pool = GradingPool("number", 5, 1)
    against = Against({"bench": ["how many clips did natalia sell altogether in april and may"]})

    def reason(**more: Any) -> str:
        return judge(answered("a", **more), "5", pool, against).reason

    assert reason(content="\\boxed{5}") == "" and reason(content="\\boxed{6}") == "wrong"
    assert reason(content="\\boxed{5}", finish="length") == "truncated"
    assert reason(content="how many clips did Natalia sell altogether in April and May? \\boxed{5}") == "leaked"
    assert judge(failed("a"), "5", pool, against) == Verdict("failed", "HTTP 500")
    assert judge(answered("a"), "", None, None) == Verdict()
    pool.close()


def test_every_prompt_is_accounted_for(tmp_path: Path) -> None:
    spec = parse_spec({"prompts": "p.jsonl", "endpoint": URL, "samples": 2, "keep": 2, "rows": 4}, "s")
    turn = [{"role": "user", "content": "q"}]
    made = [Prompt(key, key, "p", row, turn, turn, [], [], "5", row % 2) for row, key in enumerate("abcdefg", 1)]
    file, verdicts = AnswerFile(tmp_path / "answers.jsonl"), Verdicts(2)
    said = {  # by sample: (reason, text)
        "a": [("", "x"), ("", "y")],
        "b": [("wrong", "x"), ("truncated", "y")],
        "c": [("", "same"), ("", "same")],
        "d": [("wrong", "x"), ("", "y")],
        "e": [("", "x"), ("", "y")],
        "f": [("failed", ""), ("wrong", "x")],
    }
    for prompt in made:
        for sample, (reason, text) in enumerate(said.get(prompt.key, [])):
            row = answered(prompt.key, sample, content=text)
            if reason == "failed":
                row |= {"outcome": "failed", "final": True, "error": "HTTP 400"}
            file.add(row)
            verdicts.add(prompt, sample, Verdict(reason, f"{reason} because"), row)
    assert verdicts.rows == 2 + 1 + 1 + 2
    account = Account(read=Counter(p=8))
    account.reject("p", 8, "format", "no prompt")
    choose(account, spec, made, verdicts, file)
    assert [row["id"] for row in account.rows] == ["a-0", "a-1", "c-0", "d-1"]
    assert account.counts() == {
        **{"read": 8, "drawn": 3, "not_drawn": 1, "not_asked": 1, "sources": {"p": 8}},
        "rejected": {"failed": 1, "format": 1, "wrong": 1},
    }
    assert account.answers == {"verified": 6, "wrong": 3, "truncated": 1, "duplicate": 1, "failed": 1}
    # right: 6 verified and the duplicate, of the 11 that came; f has a failed request and is in no share
    assert account.acceptance["answers"] == pytest.approx(7 / 11)
    assert account.acceptance["by_right"] == {"0/2": 1, "1/2": 1, "2/2": 3}
    assert account.acceptance["by_difficulty"] == {
        "0": {"prompts": 2, "accepted": pytest.approx(0.25)},
        "1": {"prompts": 3, "accepted": pytest.approx(1.0)},
    }
    assert account.acceptance["alike"] == pytest.approx(1 / 6)
    file.close()


def test_the_draw_is_random_by_seed_and_the_order_of_files_does_not_matter() -> None:
    keys = [f"{number:032x}" for number in range(2000)]
    first = sorted(keys, key=lambda key: draw_order(0, key))
    some = keys[::3]
    assert sorted(some, key=lambda key: draw_order(0, key)) == [key for key in first if key in set(some)] != some
    shared = len(set(first[:1000]) & set(sorted(keys, key=lambda key: draw_order(1, key))[:1000]))
    assert 440 < shared < 560  # 500 +- 11 expected of two independent halves


def test_cost_is_tokens_times_price_per_million() -> None:
    prices = {"prompt": 0.2, "completion": 0.8}
    spec = parse_spec({"prompts": "p", "endpoint": {"url": URL, "prices": prices}}, "s")
    assert cost_of({"prompt_tokens": 2_000_000, "completion_tokens": 500_000}, spec) == pytest.approx(0.8)
    assert cost_of({}, parse_spec({"prompts": "p", "endpoint": URL}, "s")) is None


def test_a_full_disk_says_what_is_kept() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    file = AnswerFile.__new__(AnswerFile)
    file.path, file.spent, file._settled, file._failed = Path("/dev/full"), {}, {("a", 0): 0}, {}
    file._handle = os.open("/dev/full", os.O_RDWR)
    with pytest.raises(DiskFull, match=r"/dev/full cannot be written \(No space left on device\); 1 answers are kept"):
        file.add(answered("b"))
    assert not file.has(("b", 0))
    os.close(file._handle)
