r"""Refuses expressions that no answer needs and that would cost math-verify seconds to hours.

math-verify's grammar backtracks over brackets (40 pairs around a 1 take 4 s), and sympy computes whatever it is given
(`9^{9^{9}}` has 370 million digits). Of 28,650 expected answers of ten public sets of problems the deepest nests 5
brackets, the longest has 8 words.
"""

import math
import re

import sympy

MAX_NESTING = 8
MAX_BARS = 20
MAX_WORDS = 40
MAX_DIGITS = 1_000_000
MAX_TERMS = 10_000
"""The most terms of a sum or product over a range, and the largest exponent of a sum, which sympy might expand."""

_BRACKET = re.compile(r"\\?[\[({})\]]")
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")


def too_complex(latex: str) -> str | None:
    """Returns why this should not be read as mathematics, or None where it may be. Takes time linear in the length."""
    if nesting(latex) > MAX_NESTING:
        return f"more than {MAX_NESTING} brackets inside each other"
    if latex.count("|") > MAX_BARS:
        return f"more than {MAX_BARS} bars"
    if len(_WORD.findall(latex)) > MAX_WORDS:
        return f"more than {MAX_WORDS} words"
    return None


def nesting(latex: str) -> int:
    """Returns the depth of brackets of all kinds, closed or not."""
    depth = deepest = 0
    for match in _BRACKET.finditer(latex):
        depth = depth + 1 if match[0][-1] in "([{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def is_too_large(expression: object) -> bool:
    """Returns whether computing this takes numbers of more than MAX_DIGITS digits or sums of more than MAX_TERMS terms.

    `expression` is sympy's and not evaluated yet. Only bounds are computed, in floating point.
    """
    try:
        return isinstance(expression, sympy.Basic) and _digits(expression) > MAX_DIGITS
    except RecursionError:
        return True


def _digits(node: sympy.Basic) -> float:
    """Returns a bound on the digits of numbers that arise in computing `node`, infinite where it has too many terms."""
    if isinstance(node, sympy.Rational):
        return math.log10(max(abs(node.p), node.q))
    if isinstance(node, sympy.Float):
        return abs(math.log10(abs(node))) if node else 0.0
    inner = [_digits(part) for part in node.args]
    if isinstance(node, sympy.Pow):
        base, exponent = node.args
        size = _size(inner[1]) if exponent.is_number else 0.0
        if isinstance(base, sympy.Add) and exponent.is_number and size > MAX_TERMS:
            return math.inf
        return max(inner[0] * size, *inner)
    if isinstance(node, sympy.factorial | sympy.factorial2 | sympy.binomial | sympy.gamma):
        return max(inner) * _size(max(inner))
    if isinstance(node, sympy.Sum | sympy.Product):
        ends = [end for _, *limits in node.limits for end in limits if end.is_Integer]
        return math.inf if any(abs(end) > MAX_TERMS for end in ends) else max(inner)
    return sum(inner) if isinstance(node, sympy.Mul) else max(inner, default=0.0)


def _size(digits: float) -> float:
    """Returns the largest number of `digits` digits."""
    return 10.0**digits if digits < 300 else math.inf
