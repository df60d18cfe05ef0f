"""Texts cut into pieces whose token ids do not depend on what stands beside them, so that each need be asked for once.

A byte-level BPE tokenizer takes added tokens out of a text, cuts the rest into words from left to right by one regular
expression that never looks back, and merges within a word. Cutting a text between two of its words therefore changes
no id, provided that the last word on the left is the same where the text ends behind it. Of each expression in
_SCANNERS this holds at two kinds of places:

- before a space that an ASCII letter follows. The space belongs to the word on its right. Of white space before it, the
  expression takes all but that space into words of its own, as it takes all of it at the end of a text;
- behind an ASCII letter that an ASCII character follows which is neither a letter nor an apostrophe ('s is a word, or
  an end of one). A run of letters never goes on past such a character.

Digits that are split off before change nothing at such places, nor does NFC: no ASCII character combines with what is
before it.
"""

import json
import re
from collections.abc import Callable
from typing import Any

_LETTERS, _OPEN = "[A-Za-z]", r"['\x80-\U0010ffff]"
# A word of letters that is closed; or all else up to the next place of either kind.
_PIECE = re.compile(
    rf" ?{_LETTERS}+(?!{_LETTERS}|{_OPEN})| ?(?:{_LETTERS}+(?={_OPEN})|[^A-Za-z ]+| (?!{_LETTERS}))+{_LETTERS}*"
)
_SPACE = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = "'s|'t|'re|'ve|'m|'ll|'d"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n"
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER, _UPPER = _CASED + r"*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+", _CASED + r"+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SCANNERS = {
    # Qwen2 and 3; Llama 3, GLM-4, cl100k; Qwen3.5; o200k (gpt-oss); Mistral's Tekken
    rf"(?i:{_SUFFIX})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SIGNS}]*{_SPACE}",
    rf"(?i:{_SUFFIX})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS}]*{_SPACE}",
    rf"(?i:{_SUFFIX})|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_SPACE}",
    rf"{_LOWER}(?i:{_SUFFIX})?|{_UPPER}(?i:{_SUFFIX})?|\p{{N}}{{1,3}}|{_SIGNS}/]*{_SPACE}",
    rf"{_LOWER}|{_UPPER}|\p{{N}}|{_SIGNS}/]*{_SPACE}",
}
_NORMALIZERS: tuple[Any, ...] = (
    *(None, {"type": "NFC"}),
    *({"type": "Sequence", "normalizers": inner} for inner in ([], [{"type": "NFC"}])),
)


def cutter(backend: Any) -> Callable[[str], list[str]]:
    """What cuts a text for this tokenizer; it leaves the text whole where the above does not hold."""
    added = backend.get_added_tokens_decoder().values()
    plain = not any(token.lstrip or token.rstrip or token.single_word or token.normalized for token in added)
    scans = _scans(_state(backend.pre_tokenizer)) and _state(backend.normalizer) in _NORMALIZERS
    merges = type(backend.model).__name__ == "BPE" and not backend.model.dropout
    if not (plain and scans and merges) or backend.encode_special_tokens:
        return lambda text: [text]
    contents = sorted((token.content for token in added), key=len, reverse=True)
    if not contents:
        return _PIECE.findall
    apart = re.compile(f"({'|'.join(map(re.escape, contents))})")

    def cut(text: str) -> list[str]:
        pieces: list[str] = []
        for place, part in enumerate(apart.split(text)):
            pieces += [part] if place % 2 else _PIECE.findall(part)
        return pieces

    return cut


def _state(component: Any) -> Any:
    """How a part of the tokenizer is configured; None where there is none."""
    return None if component is None else json.loads(component.__getstate__())


def _scans(configured: Any) -> bool:
    """Whether words are found by one of the expressions, digits split off before or not."""
    parts = configured.get("pretokenizers", [configured]) if configured else []
    while parts and parts[0]["type"] == "Digits":
        parts = parts[1:]
    kinds = [part["type"] for part in parts]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]) or parts[-1]["add_prefix_space"]:
        return False
    if len(parts) == 1:  # by GPT-2's expression
        return bool(parts[0]["use_regex"])
    split, within = parts
    known = split["pattern"].get("Regex") in _SCANNERS and not within["use_regex"]
    return known and split["behavior"] == "Isolated" and not split["invert"]
