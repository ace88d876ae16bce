"""Weighs the loss of each rollout of a group; `algorithm.weights` chooses how."""

from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import TrainingGroup


def loss_weights(group: TrainingGroup, algorithm: AlgorithmConfig) -> list[float]:
    """Returns what multiplies the loss of each of the group's rollouts: w~, or with `loss_weight=normalised` the group
    size times w~ / sum of w~, or 1 without weights."""
    if algorithm.loss_weights == "none":
        return [1.0] * len(group.rollouts)
    weights = scoped_weights(group, algorithm)
    if algorithm.loss_weight == "normalised":
        total = sum(weights)
        weights = [len(weights) * w / total for w in weights]
    return weights


def scoped_weights(group: TrainingGroup, algorithm: AlgorithmConfig) -> list[float]:
    """Returns w~ where `weights_scope` wants it, and 1 for every rollout of any other group."""
    if algorithm.weights_scope == "purified_only" and not group.gate:
        return [1.0] * len(group.rollouts)
    return crpo_weights(group)


def crpo_weights(group: TrainingGroup) -> list[float]:
    """Returns w~ (LENS, eq. 4): with the success rate a of the first wave, a for its successes, else 1 - a."""
    a = group.group.success_rate
    natives = set(map(id, group.group.native))
    return [a if r.correct and id(r) in natives else 1 - a for r in group.rollouts]
