"""Turns training groups into samples, each with its advantage and weight, by pure functions."""

from collections.abc import Sequence

from lens_megatron.algorithms.advantages import Advantage
from lens_megatron.algorithms.entry import Method
from lens_megatron.algorithms.weights import loss_weights
from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import GroupNumbers, Origin, Sample, TrainingGroup


def to_samples(
    groups: Sequence[TrainingGroup],
    batch: Sequence[GroupNumbers],
    advantage: Method[Advantage],
    algorithm: AlgorithmConfig,
) -> list[Sample]:
    """Returns one sample per rollout, group by group; those of the second wave remember their purified prompt.

    Args:
        batch: the numbers of the step's groups of all ranks.
    """
    samples = []
    judged = advantage.call(groups, batch, algorithm, advantage.options)
    for group, credits in zip(groups, judged, strict=True):
        original = group.group.prompt.token_ids
        purified = original if group.group.purified is None else group.group.purified.token_ids
        weights = loss_weights(group, algorithm)
        for rollout, credit, weight in zip(group.rollouts, credits, weights, strict=True):
            generated_from = purified if rollout.origin is Origin.PURIFIED else original
            keep = credit.keep and (rollout.finished or not algorithm.mask_truncated)
            samples.append(
                Sample(original, generated_from, rollout, credit.advantage, credit.weight * weight, keep=keep)
            )
    return samples
