r"""The one reader of answers: what a response says after thinking, and where in it the answer stands.

Rewards and evaluation read answers here and nowhere else. Everything is linear passes of regular expressions over text
that a model wrote; nothing of it is evaluated.
"""

import re
from typing import NamedTuple

from eaft_verl.grading.numbers import Number, whole_number
from eaft_verl.grading.prose import begins_with_number, last_number, leading_number

MAX_CHARACTERS = 100_000  # the last ones of what is said: that is where an answer stands
_MOST_BOXES = 26  # that one answer is made of
HASHES = "####"
# The think tags of Qwen, DeepSeek, GLM, SmolLM; Magistral, Kimi, Seed, OpenThinker; gpt-oss's channels; Command A's.
_OPENS = (
    r"<think>|<thinking>|<thought>|<reasoning>|\[THINK\]|◁think▷|<seed:think>|<\|begin_of_thought\|>"
    r"|<\|channel\|>analysis(?:<\|message\|>)?|<\|START_THINKING\|>"
)
_CLOSES = (
    r"</think>|</thinking>|</thought>|</reasoning>|\[/THINK\]|◁/think▷|</seed:think>|<\|end_of_thought\|>"
    r"|<\|channel\|>final(?:<\|message\|>)?|<\|END_THINKING\|>"
)
_THOUGHT = re.compile(rf"(?P<opens>{_OPENS})|{_CLOSES}", re.IGNORECASE)
_BOX = r"\\(?:boxed|fbox)\s?\{"
_MARK = re.compile(rf"(?P<box>{_BOX})|(?<!#)(?P<hashes>####)(?!#)|(?P<tag><answer>)")
# What stands between two boxes of one answer: 'x = \\boxed{3} or x = \\boxed{5}'.
_JOINED = re.compile(r"[\s$,;]{0,4}(?:\b(?:or|and)\b)?[\s$]{0,3}(?:[A-Za-z]\s?=\s?)?\$?")
_STATED = re.compile(
    r"(?:\b(?:answers?|ans|antwort|lösung|réponse|respuesta|resposta|risposta)\b|\b\u043e\u0442\u0432\u0435\u0442|答案|答え)[^.\n:\uff1a=\d]{0,40}?"
    r"(?:\b(?:is|are|ist|lautet|est|es|equals)\b|[:\uff1a=是为為é]|\bè)[\s:\uff1a*]{0,8}",
    re.IGNORECASE,
)
CORRECTED = re.compile(r"\b(?:wait|wrong|actually|mistake|incorrect|correction|instead)\b", re.IGNORECASE)


class Mark(NamedTuple):
    """A marked answer. kind: 'box', 'hashes' or 'tag'. text: '' where the mark holds nothing or is cut off."""

    kind: str
    text: str


def opened_thinking(prompt: str) -> str:
    """The marker with which a prompt has opened the thinking of its response, '' if it has not.

    Put before the response it tells `said` that thinking goes on until it is closed.
    """
    found = re.search(rf"(?:{_OPENS})\s{{0,9}}\Z", prompt[-100:], re.IGNORECASE)
    return found[0] if found else ""


def marks_thinking(token: str) -> bool:
    """Whether a special token opens or closes thinking, or is the first of several that do."""
    return token == "<|channel|>" or _THOUGHT.fullmatch(token) is not None


def said(response: str) -> str:
    """What a response says outside its thinking, the last MAX_CHARACTERS of it; '' while the thinking has not ended.

    A closing marker without an opening one ends thinking that the prompt opened.
    """
    kept, begun, thinking = [], 0, False
    for found in _THOUGHT.finditer(response):
        opens = found["opens"] is not None
        if opens and not thinking:
            kept.append(response[begun : found.start()])
        elif not opens and not thinking:
            kept.clear()
        thinking, begun = opens, found.end()
    return "" if thinking else "".join([*kept, response[begun:]])[-MAX_CHARACTERS:]


def last_box(text: str) -> str | None:
    """What the last \\boxed{...} holds, the inner one of two nested; None without a box or where it is not closed."""
    start = max((found.end() for found in re.finditer(_BOX, text)), default=-1)
    return None if start < 0 else _closed(text, start)


def _closed(text: str, first: int) -> str | None:
    depth = 1
    for found in re.finditer(r"[{}]", text[first:]):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return text[first : first + found.start()]
    return None


