"""Token ids of texts, and the characters that each token stands for.

Offsets from the tokenizer cost a third of its time. Where the bytes of a text's tokens, one after the other, are the
text's own bytes, as with every byte-level tokenizer, running sums of their lengths say the same. Most pieces of a text
have been met before: their ids are kept, and the tokenizer is asked for the others (pieces.py says why it may be).
"""

from array import array
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from eaft_verl.data.pieces import cutter

_AT_ONCE = 1 << 19  # characters of one call
_PROBE = "Ein Test:\n  2+3, \u00e9\u20ac"
_LONG = 64  # characters of a piece that is not met again
_KEPT = 1 << 18  # pieces, which take about 40 MB


class Tokens(NamedTuple):
    """Of one text: ids [T], and offsets [T, 2], the characters [left, right) of each token."""

    ids: "array[int]"
    offsets: NDArray[np.int64]


class _Speller:
    """A byte-level tokenizer: what each id writes, [V], how many bytes that is, and the ids of pieces met before."""

    def __init__(self, tokenizer: Any) -> None:
        self.bytes_V = _spelling(tokenizer)
        self.lengths_V = np.array(list(map(len, self.bytes_V)), np.int64)
        self.cut = cutter(tokenizer.backend_tokenizer)
        self.ids_of: dict[str, bytes] = {}  # as int32
        self.changed: set[str] = set()  # pieces that their tokens do not write

    def tokens_of(self, backend: Any, texts: list[str]) -> list[Tokens | None]:
        """Tokens of each text; None where what they write is not the text: normalised, or white space swallowed."""
        pieces_of = list(map(self.cut, texts))
        new = self._learn(backend, pieces_of)
        found = [self._joined(text, pieces) for text, pieces in zip(texts, pieces_of, strict=True)]
        for piece in new:
            if len(piece) > _LONG:
                del self.ids_of[piece]
        if len(self.ids_of) > _KEPT:
            self.ids_of.clear()
        self.changed &= self.ids_of.keys()
        return found

    def _learn(self, backend: Any, pieces_of: list[list[str]]) -> list[str]:
        """The pieces that were not known yet; now they are."""
        new = list(set[str]().union(*pieces_of).difference(self.ids_of))
        for piece, found in zip(new, backend.encode_batch_fast(new, add_special_tokens=False), strict=True):
            self.ids_of[piece] = array("i", found.ids).tobytes()
            if b"".join(map(self.bytes_V.__getitem__, found.ids)) != piece.encode():
                self.changed.add(piece)
        return new

    def _joined(self, text: str, pieces: list[str]) -> Tokens | None:
        if not self.changed.isdisjoint(pieces if self.changed else ()):
            return None
        ids_T = array("i", b"".join(map(self.ids_of.__getitem__, pieces)))
        lengths_T = self.lengths_V[np.asarray(ids_T)]
        rights_T = lengths_T.cumsum()
        lefts_T = rights_T - lengths_T
        if not text.isascii():
            begins = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80
            character = np.append(begins.cumsum() - 1, len(text))  # which one each byte belongs to
            wide = lengths_T > 0
            lefts_T = character[lefts_T]
            rights_T = np.where(wide, character[rights_T - 1] + 1, lefts_T)
        return Tokens(ids_T, np.stack([lefts_T, rights_T], axis=1))


_SPELLERS: WeakKeyDictionary[Any, _Speller | None] = WeakKeyDictionary()


def tokenize(tokenizer: Any, texts: Iterable[str]) -> Iterator[Tokens]:
    """Tokens of each text, as tokenizer(text, add_special_tokens=False) has them, in few calls and without the detour.

    Where a token holds only part of a character's bytes, its offsets are the whole character's.
    """
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if tokenizer not in _SPELLERS:
        speller = _Speller(tokenizer)
        _SPELLERS[tokenizer] = speller if all(speller.tokens_of(backend, [_PROBE])) else None
    known = _SPELLERS[tokenizer]
    for some in _groups(texts):
        if known is None:
            yield from map(_as_given, backend.encode_batch(some, add_special_tokens=False))
            continue
        for text, found in zip(some, known.tokens_of(backend, some), strict=True):
            yield found or _as_given(backend.encode(text, add_special_tokens=False))


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


def _spelling(tokenizer: Any) -> list[bytes]:
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
    return bytes_V
