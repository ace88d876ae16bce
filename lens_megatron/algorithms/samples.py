"""Training groups -> samples, with advantage and weight of each. Pure."""

from collections.abc import Sequence

from lens_megatron.algorithms.advantages import ADVANTAGES
from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import Origin, Sample, TrainingGroup


def to_samples(groups: Sequence[TrainingGroup], algorithm: AlgorithmConfig) -> list[Sample]:
    """Every rollout of every group once, group by group; rescued ones remember the purified prompt."""
    estimate = ADVANTAGES[algorithm.advantage]
    samples = []
    for group in groups:
        weighted = estimate(group, algorithm)
        original, purified = group.group.prompt.token_ids, group.group.purified
        for rollout, advantage, weight in zip(group.rollouts, weighted.advantages, weighted.weights, strict=True):
            rescued = rollout.origin is Origin.PURIFIED
            samples.append(Sample(original, purified.token_ids if rescued else original, rollout, advantage, weight))
    return samples
