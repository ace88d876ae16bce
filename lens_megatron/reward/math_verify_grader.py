r"""The default grader: compares the last `\boxed{...}` of a completion with a LaTeX answer by math-verify.

Only this module imports math_verify (and so sympy, which takes about a second): it is loaded in the worker processes,
not in the trainer. math-verify's own time limits are switched off: they are SIGALRM handlers, which work in main
threads only and cannot interrupt a C-level computation. The pool's deadline replaces them.
"""

import logging
from dataclasses import dataclass
from functools import lru_cache

import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from lens_megatron.reward.boxed import compare_cheaply, last_box
from lens_megatron.reward.effort import is_too_large, too_complex
from lens_megatron.reward.notation import count_items, tidy
from lens_megatron.reward.types import GradeStatus, Verdict

# Both libraries warn about every string that they cannot read, and about the time limits, which are switched off here.
for _name in ("math_verify", "latex2sympy2_extended"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

_WHOLE = [LatexExtractionConfig(boxed_match_priority=-1)]
_ANYWHERE = [LatexExtractionConfig(), ExprExtractionConfig()]


def _parse_whole(latex: str) -> list:
    """Parses the string as one expression; returns [] if it cannot be read as a whole, never a part of it."""
    text = tidy(latex)
    return parse(f"${text}$", _WHOLE, fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None)


@dataclass(frozen=True, slots=True)
class _Gold:
    """An expected answer that has been parsed."""

    text: str
    """The answer as LaTeX, for comparison as text."""
    parsed: tuple
    items: int | None
    """The number of answers that it lists; None for prose."""


@lru_cache(maxsize=4096)
def _read_gold(answer: str) -> _Gold:
    """Parses an expected answer. Results are cached, because all rollouts of a group have the same one."""
    box, _ = last_box(answer)
    text = box if box is not None else answer.strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        inner = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and opening not in inner and inner:
            text = inner.strip()
            break
    is_prose = "$" in text.replace("\\$", "") or "\\(" in text or answer.count("\\boxed") > 1
    parsed = parse(answer, _ANYWHERE, fallback_mode="no_fallback", parsing_timeout=None) if is_prose else None
    return _Gold(text, tuple(parsed or _parse_whole(text)), None if is_prose else count_items(text))


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
    gold = _read_gold(answer)
    cheap = compare_cheaply(box, gold.text)
    if cheap is not None:
        return Verdict(GradeStatus.CORRECT if cheap else GradeStatus.WRONG, float(cheap), box)
    if complexity := too_complex(box):
        return Verdict(GradeStatus.UNPARSED, 0.0, box, complexity)
    predicted = _parse_whole(box)
    if not predicted:
        return Verdict(GradeStatus.UNPARSED, 0.0, box, "the last \\boxed does not hold mathematics")
    if not gold.parsed:
        return Verdict(GradeStatus.WRONG, 0.0, box, "the expected answer is not mathematics; compared as text")
    if any(map(is_too_large, (predicted[0], gold.parsed[0]))):
        same = predicted[0] == gold.parsed[0]
        return Verdict(GradeStatus.CORRECT if same else GradeStatus.WRONG, float(same), box, "too large to compute")
    if _is_other_list(box, predicted, gold):
        return Verdict(GradeStatus.WRONG, 0.0, box, "a list, compared with a single answer")
    try:
        same = verify(list(gold.parsed), predicted, timeout_seconds=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception as error:
        return Verdict(GradeStatus.WRONG, 0.0, box, f"not comparable with the expected answer: {type(error).__name__}")
    return Verdict(GradeStatus.CORRECT if same else GradeStatus.WRONG, float(same), box)
