"""Dr. GRPO: GRPO without the division by the standard deviation (arXiv 2503.20783)."""

from collections.abc import Sequence

from lens_megatron.algorithms.advantages import Credit
from lens_megatron.algorithms.entry import Entry, NoOptions
from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import GroupNumbers, TrainingGroup


def dr_grpo(
    groups: Sequence[TrainingGroup], batch: Sequence[GroupNumbers], algorithm: AlgorithmConfig, options: NoOptions
) -> list[list[Credit]]:
    """Returns reward - mean of the group. The rollout of a group of one gets 0.

    The paper adds `algorithm.aggregation=seq-mean-token-sum-norm`, whose denominator is no response's own length, and
    `algorithm.kl_coef=0`.
    """
    return [centred([rollout.reward for rollout in group.rollouts]) for group in groups]


def centred(rewards: Sequence[float]) -> list[Credit]:
    """Judges one group."""
    mean = sum(rewards) / len(rewards)
    return [Credit(reward - mean) for reward in rewards]


ENTRY = Entry(dr_grpo, paper="Liu et al. 2025, arXiv 2503.20783")
