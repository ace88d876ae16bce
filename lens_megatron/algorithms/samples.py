"""Turns training groups into samples, each with its advantage and weight, by pure functions."""

from collections.abc import Sequence

from lens_megatron.algorithms.advantages import ADVANTAGES
from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import Origin, Sample, TrainingGroup


def to_samples(groups: Sequence[TrainingGroup], algorithm: AlgorithmConfig) -> list[Sample]:
    """Returns one sample per rollout, group by group; those of the second wave remember their purified prompt."""
    estimate = ADVANTAGES[algorithm.advantage]
    samples = []
    for group in groups:
        weighted = estimate(group, algorithm)
        original = group.group.prompt.token_ids
        purified = original if group.group.purified is None else group.group.purified.token_ids
        for rollout, advantage, weight in zip(group.rollouts, weighted.advantages, weighted.weights, strict=True):
            generated_from = purified if rollout.origin is Origin.PURIFIED else original
            samples.append(Sample(original, generated_from, rollout, advantage, weight))
    return samples
