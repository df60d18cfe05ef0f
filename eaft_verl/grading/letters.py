"""The option that a response settles on: one letter, or none. Case counts in prose: 'a vaccine' is no choice of A."""

import re
from collections.abc import Iterator

from eaft_verl.grading.answers import CORRECTED, answer_mark
from eaft_verl.grading.notation import plain

_NEAR = 200  # characters of a statement in which its letter stands
_TEXT = re.compile(r"\\text\s?\{([^{}]{0,200})\}")
_OPEN = r"[\s*(\[\"'\u201c\u2018`$\\]{0,6}"
# A letter by itself: not of a word, an abbreviation (U.S.) or a compound (B-cell, B12, A's, C++).
_ENDS = r"(?![A-Za-z0-9_+#]|['\u2019][A-Za-z]|-[A-Za-z]|\.[A-Z]\.)"
_LETTER = rf"(?<![A-Za-z0-9_'\u2019.-])([A-Z]){_ENDS}"
_OPTION = (
    r"(?i:(?:likely|probably|clearly|definitely|then)\s)?(?i:(?:the|la)\s)?"
    r"(?i:(?:option|choice|opción|letter|选项|選項)\s?)?"
)
_STATED = re.compile(
    r"(?:\b[Aa]ns\.|(?i:\b(?:answers?|ans|option|choice|solution|antwort|lösung|réponse|respuesta|resposta|risposta)\b|\b\u043e\u0442\u0432\u0435\u0442|答案|答(?=\s?:)|答え|"
    r"正解|选项|選項|정답)[^.\n:=]{0,40}?(?i:\b(?:is|are|be|ist|lautet|est|es)\b|[:=是为為は은]|\s-\s|\b[èé]\b))[\s:*]{0,8}"
)
_FIRST = re.compile(rf"{_OPEN}{_OPTION}{_OPEN}([A-Z]){_ENDS}")
_SMALL = re.compile(rf"{_OPEN}([a-z])[)\].*\s]{{0,4}}$")
_INSIDE = re.compile(
    r"(?:\b(?i:is|be|choose|chose|pick|select|with|but|rather|option|choice|ist|est|es)\b|['\u2019]s\b|[是为選选择])"
    rf"{_OPEN}{_OPTION}{_LETTER}|,\s?([A-Z])(?=[).]{{0,2}}\s{{0,9}}$)"
)
_VERDICT = re.compile(
    rf"{_LETTER}[)*]{{0,3}}\s?(?:(?:is|ist|est|es)\s(?i:the\s)?(?i:correct|right|answer|best|richtig)|是?(?:正确|对的))"
)
_CONCLUDES = re.compile(
    rf"^(?:.{{0,80}}?\b)?(?i:so|hence|thus|therefore|answer)[,:]?\s{_OPEN}{_OPTION}{_LETTER}(?=(?:\sit\sis)?[).*\]]{{0,3}}\s{{0,9}}$)",
    re.MULTILINE,
)
_CHOOSES = re.compile(
    r"(?:\b(?i:choose|pick|select|go with|(?:it|one) (?:is|must be|should be)|it['\u2019]s)\b|[选選](?:择|擇)?)"
    rf"[\s:]{{0,2}}{_OPEN}{_OPTION}{_LETTER}"
)
# 'A' and 'I' before a word are an article and a pronoun, unless the word goes on about the choice.
_WORD = re.compile(
    r"\s(?!(?:because|since|as|is|for|and|or|but|due|which|by|from|not|if|when|so|given|with|weil|denn|car|ist|est)\b)"
    r"[a-z']"
)
_DISMISSED = re.compile(r"\W*[A-Z]\W{1,3}(?:is|are|was)(?:n['\u2019]t|\s(?:also\s)?(?:not|wrong|incorrect|false)\b)")
_ANOTHER = re.compile(
    rf"[)\].*]{{0,3}}\s?(?:,|/|&|\b(?:and|or|und|oder|et|ou|y|o)\b|[和或、])\s?[(\[*]{{0,3}}{_LETTER}"
)
_MARKED = re.compile(rf"{_OPEN}{_OPTION}:?{_OPEN}([A-Za-z])(?:[)\].,:$*\"\u201d]|\s?\(|\s?-\s|\s*$)", re.IGNORECASE)
_SEVERAL = re.compile(r"\(?[A-Z]\)?(?:(?:\s?(?:,|/|&|and|or)\s?|\s)\(?[A-Z]\)?){1,9}\W{0,3}$|[A-J]{2,6}$")


def letter_of(response: str) -> str:
    """The letter, upper case, that a response settles on; '' if it settles on none or on several.

    A marked letter counts, else the last stated one ('the answer is B', 'Answer: I think it is C', '答案是B'), else
    one that the last or first line begins with ('B', '(b)', 'B) because'), else a verdict ('B is correct').
    """
    mark = answer_mark(response)
    if mark and (letters := marked_letters(mark.text)):
        return letters if len(letters) == 1 else ""
    text = _TEXT.sub(r"\1", plain(response))
    for end in _statement_ends(text):
        statement = text[end : end + _NEAR].partition("\n")[0]
        if letters := _settled(statement):
            changed = CORRECTED.search(text, end) and _verdict(text[end:])
            return changed or (letters if len(letters) == 1 else "")
    return _line_letter(text) or _verdict(text)


def marked_letters(text: str) -> str:
    """The letters that a mark or a reference answer holds: 'B) Paris' -> 'B', 'B and C' -> 'BC', 'Paris' -> ''."""
    text = _TEXT.sub(r"\1", plain(text[:_NEAR])).strip(" $*`")
    if _SEVERAL.match(text):
        return "".join(re.findall(r"(?<![a-z])[A-Z](?![a-z])", text))
    found = _MARKED.match(text)
    return found[1].upper() if found else ""


def _statement_ends(text: str) -> Iterator[int]:
    """Where 'the answer is', 'Answer:' and their like end, the last one first."""
    yield from reversed([found.end() for found in _STATED.finditer(text)])


def _settled(statement: str) -> str:
    """The letters a statement names: directly, or behind a verb within it."""
    if small := _SMALL.match(statement):
        return small[1].upper()
    found = _FIRST.match(statement)
    if found and not (found[1] in "AI" and _WORD.match(statement, found.end())):
        return _with_others(statement, found)
    inside = list(_INSIDE.finditer(statement))
    return _with_others(statement, inside[-1]) if inside else ""


def _with_others(statement: str, found: re.Match[str]) -> str:
    another = _ANOTHER.match(statement, found.end())
    return found.group(found.lastindex or 1) + (another[1] if another else "")


def _line_letter(text: str) -> str:
    """The letter that the last or the first line is or begins with; '' where lines list several options."""
    lines = [line for line in text.strip().split("\n") if line.strip() and not _DISMISSED.match(line)]
    named = [(marked_letters(line), len(line.strip(' $*`()[].:"\u201c\u201d')) == 1) for line in lines]
    for letters, alone in named[-1:] + named[:1]:
        if len(letters) == 1 and alone:
            return letters
    listed = {letters for letters, _ in named if len(letters) == 1}
    ends = {letters for letters, _ in named[-1:] + named[:1] if letters}
    return ends.pop() if len(listed) == len(ends) == 1 and ends == listed else ""


def _verdict(text: str) -> str:
    found = max(
        (match for rule in (_VERDICT, _CHOOSES, _CONCLUDES) for match in rule.finditer(text)),
        key=re.Match.end,
        default=None,
    )
    return found[1] if found else ""
