r"""Numbers as people and models write them, read exactly as rational numbers.

A text is a number only if all of it is one: an integer, a decimal, a fraction, a mixed number or scientific notation,
perhaps with a sign, a currency, a percent sign, a scale word ('3 million') or a unit. What is not (`\ln 2`, `3x`,
`(-\infty, 3)`, `x \ge 2`, `\pm 3`, `5!`, '3 or 4', '10:30') is no number, whatever numerals stand in it. Every pattern
takes linear time: repetitions that could overlap are bounded.
"""

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from eaft_verl.grading.notation import DOLLAR, SCALE_WORDS, SCALES, THIN, behind, plain

_MAX_DIGITS = 1000  # Python refuses to parse integers beyond 4300 digits, and no benchmark has such answers
_MAX_ANSWER = 2000  # characters of a whole answer
_GAP = rf"[ \t{THIN}]"
_INTEGER = (
    rf"(?:[1-9][0-9]{{0,2}}(?:(?:,[0-9]{{3}}){{1,40}}|(?:{THIN}[0-9]{{3}}){{1,40}}|(?:'[0-9]{{3}}){{1,40}})(?![0-9])"
    r"|[1-9][0-9]?(?:,[0-9]{2}){1,40},[0-9]{3}(?![0-9])|[0-9]+)"
)
_DECIMAL = rf"(?:[0-9]{{0,40}}\.[0-9]{{0,40}}\\overline\{{[0-9]{{1,40}}\}}|{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)"
_PART = rf"{_GAP}?(?P<NAME>\{{{_GAP}?[+-]?{_GAP}?{_DECIMAL}{_GAP}?\}}|[0-9])"
_FRACTION = r"\\frac" + _PART.replace("NAME", "over") + _PART.replace("NAME", "under")
_MIXED = (
    rf"(?P<whole>[0-9]{{1,4}})(?:{_GAP}?{_FRACTION.replace('over', 'part').replace('under', 'parts')}"
    rf"|{_GAP}(?:and{_GAP})?(?P<count>[0-9]{{1,4}})/(?P<counts>[0-9]{{1,4}})(?![0-9/]))"
)
_POWER = (
    rf"{_GAP}?(?:\\times|\\cdot|[x*]){_GAP}{{0,2}}10{_GAP}?(?:\^|\*\*){_GAP}?"
    rf"(?P<power>\{{{_GAP}?[+-]?[0-9]+{_GAP}?\}}|[+-]?[0-9]+)"
    r"|[eE](?P<exponent>[+-]?[0-9]+)"
)
_CURRENCY = rf"(?:(?:US|HK|NT|AU|CA|R)?\$|{DOLLAR}|[€£¥₹₩]|(?:USD|EUR|GBP|RMB|CNY|INR){_GAP}|Rs\.?)"
NUMBER = re.compile(
    rf"(?:{_CURRENCY}{_GAP}?(?P<inner>-)?)?"
    rf"(?P<value>{_MIXED}|{_FRACTION}|(?P<above>{_DECIMAL})(?:{_GAP}?/{_GAP}?(?P<below>{_DECIMAL}))?)(?:{_POWER})?"
    rf"(?:_\{{?10\}}?(?![0-9]))?(?P<percent>{_GAP}?%|{_GAP}?per ?cent(?:age points?)?(?![a-z]))?"
    rf"(?:{_GAP}{{0,2}}(?P<scale>{SCALE_WORDS})(?![a-z]))?"
)
_GROUPED = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9]|[,/][0-9])")

