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
    """Returns (reward - mu) / (sigma + `algorithm.advantage_eps`) with weighted statistics of the group.

    With the weights w~ of eq. 4, which `algorithm.weights_scope` may limit to purified groups, statistics use
    w = w~ / sum w~ and the population deviation, so that the sum of w~ A over a group is 0. They do so too where
    `algorithm.weights=none` leaves the loss unweighted.
    """
    return [
        [Credit(a) for a in weighted_advantages(rewards, scoped_weights(group, algorithm), algorithm.advantage_eps)]
        for group in groups
        for rewards in [[r.reward for r in group.rollouts]]
    ]


def weighted_advantages(rewards: Sequence[float], weights: Sequence[float], eps: float) -> list[float]:
    """Returns (r - mu) / (sigma + eps) with weighted mean and population deviation (LENS, eq. 6).

    All are 0 where sigma is 0, and NaN where a reward is not finite. `weights` must not add up to 0.
    """
    total = sum(weights)
    mean = sum(w * r for w, r in zip(weights, rewards, strict=True)) / total
    # A product overflows to infinity, where a power would raise.
    sigma = math.sqrt(sum(w * ((r - mean) * (r - mean)) for w, r in zip(weights, rewards, strict=True)) / total)
    return [0.0 if sigma <= 1e-12 else (r - mean) / (sigma + eps) for r in rewards]


ENTRY = Entry(crpo, paper="LENS, arXiv 2601.21244")
