r"""The default grader: compares the last `\boxed{...}` of a completion with a LaTeX answer by math-verify.

Only this module imports math_verify (and so sympy, which takes about a second): it is loaded in the worker processes,
not in the trainer. math-verify's own time limits are switched off: they are SIGALRM handlers, which work in main
threads only and cannot interrupt a C-level computation. The pool's deadline replaces them.
"""

import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Basic

from lens_megatron.reward.boxed import compare_cheaply, last_box, plain_number
from lens_megatron.reward.effort import is_too_large, too_complex
from lens_megatron.reward.forms import compare_forms
from lens_megatron.reward.notation import count_items, letters_in_both_cases, mark_capitals, readings
from lens_megatron.reward.types import GradeStatus, Verdict

# Both libraries warn about every string that they cannot read, and about the time limits, which are switched off here.
for _name in ("math_verify", "latex2sympy2_extended"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

_WHOLE = [
    LatexExtractionConfig(
        boxed_match_priority=-1,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
        ),
    )
]
_ANYWHERE = [LatexExtractionConfig(), ExprExtractionConfig()]
_FORMULA = re.compile(r"(?<!\\)\$((?:[^$\\]|\\.)+)\$")
_BETWEEN_FORMULAS = re.compile(r"[\s,;.]*(?:(?:and|or)\s*)?")
_PERCENT = re.compile(r"([+-]?[0-9]+(?:\.[0-9]+)?)\s*\\?%")
TINY = sympy.Float("1e-3")
"""Below this size numbers are compared by their ratio: math-verify rounds to 6 places, and takes 1e-8 for 0."""
RATIO_TOLERANCE = sympy.Float("1e-4")


def _parse_whole(latex: str, capitals: frozenset[str] = frozenset()) -> list:
    """Parses each reading of the string as one expression; returns [] if none can be read, never a part of one."""
    found = []
    for reading in readings(latex):
        found += parse(
            f"${mark_capitals(reading, capitals)}$", _WHOLE, fallback_mode="no_fallback",
            extraction_mode="first_match", parsing_timeout=None,
        )[:1]  # fmt: skip
    return found


@dataclass(frozen=True, slots=True)
class _Gold:
    """An expected answer that has been parsed."""

    text: str
    """The answer as LaTeX, for comparison as text."""
    parsed: tuple
    """What it can mean; empty where it is not mathematics."""
    items: int | None
    """The number of answers that it lists; None for prose."""


@lru_cache(maxsize=4096)
def _read_gold(answer: str, capitals: frozenset[str] = frozenset()) -> _Gold:
    """Parses an expected answer. Results are cached, because all rollouts of a group have the same one."""
    box, _ = last_box(answer)
    text = _as_one_formula(box if box is not None else answer.strip())
    is_prose = "$" in text.replace("\\$", "") or "\\(" in text or answer.count("\\boxed") > 1
    if is_prose:
        return _Gold(text, tuple(parse(answer, _ANYWHERE, fallback_mode="no_fallback", parsing_timeout=None)), None)
    parsed = _parse_whole(text, capitals)
    if percent := _PERCENT.fullmatch(text):
        parsed.append(sympy.Float(percent[1]))  # who is asked for a percentage may leave the sign out
    return _Gold(text, tuple(parsed), count_items(text))


def _as_one_formula(text: str) -> str:
    r"""Removes the marks of formulas where nothing else stands around them than numbers, commas, `and` and `or`.

    `$1$ or $2$` becomes `1, 2`, and `20 $cm^{2}$` becomes `20 cm^{2}`; other prose stays as it is.
    """
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        inner = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and opening not in inner and inner:
            return inner.strip()
    formulas = _FORMULA.findall(text)
    around = _FORMULA.split(text)[::2]
    if formulas and all(map(_BETWEEN_FORMULAS.fullmatch, around)):
        return ", ".join(formulas)
    if len(formulas) == 1 and plain_number(around[0].strip()) is not None and not around[1].strip():
        return f"{around[0].strip()} {formulas[0]}"
    return text


def _agree(gold: Basic, predicted: Basic) -> bool:
    """Returns whether two expressions are equal for math-verify, and not only because it rounds tiny numbers to 0."""
    same = verify([gold], [predicted], timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)
    if not same:
        with_i = [_with_imaginary_unit(expression) for expression in (gold, predicted)]
        return None not in with_i and verify(with_i[:1], with_i[1:], timeout_seconds=None, raise_on_error=True)
    if all(isinstance(expression, sympy.Expr) and expression.is_number for expression in (gold, predicted)):
        x, y = sympy.N(gold), sympy.N(predicted)
        return not (x.is_real and y.is_real and 0 < abs(x) < TINY and abs(x - y) > RATIO_TOLERANCE * abs(x))
    return True


