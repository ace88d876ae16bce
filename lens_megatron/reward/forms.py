r"""Compares answers that are no mathematics for math-verify: choices, times of day, words, numbers of another base.

Each rule decides only where the expected answer has its form; the others return None. docs/GRADING.md says what each
may get wrong. Works on the text, by the standard library.
"""

import re
from decimal import Decimal

from lens_megatron.reward.boxed import plain_number

_FONT = re.compile(r"\\(?:text|textbf|textit|textrm|textsf|mathrm|mathbf|mathsf|mbox|bf|rm)(?![a-zA-Z])\s?")
_CHOICE = re.compile(r"\(?([A-Z])\)?")
_CHOSEN = re.compile(r"(?:\(([A-Z])\)|([A-Z])[).](?![0-9])|([A-Z]):(?=\s))")
_TIME = re.compile(r"([0-9]{1,2})(?::([0-5][0-9]))?\s*(?:([ap])\.?\s?m\.?)?", re.IGNORECASE)
_WORDS = re.compile(r"[a-zA-Z]+(?:[ '-][a-zA-Z]+)*")
_ARTICLE = re.compile(r"^(?:an?|the) ")
_BASED = re.compile(r"([0-9A-F]+)\s?_\s?(?:\{\s?([0-9]+)\s?\}|([0-9]+))")
_DECIMAL_COMMA = re.compile(r"([+-]?[0-9]+)(?:,|\{,\})([0-9]+)")


def compare_forms(box: str, gold: str) -> bool | None:
    """Returns whether two answers agree by one of the rules of this module, None where no rule applies."""
    box, gold = _plain(box), _plain(gold)
    for rule in (_choices, _times, _words, _bases, _decimal_commas):
        found = rule(box, gold)
        if found is not None:
            return found
    return None


def _choices(box: str, gold: str) -> bool | None:
    r"""`(A)`, `A)`, `A. 12` and `\textbf{(A) } 5` name the choice A; a box that marks another choice too is wrong."""
    expected = _CHOICE.fullmatch(gold)
    first = _CHOSEN.match(box)
    if expected is None or first is None:
        return None
    return {letter for match in _CHOSEN.findall(box) for letter in match if letter} == {expected[1]}


def _times(box: str, gold: str) -> bool | None:
    """`1:58 am`, `1:58` and `01:58 A.M.` agree, if the expected answer says which half of the day it means."""
    expected, given = _TIME.fullmatch(gold), _TIME.fullmatch(box)
    if expected is None or expected[3] is None:
        return None
    if given is None:
        return False
    halves = {half.lower() for half in (expected[3], given[3]) if half}
    return (int(expected[1]), int(expected[2] or 0)) == (int(given[1]), int(given[2] or 0)) and len(halves) == 1


def _words(box: str, gold: str) -> bool | None:
    r"""Words agree in every font, in capitals or not, and with an article or without; other words prove nothing."""
    both = [_ARTICLE.sub("", text.casefold()) for text in (box, gold) if _WORDS.fullmatch(text)]
    long = max(map(len, re.split("[ '-]", gold))) >= 3
    return True if len(both) == 2 and long and both[0] == both[1] else None


def _bases(box: str, gold: str) -> bool | None:
    """`52_8` is `52_{8}` and `52`, and not `52_9`: who leaves the base out means the base that was asked for."""
    expected, given = _BASED.fullmatch(gold), _BASED.fullmatch(box)
    if expected is None or given is None:
        return None
    return (expected[1], expected[2] or expected[3]) == (given[1], given[2] or given[3])


def _decimal_commas(box: str, gold: str) -> bool | None:
    """`1,5` is 1.5 where the expected answer is that number; `1,500`, which may have thousands, is left alone."""
    match, expected = _DECIMAL_COMMA.fullmatch(box), plain_number(gold)
    if match is None or expected is None or "." not in gold or len(match[2]) == 3 and match[1].strip("+-0"):
        return None
    return True if Decimal(f"{match[1]}.{match[2]}") == expected else None


def _plain(text: str) -> str:
    r"""Drops fonts with their braces, `$`, spacing commands and a full stop after the last word."""
    text = re.sub(r"\\?\$|\\[,;:! ]|~", " ", text)
    if _FONT.search(text):
        text = _FONT.sub("", text).replace("{", "").replace("}", "") if "_" not in text else text
    text = re.sub(r"\s+", " ", text).strip()
    return text[:-1] if re.search(r"[a-zA-Z]{2}\.$", text) and not text.endswith("m.") else text
