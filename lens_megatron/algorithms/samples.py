"""Turns training groups into samples, each with its advantage and weight, by pure functions."""

from collections.abc import Sequence

from lens_megatron.algorithms.advantages import Advantage, Credit
from lens_megatron.algorithms.entry import Method
from lens_megatron.algorithms.weights import loss_weights
from lens_megatron.config import AlgorithmConfig, ConfigError
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

    Raises:
        ConfigError: the advantage does not give each rollout one credit.
    """
    samples = []
    for group, credits in zip(groups, _judge(groups, batch, advantage, algorithm), strict=True):
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


def _judge(
    groups: Sequence[TrainingGroup],
    batch: Sequence[GroupNumbers],
    advantage: Method[Advantage],
    algorithm: AlgorithmConfig,
) -> list[list[Credit]]:
    judged = advantage.call(groups, batch, algorithm, advantage.options)
    sizes, found = [len(group.rollouts) for group in groups], [len(credits) for credits in judged]
    if found != sizes:
        raise ConfigError(
            f"algorithm.advantage={advantage.name} returned {found} credits for groups of {sizes} rollouts; return one "
            "list per group, and in it one credit per rollout"
        )
    return judged
