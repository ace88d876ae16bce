"""Defines what every method of advantages takes and returns."""

from collections.abc import Callable
from dataclasses import dataclass

from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import TrainingGroup


@dataclass(frozen=True, slots=True)
class WeightedAdvantages:
    """Advantages and weights: one number of each per rollout, in the order of `TrainingGroup.rollouts`."""

    advantages: tuple[float, ...]
    weights: tuple[float, ...]
    """Factors of the loss of the rollout's tokens."""


Estimator = Callable[[TrainingGroup, AlgorithmConfig], WeightedAdvantages]
"""A pure function of one group."""
