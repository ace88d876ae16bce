"""GRPO: every rollout is compared with the mean of its group (arXiv 2402.03300)."""

import math
from collections.abc import Sequence

from lens_megatron.algorithms.advantages import Credit
from lens_megatron.algorithms.entry import Entry, NoOptions
from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import GroupNumbers, TrainingGroup


def grpo(
    groups: Sequence[TrainingGroup], batch: Sequence[GroupNumbers], algorithm: AlgorithmConfig, options: NoOptions
) -> list[list[Credit]]:
    """Returns (reward - mean) / (unbiased standard deviation + `algorithm.advantage_eps`), as verl and TRL do.

    The advantages are 0 where all rewards are equal, as they are in a group of one.
    """
    return [normalised([r.reward for r in group.rollouts], algorithm.advantage_eps) for group in groups]


def normalised(rewards: Sequence[float], eps: float) -> list[Credit]:
    """Judges one group. A reward that is not finite makes the group's advantages NaN, so that its update is skipped."""
    count, mean = len(rewards), sum(rewards) / len(rewards)
    # A product overflows to infinity, where a power would raise.
    std = math.sqrt(sum((r - mean) * (r - mean) for r in rewards) / (count - 1)) if count > 1 else 0.0
    return [Credit(0.0 if std == 0 else (r - mean) / (std + eps)) for r in rewards]


ENTRY = Entry(grpo, paper="Shao et al. 2024, arXiv 2402.03300")
