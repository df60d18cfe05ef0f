"""Pieces of a text have the words, and the ids, that the tokenizer finds in the whole."""

import random

import pytest
from template_families import tokenizer_of
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

from eaft_verl.data import offsets
from eaft_verl.data.offsets import tokenize
from eaft_verl.data.pieces import _SCANNERS, cutter

ATOMS = (
    *(
        " ",
        "  ",
        "\n",
        "\t",
        "\r",
        "\r\n",
        "\u00a0",
        "\u2028",
        "\u3000",
        "\x1c",
        "\x85",
        "\u200d",
        "a",
        "b",
        "I",
        "the",
    ),
    *("S", "fooBar", "'", "'s", "'t", "'RE", "\u2019", '"', "(", ")", "[", "<", "|", ">", "_", "-", ".", ",", "!", "/"),
    *(
        "\\",
        "5",
        "12",
        "½",
        "٣",
        "é",
        "e\u0301",
        "\u0301",
        "\u0338",
        "\u212a",
        "\u037e",
        "中",
        "文字",
        "\u017f",
        "ß",
        "😀",
    ),
    *("<|im_end|>", "<|im_start|>", "<|im", "_end|>", *(" ", "a", "the", "S", "'", ",", "\n", " b") * 4),
)
GPT2 = pre.ByteLevel(add_prefix_space=False)


def texts_of(seed, count):
    draw = random.Random(seed)
    return ["".join(draw.choices(ATOMS, k=draw.randint(0, 25))) for _ in range(count)]


def byte_level(scanner, digits=False):
    within = [pre.Split(Regex(scanner), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    return pre.Sequence([pre.Digits(individual_digits=True)] * digits + (within if scanner else [GPT2]))


@pytest.fixture(scope="module")
def core():
    """A BPE whose merges go across white space, signs and words wherever the words let them."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    special = [AddedToken(text, special=True, normalized=False) for text in ("<|im_end|>", "<|im_start|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
    )
    found.train_from_iterator(texts_of(1, 400), trainer)
    return found


class Wrapped:
    """What `tokenize` reads of a tokenizer."""

    def __init__(self, backend):
        self.backend_tokenizer = backend
        self.added_tokens_decoder, self.get_vocab = backend.get_added_tokens_decoder(), backend.get_vocab


@pytest.mark.parametrize("digits", [False, True])
@pytest.mark.parametrize("scanner", ["", *sorted(_SCANNERS)])
def test_pieces_have_the_ids_of_the_whole(core, scanner, digits):
    backend = Tokenizer.from_str(core.to_str())
    backend.pre_tokenizer = byte_level(scanner, digits)
    backend.normalizer = normalizers.NFC() if digits else None
    cut, texts = cutter(backend), texts_of(2, 400)
    assert sum(map(len, map(cut, texts))) > 3 * len(texts)
    for text in texts:
        assert "".join(cut(text)) == text
        if "<|im_" not in text:
            apart = [word for piece in cut(text) for word, _ in backend.pre_tokenizer.pre_tokenize_str(piece)]
            assert apart == [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)], text
    expected = backend.encode_batch(texts, add_special_tokens=False)
    for text, one, found in zip(texts, expected, tokenize(Wrapped(backend), texts), strict=True):
        assert (found.ids.tolist(), list(map(tuple, found.offsets.tolist()))) == (one.ids, one.offsets), text


def test_a_text_is_cut_before_words_and_behind_them():
    cut = cutter(tokenizer_of("chatml").backend_tokenizer)
    assert cut("<|im_end|>\nit's  naïve, (a b).") == ["<|im_end|>", "\nit's", " ", " naïve", ", (a", " b", ")."]


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: backend.add_special_tokens([AddedToken("<|stop|>", rstrip=True)]),
        lambda backend: backend.add_tokens([AddedToken("stop", normalized=True)]),
        lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()),
        lambda backend: setattr(backend, "pre_tokenizer", pre.ByteLevel(add_prefix_space=True)),
        lambda backend: setattr(backend, "pre_tokenizer", pre.Metaspace()),
        lambda backend: setattr(backend, "pre_tokenizer", byte_level(r"\s+")),
        lambda backend: setattr(backend, "pre_tokenizer", None),
        lambda backend: setattr(backend, "encode_special_tokens", True),
        lambda backend: setattr(backend.model, "dropout", 0.5),
    ],
)
def test_another_tokenizer_gets_the_text_whole(core, change):
    backend = Tokenizer.from_str(core.to_str())
    backend.pre_tokenizer = GPT2
    assert cutter(backend)("a b") == ["a", " b"]
    change(backend)
    assert cutter(backend)("a b") == ["a b"]


def test_only_pieces_that_may_come_again_are_kept(core, monkeypatch):
    backend = Tokenizer.from_str(core.to_str())
    backend.pre_tokenizer = GPT2
    tokenizer = Wrapped(backend)
    list(tokenize(tokenizer, ["one two " + "文" * 65]))
    kept = offsets._SPELLERS[tokenizer].ids_of
    assert {"one", " two"} <= kept.keys() and max(map(len, kept)) < 65
    monkeypatch.setattr(offsets, "_KEPT", len(kept))
    list(tokenize(tokenizer, ["three"]))
    assert not kept