def _with_imaginary_unit(expression: Basic) -> Basic | None:
    """Puts the imaginary unit in the place of the symbol `i`, which math-verify makes of it; None without either."""
    symbols = [symbol for symbol in getattr(expression, "free_symbols", ()) if symbol.name == "i"]
    return expression.subs({symbol: sympy.I for symbol in symbols}) if symbols or expression.has(sympy.I) else None


def _is_other_list(box: str, predicted: list, gold: _Gold) -> bool:
    """Returns whether one is a single answer and the other a list with it, perhaps repeated: `1,1,1` and `0.5,1/2`.

    math-verify reads lists as sets, which forget repetitions, and rounds their members.
    """
    items = count_items(box)
    if gold.items is None or (items == 1) == (gold.items == 1):
        return False
    if items == 1:
        return _repeats(gold.parsed[0], gold.items)
    several = isinstance(gold.parsed[0], sympy.Expr) and isinstance(predicted[0], sympy.FiniteSet)
    return several or _repeats(predicted[0], items)


def _repeats(parsed: object, items: int) -> bool:
    members = parsed.rhs if isinstance(parsed, sympy.Eq) else parsed
    return isinstance(members, sympy.FiniteSet) and items > len(members)


def grade_answer(completion: str, answer: str) -> Verdict:
    r"""Grades the last `\boxed{...}` of `completion` against `answer`, a LaTeX string such as `72` or `\frac{1}{2}`.

    It is pure and has no limit on time or memory: call it through `GraderPool` unless the input is trusted.
    Raises only errors after which the process cannot continue (MemoryError).
    """
    box, why = last_box(completion)
    if box is None:
        return Verdict(GradeStatus.UNPARSED, 0.0, None, why)
    cheap = compare_cheaply(box, answer)
    if cheap is not None:
        return Verdict(GradeStatus.CORRECT if cheap else GradeStatus.WRONG, float(cheap), box)
    capitals = letters_in_both_cases(answer) | letters_in_both_cases(box)
    gold = _read_gold(answer, capitals)
    cheap = compare_cheaply(box, gold.text)
    cheap = compare_forms(box, gold.text) if cheap is None else cheap
    if cheap is not None:
        return Verdict(GradeStatus.CORRECT if cheap else GradeStatus.WRONG, float(cheap), box)
    if complexity := too_complex(box):
        return Verdict(GradeStatus.UNPARSED, 0.0, box, complexity)
    predicted = _parse_whole(box, capitals)
    if not predicted:
        return Verdict(GradeStatus.UNPARSED, 0.0, box, "the last \\boxed does not hold mathematics")
    if not gold.parsed:
        return Verdict(GradeStatus.WRONG, 0.0, box, "the expected answer is not mathematics; compared as text")
    if any(map(is_too_large, (*predicted, *gold.parsed))):
        same = predicted[0] == gold.parsed[0]
        return Verdict(GradeStatus.CORRECT if same else GradeStatus.WRONG, float(same), box, "too large to compute")
    if _is_other_list(box, predicted, gold):
        return Verdict(GradeStatus.WRONG, 0.0, box, "a list, compared with a single answer")
    try:
        same = any(_agree(x, y) for x, y in product(gold.parsed, predicted))
    except MemoryError:
        raise
    except Exception as error:
        return Verdict(GradeStatus.WRONG, 0.0, box, f"not comparable with the expected answer: {type(error).__name__}")
    return Verdict(GradeStatus.CORRECT if same else GradeStatus.WRONG, float(same), box)


def is_read(answer: str) -> bool:
    """Returns whether an expected answer is read as a plain number or by math-verify, so that equal forms can agree."""
    return plain_number(answer) is not None or bool(_read_gold(answer, letters_in_both_cases(answer)).parsed)


def numbers(latex: str) -> tuple[float, ...] | None:
    r"""Returns the real numbers that an answer lists, in its order; None for anything else.

    `\frac{1}{4}, 2` is (0.25, 2.0). It has no limit on time or memory, as `grade_answer`.
    """
    if too_complex(latex):
        return None
    parsed = _parse_whole(latex)
    if not parsed or is_too_large(parsed[0]):
        return None
    members = getattr(parsed[0], "_unsorted_args", parsed[0].args) if isinstance(parsed[0], _LISTS) else parsed
    values = [_real(member) for member in (members[:1] if members is parsed else members)]
    return None if None in values else tuple(value for value in values if value is not None)


_LISTS = (sympy.FiniteSet, sympy.Tuple)


def _real(expression: object) -> float | None:
    value = expression.rhs if isinstance(expression, sympy.Eq) else expression
    if not isinstance(value, sympy.Expr) or not value.is_number:
        return None
    number = sympy.N(value)
    return float(number) if number.is_real and number.is_finite else None
