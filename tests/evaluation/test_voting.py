"""Answers are grouped by what they mean, in real grading processes."""

from lens_megatron.evaluation.voting import CORRECT, NO_VOTE, GradedAnswer, group_answers
from lens_megatron.reward import GraderPool
from lens_megatron.reward.types import GradeStatus

RIGHT, WRONG, UNPARSED, TIMEOUT = (
    GradeStatus.CORRECT, GradeStatus.WRONG, GradeStatus.UNPARSED, GradeStatus.TIMEOUT,
)  # fmt: skip


def answers(*pairs: tuple[GradeStatus, str | None]) -> list[GradedAnswer]:
    return [GradedAnswer(status, text) for status, text in pairs]


def test_equivalent_answers_vote_together():
    halves = answers(
        (WRONG, "0.25"), (RIGHT, "1/2"), (WRONG, "\\frac{1}{4}"), (WRONG, "3"), (UNPARSED, None), (WRONG, "\\dfrac14"),
        (TIMEOUT, "x"), (RIGHT, "0.5"), (WRONG, "3.0"),
    )  # fmt: skip
    sets = answers((WRONG, "x+1"), (WRONG, "1 + x"), (WRONG, "(1,2)"))
    with GraderPool(1, 5.0) as pool:
        found = group_answers(pool, [halves, [], sets, answers((RIGHT, "7"))])
    assert found == [
        (1, CORRECT, 1, 2, NO_VOTE, 1, NO_VOTE, CORRECT, 2),
        (),
        (1, 1, 2),
        (CORRECT,),
    ]
