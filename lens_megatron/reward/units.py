r"""Finds the unit behind an answer, so that `22.1 \text{ cm}^2`, `22.1cm^{2}` and `22.1` agree.

math-verify drops units too, but takes `ab`, `bc`, `st` and every lone `h`, `t` or `m` for one, so that it reads
`\pi r^2 h` as `\pi r^2` and `2ab` as `2`. Works on the text, by the standard library.
"""

import re
from dataclasses import dataclass

_SYMBOLS = (
    "mm cm dm km nm ft yd mi kg gm mg lb lbs oz ml hr hrs min sec am pm mph kmh kmph rpm Hz kHz MHz eV keV MeV kJ kW "
    "kPa Pa atm mol rad deg m s g h t c d l"
)
_WORDS = (
    "units? inch(?:es)? feet foot yards? miles? (?:centi|milli|kilo)?met(?:er|re)s? degrees? radians? seconds? "
    "minutes? hours? days? weeks? months? years? cents? dollars? pounds? ounces? gallons? lit(?:er|re)s? "
    "(?:kilo)?grams? points?"
)
_POWER = r"(?:\s?\^\s?(?:\{-?[0-9]\}|[0-9]))?"
_GAP = r"(?:\\[,;:! ]|\\quad(?![a-zA-Z])|\s){0,5}"
_WRAPPED = re.compile(
    rf"(?<!\^)(?<!\^\{{)\\(?:text(?:rm|bf|it)?|mbox|mathrm)\s?\{{(?!\s*[ei]\s*\}})(?:[^{{}}0-9^]|\^-?[0-9])*\}}{_POWER}$"
)
_WORD = re.compile(rf"(?<=\s)(?:(?:square|cubic|sq\.?|cu\.?)\s)?(?:{'|'.join(_WORDS.split())})$")
_SYMBOL = re.compile(rf"(?<![a-zA-Z\\])(?:{'|'.join(_SYMBOLS.split())}){_POWER}$")
_OPERATOR = re.compile(rf"{_GAP}(?:/|\\cdot|\\times|(?<=\s)per){_GAP}$")
_VALUE_END = re.compile(r"[0-9.)}\]!%]$|\\(?:pi|infty|%)$|\^\\circ$|[a-zA-Z]$")
_TRAILING_GAP = re.compile(rf"{_GAP}$")
_LETTER = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]")
_CHANGES_THE_VALUE = re.compile(
    r"(?<![a-zA-Z])(?:and|or|to|by|over|plus|minus|times|not|no|if|for|where|when|mod|base|half|dozen|hundred|thousand|"
    r"million|billion|trillion|percent|pct|percentage)(?![a-zA-Z])"
)
MAX_FACTORS = 4


@dataclass(frozen=True, slots=True)
class Quantity:
    """An answer without its unit."""

    value: str
    certain: bool
    """False where the unit may as well be a variable, as in `6m`."""


def split_unit(latex: str) -> Quantity:
    r"""Returns the answer without the unit behind it; without a unit, the answer itself.

    A unit is one of up to four factors behind a value: words in `\text{}`, `\mbox{}` or `\mathrm{}`; words such as
    `square inches` after a space; or symbols such as `cm` directly behind a value in which no variable occurs. Powers
    and `/`, `\cdot` and `per` may stand between them. Words that change the value (`million`, `or`, `percent`) are
    never dropped.
    """
    rest, certain, found = latex, True, False
    for _ in range(MAX_FACTORS):
        match = _WRAPPED.search(rest) or _WORD.search(rest) or _SYMBOL.search(rest)
        if match is None or _CHANGES_THE_VALUE.search(match[0]):
            break
        before = _TRAILING_GAP.sub("", rest[: match.start()])
        operator = _OPERATOR.search(before)
        before = before[: operator.start()] if operator else before
        symbol = match.re is _SYMBOL
        if not _VALUE_END.search(before) or before.count("{") != before.count("}"):
            break
        rest, found, certain = before, True, certain and not symbol
    if not found or _LETTER.search(rest) and not certain:
        return Quantity(latex, True)
    return Quantity(rest, certain)
