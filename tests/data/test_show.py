"""What `eaft prepare --show N` prints, on a terminal and into a file."""

import io

import pytest

from eaft_verl.data.encode import encode
from eaft_verl.data.parquet import Example
from eaft_verl.data.prepare import Prepared
from eaft_verl.data.show import bracketed, show


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def prepared(make_tokenizer, tmp_path):
    examples = []
    for name, question, answer in (("r1", "Q [b] :smile:", "A\nB"), ("r2", "Q2", "A2")):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        (one,) = encode(make_tokenizer(), messages, 1000)
        examples.append(Example(name, messages, one.input_ids, one.loss_mask))
    return Prepared(tmp_path / "t.parquet", examples, {})


def test_brackets_when_not_a_terminal(prepared, make_tokenizer):
    stream = io.StringIO()
    show(prepared, make_tokenizer(), 1, stream)
    heading, _, body = stream.getvalue().partition("\n")
    assert heading == f"--- 1/2  r1  {len(prepared.examples[0].input_ids)} tokens, 4 trained"
    assert body == "<|im_start|>user⏎\nQ [b] :smile:<|im_end|>⏎\n<|im_start|>assistant⏎\n[[A⏎\nB<|im_end|>]]⏎\n\n"


def test_colours_on_a_terminal(prepared, make_tokenizer, monkeypatch):
    for variable in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    show(prepared, make_tokenizer(), 5, stream)
    text = stream.getvalue()
    assert "--- 2/2  r2" in text and "[[" not in text
    assert "\x1b[30;42mA⏎\x1b[0m\n\x1b[30;42mB\x1b[0m" in text  # black on green
    assert "\x1b[1;35;42m<|im_end|>\x1b[0m" in text  # a trained special token
    assert "\x1b[1;35m<|im_start|>\x1b[0muser⏎\n" in text


def test_character_of_several_tokens_is_shown_whole(make_tokenizer):
    tokenizer = make_tokenizer()
    ids = tokenizer("a😀", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5
    assert bracketed(tokenizer, ids, [0, 1, 1, 1, 1]) == "a[[😀]]"


def test_characters_that_steer_a_terminal_are_written_out(prepared, make_tokenizer):
    tokenizer = make_tokenizer()
    ids = tokenizer("a\x1b[2J\r\u202eb", add_special_tokens=False)["input_ids"]
    assert bracketed(tokenizer, ids, [0] * len(ids)) == "a\\x1b[2J\\r\\u202eb"
    stream = io.StringIO()
    prepared.examples[0].id = "r1\x1b[2J"
    show(prepared, tokenizer, 1, stream)
    assert "r1\\x1b[2J" in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_what_is_odd_about_a_mask_is_said(prepared, make_tokenizer):
    one = prepared.examples[0]
    end = make_tokenizer().convert_tokens_to_ids("<|im_end|>")
    one.loss_mask = [int(kept and token != end) for kept, token in zip(one.loss_mask, one.input_ids, strict=True)]
    stream = io.StringIO()
    show(prepared, make_tokenizer(), 1, stream)
    assert "! 1 of 1 trained turns train no end of turn\n" in stream.getvalue()
