"""Skips prompts that had no signal when they were last sampled, and trains on no group without one."""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from pydantic import Field

from lens_megatron.algorithms.entry import Entry
from lens_megatron.algorithms.selection import PromptSource
from lens_megatron.algorithms.selection._cursor import InOrder, check_names, count_of, has_signal
from lens_megatron.config import Section
from lens_megatron.results import Outcome
from lens_megatron.seeds import derive
from lens_megatron.types import Prompt, TrainingGroup

LEAST_P, MOST_P = 0.05, 0.95
"""The bounds within which the probabilities adjust themselves."""
EASY_SHARE = 1 / 3
"""The share of `target` that groups without a failure may make up; the rest is for those without a success."""


class GresoOptions(Section):
    """Which prompts GRESO skips."""

    p_easy: float = Field(0.5, ge=LEAST_P, le=MOST_P)
    """At first, the probability with which a prompt that was all correct once is sampled again."""
    p_hard: float = Field(0.5, ge=LEAST_P, le=MOST_P)
    """At first, the probability with which a prompt that was all wrong once is sampled again."""
    target: float = Field(0.25, gt=0, lt=1)
    """The share of groups without a signal to aim at: a third of it all correct, the rest all wrong."""
    adjustment: float = Field(0.01, ge=0, le=0.5)
    """The change of either probability after each step from the second epoch on. 0: they stay."""
    exploration: float = Field(0.01, ge=0, le=1)
    """Every prompt is sampled with at least this probability."""


class Greso(InOrder):
    """Goes through the data and skips prompts at random, by what became of them before.

    Its state, besides the position, is p_easy, p_hard and a number for each prompt that had no signal at its last
    visit: how many times in a row it was all correct, or less than 0, all wrong.
    """

    refills = True

    def __init__(self, source: PromptSource, seed: int, options: GresoOptions):
        super().__init__(source)
        self.seed, self.options = seed, options
        self.p_easy, self.p_hard = options.p_easy, options.p_hard
        self.streaks: dict[int, int] = {}

    def candidates(self, step: int, count: int) -> Sequence[Prompt]:
        return [prompt for _, prompt in islice(self._walk(step), count)]

    def keep(self, group: TrainingGroup) -> bool:
        return has_signal(group)

    def observe(self, step: int, outcomes: Sequence[Outcome]) -> None:
        """Prompts that were skipped before the last one sampled have had their turn in this epoch."""
        if not outcomes:
            return
        after_first_epoch = self.epoch() >= 1
        *_, (last, _) = islice(self._walk(step), len(outcomes))
        self.position = last + 1
        for outcome in outcomes:
            self._note(outcome)
        if after_first_epoch:
            self._adjust(outcomes)

    def state(self) -> dict[str, Any]:
        return super().state() | {
            "p_easy": self.p_easy,
            "p_hard": self.p_hard,
            "prompts": list(self.streaks),
            "streaks": list(self.streaks.values()),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        check_names(state, {"position", "p_easy", "p_hard", "prompts", "streaks"})
        for name in ("p_easy", "p_hard"):
            if type(state[name]) is not float or not LEAST_P <= state[name] <= MOST_P:
                raise ValueError(f"{name}: expected a number from {LEAST_P} to {MOST_P}, found {state[name]!r}")
        for name in ("prompts", "streaks"):
            if type(state[name]) is not list or any(type(number) is not int for number in state[name]):
                raise ValueError(f"{name}: expected a list of whole numbers")
        streaks = dict(zip(state["prompts"], state["streaks"], strict=True))
        if len(streaks) < len(state["prompts"]) or 0 in streaks.values():
            raise ValueError("prompts and streaks: a prompt comes twice, or a streak is 0")
        self.position = count_of(state, "position")
        self.p_easy, self.p_hard, self.streaks = state["p_easy"], state["p_hard"], streaks

    def probability(self, prompt_index: int) -> float:
        """Returns the probability with which a prompt is sampled when its turn comes: max(p^z, exploration)."""
        streak = self.streaks.get(prompt_index, 0)
        p = self.p_easy if streak > 0 else self.p_hard
        return max(p ** abs(streak), self.options.exploration)

    def _walk(self, step: int) -> Iterator[tuple[int, Prompt]]:
        """Yields prompts of `step` with their positions, without an end: a pure function of the state and the step.

        At most one epoch's worth of prompts is skipped, so that a step begins however little there is to learn.
        """
        chance = random.Random(derive(self.seed, "greso", step))
        position, may_skip = self.position, self.source.epoch_length
        while True:
            prompt = self.source.at(position)
            if may_skip and chance.random() >= self.probability(prompt.index):
                may_skip -= 1
            else:
                yield position, prompt
            position += 1

    def _note(self, outcome: Outcome) -> None:
        before = self.streaks.pop(outcome.prompt_index, 0)
        if outcome.trained_success_rate == 1:
            self.streaks[outcome.prompt_index] = max(before, 0) + 1
        elif outcome.trained_success_rate == 0:
            self.streaks[outcome.prompt_index] = min(before, 0) - 1

    def _adjust(self, outcomes: Sequence[Outcome]) -> None:
        rates = [outcome.trained_success_rate for outcome in outcomes]
        easy, hard = rates.count(1) / len(rates), rates.count(0) / len(rates)
        target, adjustment = self.options.target, self.options.adjustment
        self.p_easy = _adjusted(self.p_easy, easy, target * EASY_SHARE, adjustment)
        self.p_hard = _adjusted(self.p_hard, hard, target * (1 - EASY_SHARE), adjustment)


def _adjusted(p: float, observed: float, target: float, adjustment: float) -> float:
    """Returns `p` one adjustment lower if `observed` has reached `target`, else higher, within the bounds."""
    return min(MOST_P, max(LEAST_P, p - adjustment if observed >= target else p + adjustment))


def greso(source: PromptSource, seed: int, options: GresoOptions) -> Greso:
    """Returns GRESO (arXiv 2506.02177): it predicts which prompts have no signal, and mostly does not sample them.

    A prompt whose rollouts were all correct in its last z visits is skipped with probability 1 - max(p_easy^z,
    exploration) when its turn comes, one whose rollouts were all wrong likewise with p_hard; any other is sampled. A
    skipped prompt has its next turn in the next epoch. From the second epoch on, each step adjusts p_easy: down if at
    least a third of `target` of all groups sampled in the step were all correct, else up; and p_hard, with all wrong
    and two thirds. Groups without a signal are rejected, as `dynamic_sampling` does.

    Verdicts decide, not rewards. With purification a group counts as it is trained on, after the second wave was
    merged into it, so that a prompt is predicted to have no signal if and only if its last group was rejected.
    """
    return Greso(source, seed, options)


ENTRY = Entry(greso, paper="GRESO, Zheng et al. 2025, arXiv 2506.02177", options=GresoOptions)
