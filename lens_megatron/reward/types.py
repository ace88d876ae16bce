"""Records of grading. Imports the standard library only, since worker processes import this and must start fast."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class GradeStatus(StrEnum):
    """The possible results of grading a completion. Every sample has exactly one of them."""

    CORRECT = "correct"
    WRONG = "wrong"
    """An answer was read, and it is not the expected one."""
    UNPARSED = "unparsed"
    """No answer could be read out of the completion: no box, an empty or unbalanced one, or not mathematics."""
    TIMEOUT = "timeout"
    """Grading exceeded the deadline and was killed: nothing is known about the answer."""
    CRASH = "crash"
    """The grader raised, returned no finite number, or its process died twice: nothing is known about the answer."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement of a grader on one completion; a `Grade` without the time it took."""

    status: GradeStatus
    score: float
    extracted: str | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Grade:
    """The grade of one completion.

    Example: Grade(status=GradeStatus.WRONG, score=0.0, seconds=0.002, extracted="71", detail="").
    """

    status: GradeStatus
    score: float
    """The reward: 1 for correct and 0 for everything else, unless a custom grader gives its own."""
    seconds: float
    """Wall-clock time from the start of grading, without the time spent in the queue."""
    extracted: str | None = None
    """The text that was read out of the completion as its answer, None if nothing was."""
    detail: str = ""
    """The reason in words, where the status alone does not give it."""
    regraded: bool = False
    """True if the process that graded it first was lost, so that this grade is a second one's."""

    @property
    def correct(self) -> bool:
        return self.status is GradeStatus.CORRECT


@dataclass(frozen=True, slots=True)
class GradeCounts:
    """Counts the samples of each status. Example: GradeCounts.of(grades).timeout."""

    correct: int = 0
    wrong: int = 0
    unparsed: int = 0
    timeout: int = 0
    crash: int = 0

    @classmethod
    def of(cls, grades: Iterable[Grade]) -> "GradeCounts":
        return cls(**Counter(grade.status.value for grade in grades))

    @property
    def total(self) -> int:
        return self.correct + self.wrong + self.unparsed + self.timeout + self.crash
