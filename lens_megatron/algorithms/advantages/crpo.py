"""CRPO: rewards of a group are weighted by how well its original prompt does (LENS, eq. 6)."""

import math
from collections.abc import Sequence

from lens_megatron.algorithms.advantages import Credit
from lens_megatron.algorithms.entry import Entry, NoOptions
from lens_megatron.algorithms.weights import scoped_weights
from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import GroupNumbers, TrainingGroup


def crpo(
    groups: Sequence[TrainingGroup], batch: Sequence[GroupNumbers], algorithm: AlgorithmConfig, options: NoOptions
) -> list[list[Credit]]:
    """Returns advantages by weighted group statistics.

    With the weights w~ of eq. 4, statistics use w = w~ / sum w~ and the population deviation, so that the sum of w~ A
    over a group is 0.
    """
    return [
        [Credit(a) for a in weighted_advantages(rewards, scoped_weights(group, algorithm), algorithm.advantage_eps)]
        for group in groups
        for rewards in [[r.reward for r in group.rollouts]]
    ]


def weighted_advantages(rewards: Sequence[float], weights: Sequence[float], eps: float) -> list[float]:
    """Returns (r - mu) / (sigma + eps) with weighted mean and population deviation (LENS, eq. 6).

    All are 0 where sigma is 0. `weights` must not add up to 0.
    """
    total = sum(weights)
    mean = sum(w * r for w, r in zip(weights, rewards, strict=True)) / total
    sigma = math.sqrt(sum(w * (r - mean) ** 2 for w, r in zip(weights, rewards, strict=True)) / total)
    return [(r - mean) / (sigma + eps) if sigma > 1e-12 else 0.0 for r in rewards]


ENTRY = Entry(crpo, paper="LENS, arXiv 2601.21244")
