"""Turns verdicts round at random, to train on noisy rewards as arXiv 2505.22653 does."""

import random
from typing import Literal

from pydantic import Field

from lens_megatron.algorithms.entry import Entry
from lens_megatron.algorithms.rewards import RolloutFacts
from lens_megatron.config import Section
from lens_megatron.reward.types import Grade, GradeStatus
from lens_megatron.seeds import derive


class FlipsOptions(Section):
    """The options of `flips`."""

    rate: float = Field(0.4, ge=0, le=1)
    """The probability of a flip."""
    unit: Literal["group", "sample"] = "group"
    """Says what flips as a whole. group: all rollouts of a prompt in a step, both waves. sample: each rollout alone."""


def flips(grade: Grade, facts: RolloutFacts, options: FlipsOptions) -> Grade:
    """Returns 1 - r and the opposite verdict with probability `rate`, else the grade as it is.

    An unparsed answer counts as wrong, so that it flips to correct, as in the paper, where every response flips. One
    whose grading failed keeps its grade: there is no verdict to turn round, and a grader that fails must stay visible
    in the metrics.
    """
    seed = facts.group_seed if options.unit == "group" else facts.rollout_seed
    if grade.failed or random.Random(derive(seed, "flips")).random() >= options.rate:
        return grade
    return grade.with_score(1.0 - grade.score, GradeStatus.WRONG if grade.correct else GradeStatus.CORRECT)


ENTRY = Entry(flips, paper="Noisy rewards, arXiv 2505.22653", options=FlipsOptions)
