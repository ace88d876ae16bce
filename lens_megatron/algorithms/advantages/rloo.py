"""RLOO: every rollout is compared with the mean of the others of its group (arXiv 2402.14740)."""

from collections.abc import Sequence

from lens_megatron.algorithms.advantages import Credit
from lens_megatron.algorithms.entry import Entry, NoOptions
from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import GroupNumbers, TrainingGroup


def rloo(
    groups: Sequence[TrainingGroup], batch: Sequence[GroupNumbers], algorithm: AlgorithmConfig, options: NoOptions
) -> list[list[Credit]]:
    """Returns reward - mean of the group's other rewards, which is n / (n - 1) times reward - mean of all n.

    A group of one has no others: its advantage is 0, where verl's is the reward itself.
    """
    return [left_out([rollout.reward for rollout in group.rollouts]) for group in groups]


def left_out(rewards: Sequence[float]) -> list[Credit]:
    """Judges one group."""
    count, mean = len(rewards), sum(rewards) / len(rewards)
    scale = count / (count - 1) if count > 1 else 0.0
    return [Credit(scale * (reward - mean)) for reward in rewards]


ENTRY = Entry(rloo, paper="Ahmadian et al. 2024, arXiv 2402.14740")
