"""Token ids of texts, and the characters that each token stands for.

Offsets from the tokenizer cost a third of its time. Where the bytes of a text's tokens, one after the other, are the
text's own bytes, as with every byte-level tokenizer, running sums of their lengths say the same.
"""

from array import array
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 1 << 19  # characters of one call
_PROBE = "Ein Test:\n  2+3, \u00e9\u20ac"


class Tokens(NamedTuple):
    """Of one text: ids [T], and offsets [T, 2], the characters [left, right) of each token."""

    ids: "array[int]"
    offsets: NDArray[np.int64]


class _Spelling(NamedTuple):
    """What each id writes, [V], and how many bytes that is."""

    bytes_V: list[bytes]
    lengths_V: NDArray[np.int64]


_SPELLINGS: WeakKeyDictionary[Any, _Spelling | None] = WeakKeyDictionary()


def tokenize(tokenizer: Any, texts: Iterable[str]) -> Iterator[Tokens]:
    """Tokens of each text, as tokenizer(text, add_special_tokens=False) has them, in few calls and without the detour.

    Where a token holds only part of a character's bytes, its offsets are the whole character's.
    """
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if tokenizer not in _SPELLINGS:
        spelling = _spelling(tokenizer)
        (probe,) = backend.encode_batch_fast([_PROBE], add_special_tokens=False)
        _SPELLINGS[tokenizer] = spelling if _from_bytes(_PROBE, probe.ids, spelling) else None
    known = _SPELLINGS[tokenizer]
    for some in _groups(texts):
        if known is None:
            yield from map(_as_given, backend.encode_batch(some, add_special_tokens=False))
            continue
        for text, found in zip(some, backend.encode_batch_fast(some, add_special_tokens=False), strict=True):
            yield _from_bytes(text, found.ids, known) or _as_given(backend.encode(text, add_special_tokens=False))


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    waiting: list[str] = []
    size = 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if size >= _AT_ONCE:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


def _as_given(encoding: Any) -> Tokens:
    return Tokens(array("i", encoding.ids), np.array(encoding.offsets, np.int64).reshape(-1, 2))


def _from_bytes(text: str, ids: list[int], spelling: _Spelling) -> Tokens | None:
    """The tokens, if their bytes are the text's; a normalised text, or white space that a token swallowed, is not."""
    raw = text.encode()
    if b"".join(map(spelling.bytes_V.__getitem__, ids)) != raw:
        return None
    ids_T = array("i", ids)
    lengths_T = spelling.lengths_V[np.asarray(ids_T)]
    rights_T = lengths_T.cumsum()
    lefts_T = rights_T - lengths_T
    if len(raw) != len(text):
        begins = (np.frombuffer(raw, np.uint8) & 0xC0) != 0x80
        character = np.append(begins.cumsum() - 1, len(text))  # which one each byte belongs to
        wide = lengths_T > 0
        lefts_T = character[lefts_T]
        rights_T = np.where(wide, character[rights_T - 1] + 1, lefts_T)
    return Tokens(ids_T, np.stack([lefts_T, rights_T], axis=1))


def _spelling(tokenizer: Any) -> _Spelling:
    """What the ids write if the tokenizer is a byte-level one."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    words = tokenizer.get_vocab()
    bytes_V = [b""] * (max(words.values()) + 1)
    for word, index in words.items():
        if index in added or not byte_of.keys() >= set(word):
            bytes_V[index] = added.get(index, word).encode(errors="replace")
        else:
            bytes_V[index] = bytes(map(byte_of.__getitem__, word))
    return _Spelling(bytes_V, np.array(list(map(len, bytes_V)), np.int64))
