"""Records of grading. Imports the standard library only, since worker processes import this and must start fast."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
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
class AnswerFacts:
    """What the graders of a user may know of a completion besides its text and the expected answer."""

    source: str = ""
    """The `data_source` of the row, else the name of the file or dataset."""
    record: str = ""
    """The row of the dataset as `rows.encode` writes it; empty where nobody needs it."""
    token_ids: tuple[int, ...] = ()
    """The tokens of the completion."""


@dataclass(frozen=True, slots=True)
class Submission:
    """What a grading process is given."""

    completion: str
    answer: str
    """The expected answer."""
    facts: AnswerFacts = AnswerFacts()


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

    @property
    def failed(self) -> bool:
        """True where grading itself failed, so that neither score nor status says anything of the answer."""
        return self.status in (GradeStatus.TIMEOUT, GradeStatus.CRASH)

    def with_score(self, score: float, status: GradeStatus | None = None) -> "Grade":
        """Returns the grade with another score and, if one is given, another status."""
        return replace(self, score=score, status=status or self.status)

    def judged(self, success_threshold: float | None) -> "Grade":
        """Returns the grade with the status that its score has by `reward.success_threshold`; None changes nothing.

        A score of at least the threshold is correct. A lower one is wrong, unless it was unparsed before. A grade whose
        grading failed stays as it is: its score stands for no answer.
        """
        if success_threshold is None or self.failed:
            return self
        if self.score >= success_threshold:
            return replace(self, status=GradeStatus.CORRECT)
        return replace(self, status=GradeStatus.WRONG) if self.correct else self


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
