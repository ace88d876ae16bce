"""Rewrites notation that people use in answers and math-verify misreads. Works on the text, by the standard library."""

import re

_SPACED_THOUSANDS = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:(?:\\[,;:! ]|~|,\\!\s*|\s)[0-9]{3})+(?![0-9])")
_SCIENTIFIC = re.compile(r"(?<![0-9a-zA-Z.])([0-9]+\.?[0-9]*|\.[0-9]+)[eE]([+-]?[0-9]+)(?![0-9a-zA-Z.])")
_THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])")
_LIST_BRACKET = re.compile(r"\\[{}]|[()\[\]]")
_LINE_END = re.compile(r"(?:\\[,;:!]?|\s)+$")
_FINAL_STOP = re.compile(r"(?<!\.)\.$")
_AND = re.compile(r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|;")
_BRACKET_OR_COMMA = re.compile(r"\\?[\[({})\]]|,")
_MIXED = re.compile(r"([+-]?[0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)")
# These words after a number are no unit and change its meaning.
_NOT_A_UNIT = (
    "and or to by over plus minus times hundred thousand million billion trillion dozen percent pct pi sqrt mod"
)
_NUMBER_WITH_UNIT = re.compile(
    r"([+-]?[0-9][0-9,]*(?:\.[0-9]+)?)\s+"
    rf"(?!.*\b(?:{_NOT_A_UNIT.replace(' ', '|')})\b)[a-zA-Z]{{2,}}(?:\s[a-zA-Z]+)*\.?"
)


def tidy(latex: str) -> str:
    r"""Rewrites what math-verify is known to misread, without changing the meaning, as one line without `$`.

    `1\,234`, `1 234` -> `1234`; `1,234/2` -> `1234/2`; `3 1/2` -> `3\frac{1}{2}`; `1.5e-3` -> `1.5 \times 10^{-3}`;
    `90°` -> `90^\circ`; `58 square units` -> `58`. Line breaks and a full stop at the end are dropped.
    """
    text = latex.replace("\\$", "").replace("$", "").replace("\n", " ").replace("\u00b0", "^\\circ ").strip()
    text = _LINE_END.sub("", _FINAL_STOP.sub("", _LINE_END.sub("", text)))
    if unit := _NUMBER_WITH_UNIT.fullmatch(text):
        text = unit[1]
    if mixed := _MIXED.fullmatch(text):
        text = f"{mixed[1]}\\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    text = _join_thousands(text)
    text = _SPACED_THOUSANDS.sub(lambda match: re.sub("[^0-9]", "", match[0]), text)
    return _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)


def _join_thousands(text: str) -> str:
    """Leaves commas between digits alone in brackets (points, intervals, sets) and beside other commas (lists)."""
    joined = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    return text if "," in joined or _LIST_BRACKET.search(text) else joined


def count_items(latex: str) -> int:
    """Counts the answers, which commas, `and` or `or` separate outside of brackets other than a set around all."""
    text = _AND.sub(",", tidy(latex)).replace("\\left", "").replace("\\right", "").strip()
    if text.startswith("\\{") and text.endswith("\\}"):
        text = text[2:-2]
    count, depth = 1, 0
    for match in _BRACKET_OR_COMMA.finditer(text):
        if match[0] == ",":
            count += depth == 0
        else:
            depth += 1 if match[0][-1] in "([{" else -1
    return count
