r"""Grades numbers with the tolerance that the row of the dataset gives: `reward.grader=math_verify_row`.

Two columns of a row say how far a number may be off; a row without them is graded as by `math_verify`.

* `error` is the largest absolute difference, as in OlympiadBench: a number, text such as `1e-1`, or for several answers
  as many of them with commas between.
* `relative_tolerance` is the largest difference as a share of the expected number, for answers that were computed from
  measured quantities. Qwen2.5-Math's evaluation has 1e-4 for every set; 1e-2 allows for rounded constants.

An answer within either is correct. Only numbers have a tolerance, and lists of numbers with as many members, which are
compared in ascending order; expressions with variables, intervals and points are graded exactly.
"""

import math
from dataclasses import dataclass

from lens_megatron.reward import rows
from lens_megatron.reward.boxed import last_box
from lens_megatron.reward.math_verify_grader import grade_answer, numbers
from lens_megatron.reward.types import GradeStatus, Submission, Verdict

ROUNDING = 1e-9
"""A share by which a difference may exceed its tolerance, since decimals such as 0.1 are not exact in binary."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far an answer may be from the expected one."""

    absolute: tuple[float, ...] = ()
    """One for all answers, or one for each in the order of the expected answer; empty for none."""
    relative: float = 0.0

    def allows(self, expected: tuple[float, ...], given: tuple[float, ...]) -> bool:
        """Returns whether every number is close enough to its counterpart.

        Raises ValueError if there are several absolute tolerances, but not one for each expected number.
        """
        if len(self.absolute) > 1 and len(self.absolute) != len(expected):
            raise ValueError(
                f"column error has {len(self.absolute)} tolerances for {len(expected)} expected numbers; give one, or "
                "one for each"
            )
        if len(expected) != len(given):
            return False
        absolute = self.absolute if len(self.absolute) > 1 else (self.absolute or (0.0,)) * len(expected)
        pairs = zip(sorted(zip(expected, absolute, strict=True)), sorted(given), strict=True)
        return all(
            abs(x - y) <= max(limit, self.relative * abs(x)) * (1 + ROUNDING) and math.isfinite(y)
            for (x, limit), y in pairs
        )


def tolerance_of(record: str) -> Tolerance:
    """Reads the tolerance of a row that `rows.encode` wrote; empty records have none.

    Raises ValueError for a tolerance that is no finite number of at least 0.
    """
    columns = rows.decode(record).columns if record else {}
    error, relative = columns.get("error"), columns.get("relative_tolerance")
    parts = str(error).split(",") if error not in (None, "") else []
    absolute = tuple(_number("error", part) for part in parts)
    return Tolerance(absolute, 0.0 if relative in (None, "") else _number("relative_tolerance", relative))


def _number(column: str, value: object) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"column {column} is {value!r}; give a number of at least 0, or leave it empty")
    return number


def grade_by_row(submission: Submission) -> Verdict:
    """Grades by math-verify, and accepts numbers within the tolerance of the row. Raises ValueError for a bad one."""
    verdict = grade_answer(submission.completion, submission.answer)
    tolerance = tolerance_of(submission.facts.record)
    box, _ = last_box(submission.completion)
    if verdict.status is not GradeStatus.WRONG or box is None or tolerance == Tolerance():
        return verdict
    expected, given = numbers(submission.answer), numbers(box)
    if expected is None or given is None or not tolerance.allows(expected, given):
        return verdict
    return Verdict(GradeStatus.CORRECT, 1.0, box, "within the tolerance of the row")
