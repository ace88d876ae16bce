"""Shares between methods of selection: the place in the data, and whether a group has a signal. It is no method."""

from collections.abc import Mapping, Sequence
from typing import Any

from lens_megatron.algorithms.selection import PromptSource
from lens_megatron.results import Outcome
from lens_megatron.types import Prompt, TrainingGroup


class InOrder:
    """Takes the prompts as they come, epoch after epoch. Its state is the position of the next one."""

    def __init__(self, source: PromptSource):
        self.source, self.position = source, 0

    def candidates(self, step: int, count: int) -> Sequence[Prompt]:
        return [self.source.at(self.position + place) for place in range(count)]

    def observe(self, step: int, outcomes: Sequence[Outcome]) -> None:
        self.position += len(outcomes)

    def epoch(self) -> float:
        return self.position / self.source.epoch_length

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def restore(self, state: Mapping[str, Any]) -> None:
        check_names(state, {"position"})
        self.position = count_of(state, "position")


def has_signal(group: TrainingGroup) -> bool:
    """Returns whether some rollouts of the group are correct and some are not (DAPO, arXiv 2503.14476, eq. 11).

    The verdicts decide, not the rewards: shaping a reward gives groups without any success a variance of rewards.
    """
    return 0 < sum(rollout.correct for rollout in group.rollouts) < len(group.rollouts)


def check_names(state: Mapping[str, Any], names: set[str]) -> None:
    """Raises ValueError unless `state` has these names and no others."""
    if state.keys() != names:
        raise ValueError(
            f"expected {', '.join(sorted(names))}; found {', '.join(sorted(map(str, state))) or 'nothing'}"
        )


def count_of(state: Mapping[str, Any], name: str) -> int:
    """Returns `state[name]`. Raises ValueError unless it is a whole number that is not negative."""
    value = state[name]
    if type(value) is not int or value < 0:
        raise ValueError(f"{name}: expected a number of prompts, found {value!r}")
    return value
