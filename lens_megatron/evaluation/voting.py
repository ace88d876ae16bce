"""Groups the answers to a problem by mathematical equivalence, in the grading processes.

`\\frac{1}{2}` and `0.5` vote for the same answer. Answers that were graded correct are one group, that of the expected
answer. The others are compared with the first answer of each group found so far, so that the number of comparisons
grows with the number of different answers, not with its square. All problems go through a round together: a grading
process is idle only in the last one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lens_megatron.reward import GraderPool
from lens_megatron.reward.boxed import normalise
from lens_megatron.reward.extractors import in_box
from lens_megatron.reward.types import GradeStatus

CORRECT = 0
"""The group of the expected answer."""
NO_VOTE = -1


@dataclass(frozen=True, slots=True)
class GradedAnswer:
    """What grading has found in a completion."""

    status: GradeStatus
    extracted: str | None
    """The answer's text; None if none was read."""

    @property
    def votes(self) -> bool:
        """An answer that could not be read or graded votes for nothing."""
        return self.status in (GradeStatus.CORRECT, GradeStatus.WRONG) and bool(self.extracted)


@dataclass(slots=True)
class _Sorting:
    """The groups of one problem while they are found."""

    texts: list[str]
    """Different wrong answers, which have no group yet; the last is next."""
    groups: dict[str, int] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)
    """The first answer of each group of wrong answers; the first of them is group 1."""
    compared: int = 0
    """The number of groups that the next text was compared with."""

    def settle(self) -> None:
        """Gives the next text a group of its own as long as it has been compared with all there are."""
        while self.texts and self.compared == len(self.heads):
            text = self.texts.pop()
            self.heads.append(text)
            self.groups[text] = len(self.heads)
            self.compared = 0

    def heard(self, same: bool) -> None:
        if same:
            self.groups[self.texts.pop()] = self.compared + 1
            self.compared = 0
        else:
            self.compared += 1
        self.settle()


def group_answers(pool: GraderPool, problems: Sequence[Sequence[GradedAnswer]]) -> list[tuple[int, ...]]:
    """Returns for every problem the group of each of its answers: CORRECT, NO_VOTE, or a number from 1.

    Args:
        pool: must compare answers mathematically, as `math_verify` does.
        problems: the answers of each problem.
    """
    sortings = [_Sorting(_wrong_texts(answers)) for answers in problems]
    for sorting in sortings:
        sorting.settle()
    while open_sortings := [sorting for sorting in sortings if sorting.texts]:
        tickets = [pool.submit(in_box(s.texts[-1]), s.heads[s.compared]) for s in open_sortings]
        grades = pool.wait(tickets)
        for sorting, ticket in zip(open_sortings, tickets, strict=True):
            sorting.heard(grades[ticket].correct)
    return [
        tuple(_group(answer, sorting) for answer in answers)
        for answers, sorting in zip(problems, sortings, strict=True)
    ]


def _wrong_texts(answers: Sequence[GradedAnswer]) -> list[str]:
    """Returns the different wrong answers, the first of them last."""
    wrong = [a for a in answers if a.votes and a.status is GradeStatus.WRONG]
    return list(dict.fromkeys(_key(answer) for answer in wrong))[::-1]


def _key(answer: GradedAnswer) -> str:
    text = answer.extracted or ""
    return normalise(text) or text


def _group(answer: GradedAnswer, sorting: _Sorting) -> int:
    if not answer.votes:
        return NO_VOTE
    return CORRECT if answer.status is GradeStatus.CORRECT else sorting.groups[_key(answer)]
