r"""Reads the answer of a completion from its last `\boxed{...}`, and compares answers where that is cheap.

The module uses the standard library only and takes time linear in the length of the text: the trainer process runs
`excerpt` on every completion.
"""

import re
from decimal import Decimal

MAX_BOX_CHARS = 1_000
"""The most characters of an answer: a longer one is a degenerate completion that would only cost parsing time."""
MAX_BOXES = 16
"""The most boxes that are read as one answer."""

_BOX = "\\boxed"
_MAX_GAP = 20  # white space allowed between \boxed and its brace
_EXCERPT_CHARS = len(_BOX) + _MAX_GAP + MAX_BOX_CHARS + 4
_MAX_JOINT = 40
# Between boxes that list answers side by side, in or out of formulas.
_JOINT = re.compile(
    r"(?:[\s$,;]|\\[,;:! ()\[\]]|\\q?quad(?![a-zA-Z])|\\text\s*\{\s*,?\s*(?:and|or)?\s*\}"
    r"|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z]))*"
)


def excerpt(completion: str) -> str:
    r"""Returns the part of a completion that `last_box` reads: at most about 1,000 characters from the last `\boxed`
    on, and the boxes before it that belong to it.

    For every text, `last_box(excerpt(text)) == last_box(text)`. The part is empty when there is no box.
    """
    last = completion.rfind(_BOX)
    return "" if last < 0 else completion[_chain(completion, last)[0] : last + _EXCERPT_CHARS]


def last_box(completion: str) -> tuple[str | None, str]:
    r"""Returns the content of the last `\boxed{...}` and, if there is none, the reason.

    Boxes of a paragraph with nothing but separators between them are one answer: `\boxed{1}, \boxed{2}` is `1, 2`, and
    `\boxed{1} or \boxed{1}` is `1`. The last box decides even if it is unusable: an earlier one may be an intermediate
    result.

    Returns (content, "") with the outer white space removed, or (None, why).
    """
    last = completion.rfind(_BOX)
    if last < 0:
        return None, "no \\boxed in the completion"
    content, why, _ = _read_box(completion, last)
    if content is None:
        return None, why
    contents = [_read_box(completion, start)[0] or "" for start in _chain(completion, last)]
    if len({normalise(item) for item in contents}) == 1:
        return content, ""
    whole = ", ".join(contents)
    return (None, _too_long()) if len(whole) > MAX_BOX_CHARS else (whole, "")


def _chain(text: str, last: int) -> list[int]:
    """Finds where the boxes begin that form one answer with the box that begins at `last`."""
    starts = [last]
    while len(starts) < MAX_BOXES and (before := text.rfind(_BOX, 0, starts[0])) >= 0:
        content, _, end = _read_box(text, before)
        gap = text[end : starts[0]]
        if content is None or end > starts[0] or len(gap) > _MAX_JOINT or "\n\n" in gap or not _JOINT.fullmatch(gap):
            break
        starts.insert(0, before)
    return starts


def _read_box(text: str, start: int) -> tuple[str | None, str, int]:
    r"""Returns (content, "", end) of the box that begins at `start`, or (None, why, start).

    Braces must balance; as in TeX, `\{` and `\}` do not count.
    """
    opening = start + len(_BOX)
    gap_end = opening + _MAX_GAP
    while opening < min(gap_end, len(text)) and text[opening].isspace():
        opening += 1
    if opening >= len(text) or text[opening] != "{":
        return None, "no brace after the last \\boxed", start
    depth, position = 1, opening + 1
    limit = position + MAX_BOX_CHARS
    while position < len(text) and position <= limit:
        char = text[position]
        if char == "\\":
            position += 1
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                content = text[opening + 1 : position].strip()
                return (content, "", position + 1) if content else (None, "the last \\boxed is empty", start)
        position += 1
    return None, _too_long() if position > limit else "the last \\boxed is not closed", start


def _too_long() -> str:
    return f"the last \\boxed is longer than {MAX_BOX_CHARS} characters"


_LAYOUT = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\displaystyle(?![a-zA-Z])|(?<!\\)\\[!,;:> $]|~|\s+|\$")
_FRAC = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_FINAL_STOP = re.compile(r"(?<!\.)\.$")  # an ellipsis does not match


def normalise(latex: str) -> str:
    r"""Returns the string without everything that only concerns its layout.

    It removes white space and spacing commands, `$`, `\$`, `\left`, `\right`, `\displaystyle` and a final full stop;
    `\dfrac`, `\tfrac` and `\cfrac` become `\frac`. Equal results mean that TeX prints the same symbols in the same
    order, so the two strings have the same meaning: equality proves a correct answer without algebra. (Inside
    `\text{...}` spaces do print, but no two different answers differ in them alone.) Different results prove nothing.
    """
    return _FINAL_STOP.sub("", _LAYOUT.sub("", _FRAC.sub(r"\\frac", latex)))


_NUMBER_LAYOUT = re.compile(r"\\[!$]|\$")
_NUMBER = re.compile(r"([+-]?)([1-9][0-9]{0,2}(?:(?:,|\{,\}|\\,)[0-9]{3})+|[0-9]+)?(\.[0-9]*)?")
_SEPARATORS = str.maketrans("", "", "{},\\")


def plain_number(latex: str) -> Decimal | None:
    """Returns the value of an integer or decimal of at most 15 digits, with or without thousands separators, else None.

    With more than 15 digits math-verify's floats begin to round, and the two comparisons could differ. White space
    inside is not accepted: "1, 234" may be a list.
    """
    if len(latex) > 40:
        return None
    match = _NUMBER.fullmatch(_NUMBER_LAYOUT.sub("", latex).strip().replace("\u2212", "-"))
    if match is None:
        return None
    sign, whole, fraction = match.groups()
    digits, decimals = (whole or "").translate(_SEPARATORS), (fraction or "")[1:]
    if not digits and not decimals or len(digits) + len(decimals) > 15:
        return None
    return Decimal(f"{sign}{digits or '0'}.{decimals or '0'}")


def compare_cheaply(box: str, gold: str) -> bool | None:
    """Returns whether two answers agree, or None where only algebra can tell.

    Two plain numbers further apart than 1e-6 differ for math-verify too, which compares after rounding to 6 places;
    numbers that are closer but not equal are left to math-verify.
    """
    if (same := normalise(box)) and same == normalise(gold):
        return True
    x, y = plain_number(box), plain_number(gold)
    if x is None or y is None:
        return None
    if x == y:
        return True
    return False if abs(x - y) > Decimal("1e-6") else None
