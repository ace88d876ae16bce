"""Counts groups and scores: how hard the prompts of each step were, and how scores of tokens are distributed."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lens_megatron.tools.report.rollout_groups import PromptToken, RolloutGroup


@dataclass(frozen=True, slots=True)
class StepShares:
    """Shares of the groups of a step, by the success of their first waves."""

    step: int
    groups: int
    failure: float
    """No rollout of the first wave is correct."""
    mid: float
    """Some are."""
    high: float
    """All are."""
    zero_before: float
    """No rollout of the first wave has a reward above 0."""
    zero_after: float
    """No rollout that is trained on has one: less than before where second waves rescued prompts."""


@dataclass(frozen=True, slots=True)
class ScoreBin:
    """Counts scores of low <= score < high. The bins grow by the same factor, as scores span orders of magnitude."""

    low: float
    high: float
    deleted: int
    kept: int


@dataclass(frozen=True, slots=True)
class TokenScore:
    """The score of a prompt token of a second wave."""

    value: float
    deleted: bool


@dataclass(frozen=True, slots=True)
class NoisePrecision:
    """Counts over the prompts of second waves of a step, where the data marks noise."""

    step: int
    deleted: int
    deleted_noise: int
    eligible: int
    eligible_noise: int


BINS_PER_DECADE, LOWEST_SCORE, HIGHEST_SCORE = 4, 1e-4, 1e2
"""Scores beyond the bounds are counted in the first and the last bin. Below 1e-4 lens.min_score deletes nothing."""


def step_shares(step: int, groups: Sequence[RolloutGroup]) -> StepShares | None:
    """Counts the groups of a step; None where there are none."""
    if not groups:
        return None
    before = [group.success_before for group in groups]
    failure, high = _share(b == 0 for b in before), _share(b == 1 for b in before)
    return StepShares(
        step=step,
        groups=len(groups),
        failure=failure,
        mid=1 - failure - high,
        high=high,
        zero_before=_share(group.zero_before for group in groups),
        zero_after=_share(group.zero_after for group in groups),
    )


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values)


def token_scores(groups: Iterable[RolloutGroup]) -> list[TokenScore]:
    """Returns the scores of the tokens that could be deleted, of the prompts that were sampled again."""
    return [
        TokenScore(token.score, token.deleted)
        for group in groups
        if group.second_wave
        for token in group.tokens
        if token.score is not None and token.eligible
    ]


def histogram(scores: Iterable[TokenScore]) -> tuple[ScoreBin, ...]:
    """Counts scores in bins of a quarter of a decade; returns those from the first to the last that is not empty."""
    counts = {True: dict[int, int](), False: dict[int, int]()}
    for score in scores:
        bounded = min(max(score.value, LOWEST_SCORE), HIGHEST_SCORE)
        place = math.floor(BINS_PER_DECADE * math.log10(bounded) + 1e-9)
        counts[score.deleted][place] = counts[score.deleted].get(place, 0) + 1
    used = counts[True].keys() | counts[False].keys()
    return tuple(
        ScoreBin(_edge(i), _edge(i + 1), counts[True].get(i, 0), counts[False].get(i, 0))
        for i in (range(min(used), max(used) + 1) if used else ())
    )


def _edge(place: int) -> float:
    return float(10 ** (place / BINS_PER_DECADE))


def noise_precision(step: int, groups: Iterable[RolloutGroup]) -> NoisePrecision | None:
    """Counts planted noise among the deleted tokens and among those that could be deleted; None without any noise."""
    again = [token for group in groups if group.second_wave for token in group.tokens]
    tokens: list[PromptToken] = [token for token in again if token.eligible]
    if not any(token.noise for token in tokens):
        return None
    deleted = [token for token in tokens if token.deleted]
    noise = sum(token.noise for token in tokens)
    return NoisePrecision(step, len(deleted), sum(token.noise for token in deleted), len(tokens), noise)


def added(histograms: Iterable[Sequence[ScoreBin]]) -> tuple[ScoreBin, ...]:
    """Adds up histograms bin by bin; a bin that none of them has is left out."""
    total: dict[float, ScoreBin] = {}
    for score_bin in (score_bin for histogram in histograms for score_bin in histogram):
        old = total.get(score_bin.low, ScoreBin(score_bin.low, score_bin.high, 0, 0))
        total[score_bin.low] = ScoreBin(
            score_bin.low, score_bin.high, old.deleted + score_bin.deleted, old.kept + score_bin.kept
        )
    return tuple(total[low] for low in sorted(total))
