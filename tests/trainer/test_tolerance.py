"""Tolerances that rows give: what they allow, what they do not, and the grader in its process."""

import pytest

from lens_megatron.reward import AnswerFacts, GradeStatus, grade
from lens_megatron.reward.math_verify_grader import numbers
from lens_megatron.reward.rows import DataRow, encode
from lens_megatron.reward.tolerance import Tolerance, grade_by_row, tolerance_of
from lens_megatron.reward.types import Submission


def record(**columns: object) -> str:
    return encode(DataRow(({"role": "user", "content": "How"},), False, "1", columns))


@pytest.mark.parametrize(
    ("columns", "answer", "box", "correct"),
    [
        ({"error": "1e-1"}, "3.2", "3.3", True),
        ({"error": "1e-1"}, "3.2", "3.31", False),
        ({"error": 0.5}, "10", r"\frac{21}{2}", True),
        ({"error": "1e-1,1"}, "1, 20", "20.9, 1.1", True),  # in any order: 0.1 for 1, and 1 for 20
        ({"error": "1e-1,1"}, "1, 20", "21.2, 1.1", False),
        ({"error": "1e-1,1"}, "20, 1", "20, 1.9", True),
        ({"error": "1"}, "1, 20", "1", False),
        ({"relative_tolerance": 0.01}, r"3.0 \times 10^{8}", r"2.98 \times 10^{8} \text{ m/s}", True),
        ({"relative_tolerance": 0.01}, r"3.0 \times 10^{8}", r"2.96 \times 10^{8}", False),
        ({"relative_tolerance": 0.01}, r"2.5 \times 10^{-9}", "0", False),
        ({"relative_tolerance": 0.01}, "0", "0.001", False),
        ({"relative_tolerance": 0.5}, "x", "1.2x", False),
        ({"relative_tolerance": 0.5}, "(1,2)", "(1,2.1)", False),
        ({}, "3.2", "3.3", False),
        ({"error": None, "relative_tolerance": ""}, "3.2", "3.3", False),
        ({"error": "0.1"}, r"\cos(0)", "1.05", True),
    ],
)
def test_rows_say_how_far_a_number_may_be_off(columns: dict, answer: str, box: str, correct: bool):
    submission = Submission(rf"\boxed{{{box}}}", answer, AnswerFacts(record=record(**columns)))
    assert (grade_by_row(submission).status is GradeStatus.CORRECT) is correct


def test_numbers_are_read_in_their_order():
    assert numbers(r"\frac{1}{4}, 2") == (0.25, 2.0) and numbers("20, 1") == (20.0, 1.0)
    assert numbers("x") is None and numbers("1, x") is None and numbers("2i") is None and numbers("9^{9^{9^9}}") is None


def test_tolerances_are_read_and_refused():
    assert tolerance_of("") == tolerance_of(record(error=None)) == Tolerance()
    assert tolerance_of(record(error="1e-1,2", relative_tolerance="0.01")) == Tolerance((0.1, 2.0), 0.01)
    for bad in ("a lot", "-1", "nan", "inf"):
        with pytest.raises(ValueError, match=f"column error is '{bad}'; give a number of at least 0"):
            tolerance_of(record(error=bad))
    with pytest.raises(ValueError, match="2 tolerances for 3 expected numbers"):
        Tolerance((1.0, 2.0)).allows((1.0, 2.0, 3.0), (1.0, 2.0, 3.0))


def test_the_grader_runs_in_processes_of_its_own():
    facts = [AnswerFacts(record=record(error="0.1")), AnswerFacts(record=record(error="x")), AnswerFacts()]
    grades = grade([r"\boxed{1.1}"] * 3, ["1"] * 3, 60.0, workers=1, grader="math_verify_row", facts=facts)
    assert [found.status for found in grades] == [GradeStatus.CORRECT, GradeStatus.CRASH, GradeStatus.WRONG]
    assert "column error is 'x'" in grades[1].detail
