"""Selects prompts and groups: one file per method, which `selection.method` chooses by its name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lens_megatron.results import Outcome
from lens_megatron.types import Prompt, TrainingGroup

__all__ = ["PromptSource", "Selection", "SelectionFactory"]


class PromptSource(Protocol):
    """The training prompts in the order of the epochs, without an end."""

    @property
    def epoch_length(self) -> int:
        """The number of prompts of one pass over the data."""

    def at(self, position: int) -> Prompt:
        """Returns the prompt at `position`, counted from 0 over all epochs."""


class Selection(Protocol):
    """Decides which prompts a step samples and which of their groups it trains on. Every rank holds an equal one.

    A step calls `candidates`, samples the first of them and, for every group that `keep` rejects, the next one, until
    `rollout.prompts_per_step` groups have passed. Then it calls `observe`, the only method that changes the state.
    """

    refills: bool
    """False if `keep` accepts every group, so that a step samples as many prompts as it trains on."""

    def candidates(self, step: int, count: int) -> Sequence[Prompt]:
        """Returns the next `count` prompts that the step may sample, by the state; `step` counts from 1."""

    def keep(self, group: TrainingGroup) -> bool:
        """Returns whether to train on the group. A pure function of the group."""

    def observe(self, step: int, outcomes: Sequence[Outcome]) -> None:
        """Takes note of the step's groups of all ranks, rejected ones too, in the order of the candidates."""

    def epoch(self) -> float:
        """Returns the passes over the data that have been made: 1.5 is the middle of the second."""

    def state(self) -> dict[str, Any]:
        """Returns all that `restore` needs, as JSON values. It is kept in the checkpoint."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts the state back. Raises ValueError where it is not one of this method."""


SelectionFactory = Callable[[PromptSource, int, Any], Selection]
"""It takes (the prompts, the run's seed, own options)."""