LABEL = re.compile(
    r"(?:\s|\\(?:approx|therefore|Rightarrow|implies)\b|[~:]|(?:about|approximately|around|roughly|exactly|only)\b"
    r"|(?:the\s)?(?:final\s|correct\s)?(?:answers?|result|total)\b\s?(?:is|are|=|:|-(?=\s))?){0,6}",
    re.IGNORECASE,
)
_HEADING = re.compile(r"[A-Za-z][A-Za-z ]{0,40}:\s?")
NAME = re.compile(r"[A-Za-z][A-Za-z ]{0,40}:\s?|[A-Za-z](?:_\{?\w\}?)?\s?=\s?")
_RELATION = re.compile(r"(?<![<>!:\\])=|\\approx(?![A-Za-z])|\\simeq(?![A-Za-z])")
_GROUP = re.compile(r"\([^()]{0,200}\)")
_SEVERAL = re.compile(
    r"[,;<>]|\\(?:l|g|n)(?:e|t)q?(?![A-Za-z])|=.*(?:\b(?:or|and)\b|\\(?:lor|land|vee|wedge)\b)", re.DOTALL
)
# An equation in a variable (2x = 6, x^2 = 4) says nothing of 6 or 4; names, sums of names and arithmetic are asked for.
_EQUATION = re.compile(
    r"^\s?-|[0-9] ?(?:[A-Za-z](?![A-Za-z])|\\(?!times|cdot|div|frac|text))|[A-Za-z] ?\^(?!\{?-1)", re.IGNORECASE
)
_EDGES = [pair.split() for pair in ("$ $", r"\( \)", r"\[ \]", "{ }", "` `", '" "', "\u201c \u201d", "* *")]
_TEXT = re.compile(r"\\text\s?\{([^{}]{0,200})\}")
_SYMBOLS = re.compile(
    r"\u00b0\s?[CFK](?!\w)|(?<=[a-z])[23](?!\w)|\^\s?\{?\s?-?[1-9]\s?\}?|\\cdot|[\s\u00b0\u2032\u2033'\u2019$€£¥¢₹./()-]|"
    + DOLLAR
)
NO_UNITS = frozenset(
    re.findall(
        r"\w+",
        "or and to mod if when where plus minus over pi sqrt sin cos tan log ln exp factorial choose squared "
        "cubed inf infinity infty halves thirds fourths fifths sixths eighths tenths hundredths "
        "x y z n i e t a b c d k p q r",
    )
)
SHORT_UNITS = frozenset(
    re.findall(
        r"\w+",
        "m g s h l v w j cm mm km kg mg ml cl dl ft in yd mi lb oz hr hrs min ms am pm st nd rd th gb mb kb tb hz khz "
        "mhz kw kwh mph kph ha cc rpm sq of on at by",
    )
)


@dataclass(frozen=True)
class Number:
    """A number as written; percent: a percent sign follows it (50% has the value 50); exact: what it is rounded from,
    where that is written before it (7/3 ≈ 2.33)."""

    value: Fraction
    percent: bool = False
    exact: Fraction | None = None

    def equals(self, other: "Number") -> bool:
        """Whether both name the same number; where one only is a percentage, 50% equals 50 and 1/2."""
        if {self.value, self.exact} & {other.value, other.exact} - {None}:
            return True
        if self.percent == other.percent:
            return False
        part, whole = (self, other) if self.percent else (other, self)
        return part.value / 100 == whole.value


def whole_number(text: str) -> Number | None:
    r"""The number that all of a text is: '$1,234.50', 'x = 3\frac{1}{2} \text{ cm}^2', '5 %'; None if it is none."""
    if len(text) > _MAX_ANSWER:
        return None
    text = _bare(plain(text))
    *left, right = _RELATION.split(text[behind(_HEADING, text) :])
    asked = re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", _GROUP.sub("", "=".join(left)))
    if _SEVERAL.search(asked) or _EQUATION.search(asked):
        return None
    right = _bare(right) if left else right
    if right.startswith("(") and right.endswith(")") and not set("(),") & set(right[1:-1]):
        right = right[1:-1].strip()
    rest = grouped(right[right[:1] in ("+", "-") :].lstrip())
    if (match := NUMBER.match(rest)) and _is_unit(rest[match.end() :]):
        found = value_of(match, negative=right.startswith("-"))
        return rounded(found, match, left[-1]) if left else found
    return None


def rounded(number: Number | None, match: re.Match[str], before: str) -> Number | None:
    """A number, with what it is rounded from if that is what stands `before` it; match: of NUMBER."""
    if number is None or not match["above"] or match["below"] or (exact := whole_number(before)) is None:
        return number
    last_place = Fraction(1, 10 ** len(match["above"].partition(".")[2]))
    return replace(number, exact=exact.value) if abs(exact.value - number.value) < last_place else number


