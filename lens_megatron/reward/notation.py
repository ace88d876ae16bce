"""Rewrites notation that people use in answers and math-verify misreads. Works on the text, by the standard library."""

import re

from lens_megatron.reward.units import split_unit

_SYMBOLS = {
    "\u2212": "-", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u00f7": r"\div ", "\u00b0": r"^\circ ",
    "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u222a": r"\cup ",
    "\u2208": r"\in ", "\u00b1": r"\pm ", "\u00b2": "^{2}", "\u00b3": "^{3}", "\u00bd": r"\frac{1}{2}",
    "\u00bc": r"\frac{1}{4}", "\u00be": r"\frac{3}{4}", "~": " ", "\n": " ",
}  # fmt: skip
_TO_LATEX = str.maketrans(_SYMBOLS)
_ROOT_SIGN = re.compile("\u221a" + r"\s?(?:\(([^()]*)\)|([0-9]+|[a-zA-Z]))")
_DELIMITER = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]")
_SPACE_BEFORE_PERCENT = re.compile(r"\s+(?=\\?%)")
_LINE_END = re.compile(r"(?:\\[,;:!]?|\s)+$")
_FINAL_STOP = re.compile(r"(?<!\.)\.$")
_LEADING_RELATION = re.compile(r"^(?:=|\\approx(?![a-zA-Z]))\s*")
_SPACED_THOUSANDS = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:(?:\\[,;:! ]|,\\!\s*|\s)[0-9]{3})+(?![0-9])")
_THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])")
_BRACED_THOUSANDS = re.compile(r"(?<![0-9.,}])[1-9][0-9]{0,2}(?:\s?\{\s?,\s?\}\s?[0-9]{3})+(?![0-9])")
_BRACED_COMMA = re.compile(r"(?<=[0-9])\{,\}(?=[0-9])")
_LIST_BRACKET = re.compile(r"\\[{}]|[()\[\]]")
_AND = re.compile(r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|(?<!\\);")
_BRACKET_OR_COMMA = re.compile(r"\\?[\[({})\]]|(?<!\\),")
_MIXED = re.compile(r"([+-]?[0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)")
_SCIENTIFIC = re.compile(r"(?<![0-9a-zA-Z.])([0-9]+\.?[0-9]*|\.[0-9]+)[eE]([+-]?[0-9]+)(?![0-9a-zA-Z.])")
_MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_MAGNITUDE = re.compile(
    rf"(?<=[0-9])(?:\\[,; ]|\s)*(?:\\(?:text|mathrm|mbox)\s?\{{\s*)?({'|'.join(_MAGNITUDES)})(?![a-zA-Z])(\s*\}})?"
)
_TEXT_NUMBER = re.compile(r"\\(?:text|textbf|textrm|mathbf|mathrm|mbox)\s?\{\s*([+-]?[0-9][^{}]*)\}")
_ONE_LETTER = re.compile(r"\\(?:text|textit|textrm|mathrm|mathit)\s?\{\s*([a-zA-Z])\s*\}")
_NAMED_SUBSCRIPT = re.compile(r"_\s?\{\s*(?:\\(?:text|textrm|mathrm)\s?\{\s*([a-zA-Z]+)\s*\}|\\(max|min))\s*\}")
_E_WITH_SUBSCRIPT = re.compile(r"(?<![a-zA-Z\\])E\s?_\s?(?:\{\s?([a-zA-Z0-9]+)\s?\}|([a-zA-Z0-9]))")
_BINOMIAL = re.compile(r"(?<![a-zA-Z\\])C_\s?(?:\{([0-9]+)\}|([0-9]))\s?\^\s?(?:\{([0-9]+)\}|([0-9]))")
_SET_BUILDER = re.compile(
    r"\\\{\s*([a-zA-Z])\s*(?:\\in\s*\\mathbb\s?\{?R\}?\s*)?(?:\||\\mid(?![a-zA-Z])|:)([^,|{}]*[^,|{}\\])\\\}"
)
_INEQUALITY = re.compile(r"[<>]|\\(?:leq?|geq?|leqslant|geqslant|lt|gt)(?![a-zA-Z])")
# These words after a number are no unit and change its meaning.
_NOT_A_UNIT = (
    "and or to by over plus minus times hundred thousand million billion trillion dozen percent pct pi sqrt mod"
)
_NUMBER_WITH_UNIT = re.compile(
    r"([+-]?[0-9][0-9,]*(?:\.[0-9]+)?)\s+"
    rf"(?!.*\b(?:{_NOT_A_UNIT.replace(' ', '|')})\b)[a-zA-Z]{{2,}}(?:\s[a-zA-Z]+)*\.?"
)


def readings(latex: str) -> tuple[str, ...]:
    r"""Returns what an answer can mean, each as one line of LaTeX that math-verify reads, without `$`.

    The first has no unit. There is a second where the unit may be a variable: `6m` is `6` and `6m`.
    """
    text = latex.translate(_TO_LATEX)
    text = _ROOT_SIGN.sub(lambda match: rf"\sqrt{{{match[1] or match[2]}}}", text)
    text = _SPACE_BEFORE_PERCENT.sub("", _DELIMITER.sub(" ", text)).strip()
    text = _LEADING_RELATION.sub("", text)
    text = _LINE_END.sub("", _FINAL_STOP.sub("", _LINE_END.sub("", text)))
    text = text.replace("\\left\\{", "\\{").replace("\\right\\}", "\\}")
    if number := _TEXT_NUMBER.fullmatch(text):
        text = number[1].strip()
    text = _MAGNITUDE.sub(_as_power_of_ten, text)
    if unit := _NUMBER_WITH_UNIT.fullmatch(text):
        text = unit[1]
    quantity = split_unit(text)
    values = (quantity.value,) if quantity.certain else (quantity.value, text)
    return tuple(_rewrite(value) for value in values)


def tidy(latex: str) -> str:
    r"""Rewrites what math-verify is known to misread, without changing the meaning, as one line without `$`.

    `1\,234`, `1 234`, `1{,}234` -> `1234`; `1,234/2` -> `1234/2`; `0{,}5` -> `0.5`; `3 1/2` -> `3\frac{1}{2}`;
    `1.5e-3` -> `1.5 \times 10^{-3}`; `6 \text{ million}` -> `6 \times 10^{6}`; `90°` -> `90^\circ`; `2√3` ->
    `2\sqrt{3}`; `58 square units` -> `58`; `C_{5}^{2}` -> `\binom{5}{2}`; `\{x \mid x < 1\}` -> `x < 1`;
    `\mathrm{e}` -> `e`; `E_{1}` becomes a symbol, which math-verify cannot read otherwise. Line breaks and a full stop
    at the end are dropped.
    """
    return readings(latex)[0]


def _rewrite(text: str) -> str:
    if mixed := _MIXED.fullmatch(text):
        text = f"{mixed[1]}\\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    text = _BRACED_THOUSANDS.sub(lambda match: re.sub("[^0-9]", "", match[0]), text)
    text = _BRACED_COMMA.sub(".", text)
    text = _join_thousands(text)
    text = _SPACED_THOUSANDS.sub(lambda match: re.sub("[^0-9]", "", match[0]), text)
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)
    text = _NAMED_SUBSCRIPT.sub(lambda match: f"_{{{match[1] or match[2]}}}", text)
    text = _E_WITH_SUBSCRIPT.sub(lambda match: rf"\variable{{E{match[1] or match[2]}}}", text)
    text = _BINOMIAL.sub(_as_binomial, _ONE_LETTER.sub(r" \1 ", text))
    builder = _SET_BUILDER.fullmatch(text.strip())
    return builder[2].strip() if builder and _INEQUALITY.search(builder[2]) else text.strip()


