r"""The default grader: the last `\boxed{...}` of a completion against a LaTeX answer, by math-verify.

The only importer of math_verify (and so of sympy, about a second): it is loaded in the worker processes, not in the
trainer. math-verify's own time limits are switched off: they are SIGALRM handlers, which work in main threads only and
cannot interrupt a C-level computation. The pool's deadline takes their place.
"""

import logging
import re
from functools import lru_cache

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from lens_megatron.reward.boxed import compare_cheaply, last_box
from lens_megatron.reward.types import GradeStatus, Verdict

# Both libraries warn about every string that they cannot read and about the time limits that we switch off.
for _name in ("math_verify", "latex2sympy2_extended"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

_WHOLE = [LatexExtractionConfig(boxed_match_priority=-1)]
_ANYWHERE = [LatexExtractionConfig(), ExprExtractionConfig()]

_SPACED_THOUSANDS = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:(?:\\[,;:! ]|~|,\\!\s*|\s)[0-9]{3})+(?![0-9])")
_SCIENTIFIC = re.compile(r"(?<![0-9a-zA-Z.])([0-9]+\.?[0-9]*|\.[0-9]+)[eE]([+-]?[0-9]+)(?![0-9a-zA-Z.])")
_MIXED = re.compile(r"([+-]?[0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)")
# Words after a number that are more than its unit.
_NOT_A_UNIT = (
    "and or to by over plus minus times hundred thousand million billion trillion dozen percent pct pi sqrt mod"
)
_NUMBER_WITH_UNIT = re.compile(
    r"([+-]?[0-9][0-9,]*(?:\.[0-9]+)?)\s+"
    rf"(?!.*\b(?:{_NOT_A_UNIT.replace(' ', '|')})\b)[a-zA-Z]{{2,}}(?:\s[a-zA-Z]+)*\.?"
)


def tidy(latex: str) -> str:
    r"""Rewrite what math-verify is known to read wrongly, without changing the meaning; one line of LaTeX, no `$`.

    `1\,234` and `1 234` -> `1234`; `3 1/2` -> `3\frac{1}{2}`; `1.5e-3` -> `1.5 \times 10^{-3}`; `90°` -> `90^\circ`;
    `58 square units` -> `58`.
    """
    text = latex.replace("\\$", "").replace("$", "").replace("\n", " ").replace("\u00b0", "^\\circ ").strip()
    if unit := _NUMBER_WITH_UNIT.fullmatch(text):
        text = unit[1]
    if mixed := _MIXED.fullmatch(text):
        text = f"{mixed[1]}\\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    text = _SPACED_THOUSANDS.sub(lambda match: re.sub("[^0-9]", "", match[0]), text)
    return _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)


def _parse_whole(latex: str) -> list:
    """The string as one expression: [] if it cannot be read as a whole, never a part of it."""
    text = tidy(latex)
    return parse(f"${text}$", _WHOLE, fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None)


@lru_cache(maxsize=4096)
def _read_gold(answer: str) -> tuple[str, tuple]:
    """(the answer as LaTeX for comparison as text, the parsed answer), cached: a group has one answer."""
    box, _ = last_box(answer)
    text = box if box is not None else answer.strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        inner = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and opening not in inner and inner:
            text = inner.strip()
            break
    is_prose = "$" in text.replace("\\$", "") or "\\(" in text or answer.count("\\boxed") > 1
    parsed = parse(answer, _ANYWHERE, fallback_mode="no_fallback", parsing_timeout=None) if is_prose else None
    return text, tuple(parsed or _parse_whole(text))


def grade_answer(completion: str, answer: str) -> Verdict:
    r"""Grade the last `\boxed{...}` of `completion` against `answer`, a LaTeX string such as `72` or `\frac{1}{2}`.

    Pure, and without any limit on time or memory: call it through `GraderPool` unless the input is trusted.
    Raises only what a process cannot go on from (MemoryError).
    """
    box, why = last_box(completion)
    if box is None:
        return Verdict(GradeStatus.UNPARSED, 0.0, None, why)
    cheap = compare_cheaply(box, answer)
    if cheap is not None:
        return Verdict(GradeStatus.CORRECT if cheap else GradeStatus.WRONG, float(cheap), box)
    gold_text, gold = _read_gold(answer)
    cheap = compare_cheaply(box, gold_text)
    if cheap is not None:
        return Verdict(GradeStatus.CORRECT if cheap else GradeStatus.WRONG, float(cheap), box)
    predicted = _parse_whole(box)
    if not predicted:
        return Verdict(GradeStatus.UNPARSED, 0.0, box, "the last \\boxed does not hold mathematics")
    if not gold:
        return Verdict(GradeStatus.WRONG, 0.0, box, "the expected answer is not mathematics; compared as text")
    try:
        same = verify(list(gold), predicted, timeout_seconds=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception as error:
        return Verdict(GradeStatus.WRONG, 0.0, box, f"not comparable with the expected answer: {type(error).__name__}")
    return Verdict(GradeStatus.CORRECT if same else GradeStatus.WRONG, float(same), box)
