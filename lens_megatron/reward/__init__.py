"""Grades verifiable answers in processes that can be killed: `grade` for a list, `GraderPool` for a run."""

from lens_megatron.reward.pool import GraderPool, GraderStartError, grade
from lens_megatron.reward.types import Grade, GradeCounts, GradeStatus

__all__ = ["Grade", "GradeCounts", "GradeStatus", "GraderPool", "GraderStartError", "grade"]