def answer_mark(text: str, *kinds: str) -> Mark | None:
    """The answer a text marks as such, in the last \\boxed{...}, behind '####' or in <answer>, whichever comes last.

    Boxes with but 'or', 'and' or a comma between them are one answer, '3, 5'. A heading is no mark: behind '####'
    stands a number or a letter, or it is the last line. None if none is marked. kinds: the only ones that count.
    """
    end = len(text.rstrip())
    marks = list(_MARK.finditer(text))
    for at, found in reversed(list(enumerate(marks))):
        if kinds and found.lastgroup not in kinds:
            continue
        if found["box"]:
            return Mark("box", _boxes(text, marks[: at + 1]))
        if found["tag"]:
            return Mark("tag", text[found.end() :].partition("</answer>")[0].strip())
        stop = text.find("\n", found.end())
        line = text[found.end() : stop if stop >= 0 else end].strip()
        letter = re.match(r"\**\(?[A-Za-z](?:[).:]|\**$)", line)
        if begins_with_number(line[:200]) or letter or stop < 0 or stop >= end:
            return Mark("hashes", line)
    return None


def _boxes(text: str, marks: list[re.Match[str]]) -> str:
    """What the last of the marks, a box, holds, with what those hold that it is joined to; '' if it is not closed."""
    if (last := _closed(text, marks[-1].end())) is None:
        return ""
    held = [last.strip()]
    for found, after in zip(marks[-2::-1], marks[::-1], strict=False):
        inner = _closed(text, found.end()) if found["box"] and len(held) < _MOST_BOXES else None
        if inner is None or not _JOINED.fullmatch(text, found.end() + len(inner) + 1, after.start()):
            break
        held.append(inner.strip())
    return ", ".join(filter(None, dict.fromkeys(reversed(held))))


def marked_answer(text: str) -> str | None:
    """The text of `answer_mark`."""
    mark = answer_mark(text)
    return mark.text if mark else None


def marked_number(text: str) -> Number | None:
    """The number behind the last '####' that is no heading, or None: where GSM8K puts its answers."""
    mark = answer_mark(text, "hashes")
    return _behind_hashes(mark.text) if mark else None


def _behind_hashes(line: str) -> Number | None:
    return leading_number(line) or whole_number(line)


def ends_in_marked_number(text: str) -> bool:
    """Whether the last line is '#### number' and nothing follows it: the format taught, and a stop after it."""
    line = text.rstrip().rpartition("\n")[2].strip()
    return re.match(r"####\s?[^#A-Za-z*]*$", line) is not None and whole_number(line[len(HASHES) :]) is not None


def stated(text: str) -> str | None:
    """What follows the last 'the answer is', 'Answer:' or its like, to the end of the line; None where nothing does.

    A statement that is taken back behind it ('wait', 'that is wrong') is none.
    """
    ends = [found.end() for found in _STATED.finditer(text)]
    if not ends or CORRECTED.search(text, ends[-1]):
        return None
    return text[ends[-1] :].partition("\n")[0].strip()


def final_number(text: str) -> Number | None:
    r"""The number that a text gives as its answer; None where it gives none, or gives something else.

    It is the marked one (all of a box must be one number: \boxed{2^{10}} is not 10), else the stated one ('the answer
    is 72, in total'), else the last one in prose.
    """
    if mark := answer_mark(text):
        if mark.kind == "hashes":
            return _behind_hashes(mark.text)
        return whole_number(mark.text) or (last_number(mark.text) if mark.kind == "tag" else None)
    if len(text) <= 200 and (number := whole_number(text)):
        return number
    statement = stated(text)
    if statement and (begins_with_number(statement) or leading_number(statement)):
        return leading_number(statement)
    return last_number(text)


def only_number(text: str) -> Number | None:
    """The number of a reference answer: '18', '$1,234', '50 %', '18 apples', 'x = 18', or the marked one.

    None if it holds several, or is an equation: x + y = 18 is not answered by 18.
    """
    text = mark.text if (mark := answer_mark(text)) else text
    left = text.rpartition("=")[0]
    if re.search(r"[A-Za-z]", left) and re.search(r"[-+*/^\d]", left):
        return None
    return _behind_hashes(text) if mark and mark.kind == "hashes" else whole_number(text)