def grouped(text: str) -> str:
    """The text with thin spaces in numbers whose digits are grouped by plain ones: 12 345 678."""
    return _GROUPED.sub(lambda found: found[0].replace(" ", THIN), text)


def value_of(match: re.Match[str], *, negative: bool) -> Number | None:
    """The value of a match of NUMBER; None over zero, for an improper mixed number, and where digits are too many."""
    written = (match["power"] or match["exponent"] or "0").strip("{} \t" + THIN)
    if len(match["value"]) > _MAX_DIGITS or len(written) > 5 or abs(int(written)) > _MAX_DIGITS:
        return None
    numerator, denominator = (
        next((_decimal(match[name]) for name in names if match[name]), Fraction(1))
        for names in (("over", "part", "count", "above"), ("under", "parts", "counts", "below"))
    )
    if denominator == 0 or (match["whole"] and not 0 <= numerator < denominator):
        return None
    value = int(match["whole"] or 0) + numerator / denominator
    value *= Fraction(10) ** (int(written) + SCALES.get(match["scale"], 0))
    return Number(-value if negative != bool(match["inner"]) else value, bool(match["percent"]))


def _decimal(text: str) -> Fraction:
    """A decimal in braces or without, digits grouped or not, perhaps with repeating digits: 0.\\overline{3} is 1/3."""
    digits, _, repeating = re.sub(rf"[,'\s{THIN}]", "", text).partition("\\overline")
    if not repeating:
        return Fraction(digits.strip("{}"))
    integer, _, fixed = digits.strip("{}").partition(".")
    period = repeating.strip("{}")
    value = Fraction(int(period), 10 ** len(fixed) * (10 ** len(period) - 1))
    return Fraction(f"{integer or 0}.{fixed or 0}") + value


def _bare(text: str) -> str:
    """The text without labels, quotation marks, math delimiters and closing punctuation around it."""
    for _ in range(6):
        text = text.strip().rstrip(".,;:").rstrip()
        text = text[behind(LABEL, text) :]
        for left, right in _EDGES:
            inner = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and len(text) > 1 and not {left, right} & _marks(inner):
                text = inner
                break
        else:
            break
    return text.strip()


def _marks(text: str) -> set[str]:
    """Edges in a text that would make the outer two no pair."""
    depth = 0
    for brace in re.findall(r"[{}]", text):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return {"{"}
    return {edge for pair in _EDGES for edge in pair if edge not in "{}" and edge in text}


def _is_unit(tail: str) -> bool:
    """Whether what follows a number only says what is counted: '', 'apples', r'\\text{ cm}^2', ' km/h', '°'."""
    if re.match(r"\s?\^|\S{0,2}\(", tail):
        return False
    texts = " ".join(_TEXT.findall(tail))
    named = re.findall(r"[^\W\d_]+", texts)
    rest = re.sub(r"(?<=[A-Za-z])-(?=[a-z])", "", _TEXT.sub(" ", tail))  # t-shirts
    rest = _SYMBOLS.sub(" ", re.sub(r"\\frac\{\s*\}\{\s*\}", " ", rest))
    words = re.findall(r"[^\W\d_]+", rest)
    if not named + words:
        return not rest.strip() and not re.search(r"[/()-]", tail)
    if re.sub(r"[^\W\d_]+|\s", "", rest) or re.search(r"(?<![a-z^-])[0-9]", texts) or len(named + words) > 8:
        return False
    if {word.lower() for word in words + named if len(word) > 1 or word in "xyzni"} & NO_UNITS:
        return False
    glued = bool(re.match(r"[A-Za-z]", tail))
    return all(_names_unit(word, glued=glued and not place) for place, word in enumerate(words))


def _names_unit(word: str, *, glued: bool) -> bool:
    """Whether a word outside \\text{} is a unit: a variable beside a number multiplies it (3x, 3ab)."""
    if not word.isascii() or len(word) > (3 if glued else 2):
        return True
    return word.lower() in SHORT_UNITS and not (glued and len(word) == 1)
