"""Judges the rollouts of groups: one file per method, which `algorithm.advantage` chooses by its name.

What multiplies the loss besides is in algorithms/weights.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import GroupNumbers, TrainingGroup

__all__ = ["Advantage", "Credit"]


@dataclass(frozen=True, slots=True)
class Credit:
    """The judgement on one rollout."""

    advantage: float
    weight: float = 1.0
    """A factor of the loss of the rollout's tokens, beside that of `algorithm.weights`."""
    keep: bool = True
    """False leaves the rollout out of the loss and of its denominators."""


Advantage = Callable[[Sequence[TrainingGroup], Sequence[GroupNumbers], AlgorithmConfig, Any], list[list[Credit]]]
"""A pure function of (this rank's groups, the numbers of the step's groups of all ranks, shared options, own options).

It returns one credit per rollout, in the order of each group's `rollouts`.
"""
