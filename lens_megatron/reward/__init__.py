"""Grades verifiable answers in processes that can be killed: `grade` for a list, `GraderPool` for a run."""

from lens_megatron.reward.pool import GraderPool, GraderStartError, grade
from lens_megatron.reward.types import AnswerFacts, Grade, GradeCounts, GradeStatus

__all__ = ["AnswerFacts", "Grade", "GradeCounts", "GradeStatus", "GraderPool", "GraderStartError", "grade"]
