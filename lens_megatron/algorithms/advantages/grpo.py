"""GRPO: every rollout is compared with the mean of its group (arXiv 2402.03300)."""

import math

from lens_megatron.algorithms.advantages.estimator import WeightedAdvantages
from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import TrainingGroup


def grpo(group: TrainingGroup, algorithm: AlgorithmConfig) -> WeightedAdvantages:
    """Returns (reward - mean) / (unbiased standard deviation + eps) with weight 1, as verl and TRL do.

    The advantages are 0 where all rewards are equal.
    """
    rewards = [r.reward for r in group.rollouts]
    count = len(rewards)
    mean = sum(rewards) / count
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (count - 1)) if count > 1 else 1.0
    advantages = [(r - mean) / (std + algorithm.advantage_eps) if std > 0 else 0.0 for r in rewards]
    return WeightedAdvantages(tuple(advantages), (1.0,) * count)
