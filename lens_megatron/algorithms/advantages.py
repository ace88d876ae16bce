"""Group -> advantage and weight of each rollout. Registry `ADVANTAGES`; an entry is a pure function of one group."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import TrainingGroup


@dataclass(frozen=True, slots=True)
class Weighted:
    """[G] each, in the order of the group's rollouts."""

    advantages: tuple[float, ...]
    weights: tuple[float, ...]


Estimator = Callable[[TrainingGroup, AlgorithmConfig], Weighted]


def crpo(group: TrainingGroup, algorithm: AlgorithmConfig) -> Weighted:
    """LENS, eq. 4-6: success rate a of the original rollouts; w~ = a for original successes, 1 - a for the rest.

    Statistics use w = w~ / sum w~ and the population deviation, so that the sum of w~ A over the group is 0.
    """
    a = group.group.success_rate
    natives = set(map(id, group.group.native))
    weights = [a if r.correct and id(r) in natives else 1 - a for r in group.rollouts]
    if algorithm.weights_scope == "purified_only" and not group.gate:
        weights = [1.0] * len(group.rollouts)
    total = sum(weights)
    if total == 0:  # every rollout wrong at a = 1 cannot be; kept for groups that later filters empty of weight
        return Weighted((0.0,) * len(weights), tuple(weights))
    advantages = weighted_advantages([r.reward for r in group.rollouts], weights, algorithm.advantage_eps)
    if algorithm.loss_weight == "normalised":
        weights = [len(weights) * w / total for w in weights]
    return Weighted(tuple(advantages), tuple(weights))


def grpo(group: TrainingGroup, algorithm: AlgorithmConfig) -> Weighted:
    """GRPO (arXiv 2402.03300) as verl and TRL have it: (r - mean) / (unbiased std + eps), weight 1."""
    rewards = [r.reward for r in group.rollouts]
    count = len(rewards)
    mean = sum(rewards) / count
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (count - 1)) if count > 1 else 1.0
    advantages = [(r - mean) / (std + algorithm.advantage_eps) if std > 0 else 0.0 for r in rewards]
    return Weighted(tuple(advantages), (1.0,) * count)


def weighted_advantages(rewards: Sequence[float], weights: Sequence[float], eps: float) -> list[float]:
    """(r - mu) / (sigma + eps) with weighted mean and population deviation; all 0 where sigma is 0 (LENS, eq. 6)."""
    total = sum(weights)
    mean = sum(w * r for w, r in zip(weights, rewards, strict=True)) / total
    sigma = math.sqrt(sum(w * (r - mean) ** 2 for w, r in zip(weights, rewards, strict=True)) / total)
    return [(r - mean) / (sigma + eps) if sigma > 1e-12 else 0.0 for r in rewards]


ADVANTAGES: dict[str, Estimator] = {"crpo": crpo, "grpo": grpo}
