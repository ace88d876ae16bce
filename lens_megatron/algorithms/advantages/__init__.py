"""Judges the rollouts of groups: one file per method, which `algorithm.advantage` chooses by its name.

A file NAME.py of this folder holds a function of the type `Advantage` and, as ENTRY, what it declares: see dr_grpo.py.
What multiplies the loss besides is in algorithms/weights.py, and algorithms/samples.py puts both together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import GroupNumbers, TrainingGroup

__all__ = ["Advantage", "Credit"]


@dataclass(frozen=True, slots=True)
class Credit:
    """The judgement on one rollout. All of its tokens share it."""

    advantage: float
    """How much better than expected the rollout was: the loss raises the probability of its tokens if it is positive,
    and lowers it if it is negative. A number that is not finite is allowed: the update is then skipped, and dumped."""
    weight: float = 1.0
    """A factor of the policy's loss of the rollout's tokens, beside that of `algorithm.weights`; not negative. The KL,
    entropy and imitation terms do not have it, and the denominators of the loss do not count it."""
    keep: bool = True
    """False leaves the rollout out of the loss and of its denominators."""


Advantage = Callable[[Sequence[TrainingGroup], Sequence[GroupNumbers], AlgorithmConfig, Any], list[list[Credit]]]
"""A pure function of (this rank's groups, the numbers of the step's groups of all ranks, shared options, own options).

It returns one list per group and in it one credit per rollout, both in the order of the arguments. Every rank calls it
with its own groups and the same numbers, which are in the order of their places: a statistic of the whole step is
computed from the numbers, one of a group from the group.

A group is what is trained on: its `rollouts` are the first wave, in which rescued successes may have replaced failures,
so that it can have another size than `rollout.rollouts_per_prompt`; `group.native` is the first wave as it was sampled.
Rewards are those after `reward.rules`. The function must take a group of one, groups without contrast, a rank without
groups, and rewards of any size. Own options are an instance of the class that ENTRY names, NoOptions without one.
"""
