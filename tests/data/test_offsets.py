"""Offsets made of what tokens write are the tokenizer's own, and the tokenizer is asked once for many rows."""

import json
import random

import numpy as np
import pytest
from template_families import FAMILIES, tokenizer_of

from eaft_verl.data import offsets
from eaft_verl.data.accept import Taker
from eaft_verl.data.offsets import tokenize
from eaft_verl.data.spec import DataSpec

PIECES = ("a", " the answer", "\n\n", "é", " €", "😀", "e\u0301", "中文", "\t", "<|im_end|>", "<s>", "9", "\u200b", " ")


class Counted:
    """A tokenizer's backend that counts what it encodes."""

    truncation = padding = None

    def __init__(self, backend):
        self.backend, self.calls = backend, []

    def __getattr__(self, name):
        given = getattr(self.backend, name)
        if not name.startswith("encode_") and name != "encode":
            return given

        def call(*args, **kwargs):
            self.calls.append(name)
            return given(*args, **kwargs)

        return call if callable(given) else given


class Tokenizer:
    """A tokenizer of a family, with a backend of one's own."""

    def __init__(self, tokenizer, backend):
        self.tokenizer, self.backend_tokenizer = tokenizer, backend

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def texts_of(seed, count=40):
    draw = random.Random(seed)
    return ["".join(draw.choices(PIECES, k=draw.randint(0, 12))) for _ in range(count)]


@pytest.mark.parametrize("family", ["chatml", "mistral_small"])
def test_offsets_are_the_tokenizers_own(family):
    assert family in FAMILIES
    tokenizer, texts = tokenizer_of(family), texts_of(1)
    counted = Counted(tokenizer.backend_tokenizer)
    found = list(tokenize(Tokenizer(tokenizer, counted), texts))
    assert counted.calls == ["encode_batch_fast"] * 2  # one for the probe; none needs the slow one
    for text, tokens in zip(texts, found, strict=True):
        expected = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert tokens.ids.tolist() == expected["input_ids"]
        assert tokens.offsets.tolist() == [list(pair) for pair in expected["offset_mapping"]]


def test_a_text_that_the_tokenizer_changes_gets_its_own_offsets():
    """NFC makes one character of two, and a token that takes white space along writes less than it stands for."""
    from tokenizers import AddedToken, normalizers
    from tokenizers import Tokenizer as Core

    core = Core.from_str(tokenizer_of("chatml").backend_tokenizer.to_str())
    core.normalizer = normalizers.NFC()
    core.add_special_tokens([AddedToken("<|stop|>", rstrip=True)])
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    texts = ["plain é", "e\u0301 a", "x<|stop|>  y", ""]
    counted = Counted(tokenizer.backend_tokenizer)
    found = list(tokenize(Tokenizer(tokenizer, counted), texts))
    assert counted.calls.count("encode") == 2
    for text, tokens in zip(texts, found, strict=True):
        assert list(map(tuple, tokens.offsets.tolist())) == core.encode(text, add_special_tokens=False).offsets


def test_a_tokenizer_without_bytes_is_asked_for_offsets():
    from tokenizers import Tokenizer as Core
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Core(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    counted = Counted(core)
    (found,) = tokenize(Tokenizer(PreTrainedTokenizerFast(tokenizer_object=core), counted), ["a  b zz"])
    assert (found.ids.tolist(), found.offsets.tolist()) == ([0, 1, 2], [[0, 1], [3, 4], [5, 7]])
    assert counted.calls == ["encode_batch_fast", "encode_batch"]


def test_long_texts_are_not_held_all_at_once(monkeypatch):
    monkeypatch.setattr(offsets, "_AT_ONCE", 10)
    counted = Counted(tokenizer_of("chatml").backend_tokenizer)
    found = list(tokenize(Tokenizer(tokenizer_of("chatml"), counted), ["aaaa"] * 7))
    assert len(found) == 7 and len(counted.calls) == 1 + 3


def test_a_chunk_of_rows_is_one_call_of_the_tokenizer():
    tokenizer = tokenizer_of("chatml")
    rows = [(0, n, json.loads(json.dumps({"prompt": f"Q{n}", "response": f"A{n}" * (n != 3)}))) for n in range(1, 9)]
    Taker(DataSpec("rows.jsonl"), tokenizer)(rows)
    counted = Counted(tokenizer.backend_tokenizer)
    (found,) = (Taker(DataSpec("rows.jsonl"), Tokenizer(tokenizer, counted))(rows) for _ in range(1))
    assert counted.calls == ["encode_batch_fast"] * 2  # the probe of a tokenizer not seen before, and all rows
    assert [taken.examples for taken in found.rows] == [1, 1, 0, 1, 1, 1, 1, 1]
    lengths = np.diff(found.batch.column("input_ids").offsets)
    assert len(lengths) == 7 and found.rows[2].fault == ("empty_assistant", "turn 2 (assistant) is empty")