def _as_power_of_ten(match: re.Match[str]) -> str:
    r"""Keeps what stands behind the word in its `\text{}`: `6 \text{ million dollars}`."""
    wrapped = "{" in match[0]
    return rf" \times 10^{{{_MAGNITUDES[match[1]]}}}" + (r" \text{" if wrapped and not match[2] else "")


def _as_binomial(match: re.Match[str]) -> str:
    below, above = match[1] or match[2], match[3] or match[4]
    return rf"\binom{{{below}}}{{{above}}}" if int(below) >= int(above) else match[0]


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


_COMMAND = r"\\(?:text|textrm|textbf|mathrm|mathbb|mbox|operatorname|variable)\s?\{[^{}]*\}|\\[a-zA-Z]+"
_LETTERS = re.compile(rf"{_COMMAND}|([a-zA-Z])")
_CAPITALS = re.compile(rf"{_COMMAND}|([A-Z])((?:\s?_\s?(?:\{{[a-zA-Z0-9]+\}}|[a-zA-Z0-9]))?)")


def letters_in_both_cases(latex: str) -> frozenset[str]:
    r"""Returns the capitals that stand in the text beside their small letters, as in `\frac{R}{r}`."""
    found = {match[1] for match in _LETTERS.finditer(latex) if match[1]}
    return frozenset(letter for letter in found if letter.isupper() and letter.lower() in found)


def mark_capitals(latex: str, capitals: frozenset[str]) -> str:
    r"""Renames these capitals, since math-verify takes `R` and `r` for the same symbol and `\frac{R}{r}` for 1."""

    def mark(match: re.Match[str]) -> str:
        if match[1] is None or match[1] not in capitals:
            return match[0]
        subscript = re.sub("[^a-zA-Z0-9]", "", match[2])
        return rf"\variable{{capital{match[1]}{subscript}}}"

    return _CAPITALS.sub(mark, latex) if capitals else latex
