"""CRPO: rewards of a group are weighted by how well its original prompt does (LENS, eq. 4-6)."""

import math
from collections.abc import Sequence

from lens_megatron.algorithms.advantages.estimator import WeightedAdvantages
from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import TrainingGroup


def crpo(group: TrainingGroup, algorithm: AlgorithmConfig) -> WeightedAdvantages:
    """Returns advantages by weighted group statistics, and the weights w~ themselves.

    With the success rate a of the first wave, w~ is a for its successes and 1 - a for all other rollouts. Statistics
    use w = w~ / sum w~ and the population deviation, so that the sum of w~ A over the group is 0.
    """
    a = group.group.success_rate
    natives = set(map(id, group.group.native))
    weights = [a if r.correct and id(r) in natives else 1 - a for r in group.rollouts]
    if algorithm.weights_scope == "purified_only" and not group.gate:
        weights = [1.0] * len(group.rollouts)
    advantages = weighted_advantages([r.reward for r in group.rollouts], weights, algorithm.advantage_eps)
    if algorithm.loss_weight == "normalised":
        total = sum(weights)
        weights = [len(weights) * w / total for w in weights]
    return WeightedAdvantages(tuple(advantages), tuple(weights))


def weighted_advantages(rewards: Sequence[float], weights: Sequence[float], eps: float) -> list[float]:
    """Returns (r - mu) / (sigma + eps) with weighted mean and population deviation (LENS, eq. 6).

    All are 0 where sigma is 0. `weights` must not add up to 0.
    """
    total = sum(weights)
    mean = sum(w * r for w, r in zip(weights, rewards, strict=True)) / total
    sigma = math.sqrt(sum(w * (r - mean) ** 2 for w, r in zip(weights, rewards, strict=True)) / total)
    return [(r - mean) / (sigma + eps) if sigma > 1e-12 else 0.0 for r in rewards]
