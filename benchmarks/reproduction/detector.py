"""Judges a score of prompt tokens as a detector of planted noise, by pure functions on arrays.

README.md says which of these numbers the protocol takes, and of which prompts. Axes are those of lens_megatron.types:
L tokens of one prompt, P prompts. An array named `noise` or `operative` is bool and marks tokens; only the eligible
tokens of a prompt are compared, so that protected text counts neither for a score nor against it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lens_megatron.evaluation.statistics import exact_sign_flip_p_value

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Statistic = Callable[[Floats], float]
"""A number of the values [P] or [P, C] of some prompts."""
CHUNK = 2_000_000
"""Numbers that the bootstrap draws at once: about 16 MB."""


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """The tokens of one prompt with what a detector says of them and what the data knows; each array is [L]."""

    scores: Floats
    """The higher, the sooner the token is deleted. None may be NaN."""
    eligible: Bools
    """The tokens that may be deleted."""
    noise: Bools
    """The tokens of planted distractors."""
    operative: Bools
    """The tokens of the operative number, that is the distractor's number that a trapped solution takes up."""

    def __post_init__(self) -> None:
        shapes = {name: getattr(self, name).shape for name in ("scores", "eligible", "noise", "operative")}
        if len(set(shapes.values())) != 1 or self.scores.ndim != 1:
            raise ValueError(f"the arrays of a prompt are [L] for the same L, got {shapes}")
        if np.isnan(self.scores).any():
            raise ValueError(f"scores hold {int(np.isnan(self.scores).sum())} NaN; drop the prompt, and count it")


@dataclass(frozen=True, slots=True)
class Interval:
    """A number with its bootstrap interval."""

    value: float
    """Of all prompts, not the mean of the draws."""
    low: float
    high: float


# ---- one prompt -----------------------------------------------------------------------------------------------------


def base_rate(prompt: ScoredPrompt) -> float:
    """Returns the share of eligible tokens that are noise: the precision of random deletion. NaN without any."""
    return _mean(prompt.noise[prompt.eligible])


def precision_at(prompt: ScoredPrompt, k: int) -> float:
    """Returns the share of noise among the k eligible tokens with the highest scores; NaN if k is 0.

    Where equal scores straddle the k-th place, the expectation over a random order among them: a score that says
    nothing, as every score at step 0, thus has the base rate, wherever in the prompt its noise stands.

    Raises ValueError for k below 0 or above the number of eligible tokens.
    """
    return _share_at(prompt, prompt.noise, k, of=k)


def recall_at(prompt: ScoredPrompt, k: int) -> float:
    """Returns the share of the operative number's eligible tokens among the k highest, as `precision_at` takes ties.

    NaN where the prompt has no operative token that may be deleted. Raises ValueError as `precision_at` does.
    """
    return _share_at(prompt, prompt.operative, k, of=int((prompt.operative & prompt.eligible).sum()))


def precision_of(deleted: Bools, prompt: ScoredPrompt) -> float:
    """Returns the share of noise among the tokens that were deleted, `deleted` [L]; NaN where none was."""
    return _mean(prompt.noise[deleted])


def recall_of(deleted: Bools, prompt: ScoredPrompt) -> float:
    """Returns the share of the operative number's eligible tokens that were deleted; NaN where it has none."""
    return _mean(deleted[prompt.operative & prompt.eligible])


def roc_area(scores: Floats, positive: Bools) -> float:
    """Returns the probability that a positive has a higher score than a negative, ties counting one half.

    It is (R - n (n + 1) / 2) / (n m) with R the sum of the positives' ranks among all, tied scores sharing their mean
    rank, n positives and m negatives (Mann and Whitney 1947). NaN where one of the classes is empty.

    Args:
        scores, positive: [N] of the tokens that are compared, mostly the eligible ones of one prompt.
    """
    n, m = int(positive.sum()), int((~positive).sum())
    if n == 0 or m == 0:
        return float("nan")
    ranks = _mean_ranks(scores)
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def prompt_roc_area(prompt: ScoredPrompt) -> float:
    """Returns the `roc_area` of noise among the eligible tokens of one prompt, so that only ranks within it count."""
    return roc_area(prompt.scores[prompt.eligible], prompt.noise[prompt.eligible])


def _share_at(prompt: ScoredPrompt, marked: Bools, k: int, of: int) -> float:
    scores, marked = prompt.scores[prompt.eligible], marked[prompt.eligible]
    if not 0 <= k <= len(scores):
        raise ValueError(f"k is {k}, and the prompt has {len(scores)} eligible tokens; choose 0 <= k <= {len(scores)}")
    if of == 0:
        return float("nan")
    if k == 0:
        return 0.0
    threshold = np.sort(scores)[::-1][k - 1]
    above, tied = scores > threshold, scores == threshold
    from_ties = (k - above.sum()) / tied.sum() * marked[tied].sum()
    return float((marked[above].sum() + from_ties) / of)


def _mean_ranks(values: Floats) -> Floats:
    """Returns the ranks [N] from 1 in ascending order; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _mean(values: NDArray) -> float:
    return float(values.mean()) if values.size else float("nan")


# ---- many prompts ---------------------------------------------------------------------------------------------------


def gate_share(before: Floats, after: Floats) -> float:
    """Returns the share of prompts whose success rate rose strictly, as LENS' gate asks (eq. 2); both are [P]."""
    return _mean(after > before)


def mean_of_known(values: Floats) -> float:
    """Returns the mean of the values [P] that are no NaN; NaN where there is none."""
    return _mean(values[~np.isnan(values)])


def ratio_of_sums(columns: Floats) -> float:
    """Returns sum of column 0 / sum of column 1 of [P, 2], such as noise among all deleted tokens; NaN for 0 / 0."""
    above, below = columns.sum(0)
    return float(above / below) if below else float("nan")


def bootstrap_interval(
    values: Floats,
    statistic: Statistic = mean_of_known,
    *,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Returns a statistic of prompts with its percentile interval over resampled prompts (Efron 1979).

    Tokens of a prompt depend on each other, so whole prompts are drawn, with replacement. A draw whose statistic is NaN
    is left out. For a paired comparison give the differences of two methods on the same prompts.

    Args:
        values: [P] or [P, C]; the prompts stand along the first axis.
        statistic: of such an array; `mean_of_known` of [P] is drawn without a loop.

    Raises:
        ValueError: there is no prompt, or the statistic is NaN for all of them together.
    """
    if len(values) == 0:
        raise ValueError("there is no prompt to draw from; give at least one")
    value = statistic(values)
    if np.isnan(value):
        raise ValueError(f"the statistic of all {len(values)} prompts is not a number; leave the comparison out")
    generator = np.random.default_rng(seed)
    found, step = [], max(1, CHUNK // len(values))
    for start in range(0, draws, step):
        chosen = generator.integers(0, len(values), (min(step, draws - start), len(values)))
        found.append(_statistics(values, chosen, statistic))
    drawn = np.concatenate(found)
    low, high = np.quantile(drawn[~np.isnan(drawn)], [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _statistics(values: Floats, chosen: NDArray[np.int64], statistic: Statistic) -> Floats:
    """Returns the statistic of each row of `chosen` [D, P], indices of prompts: [D]."""
    if statistic is not mean_of_known or values.ndim > 1:
        return np.array([statistic(values[row]) for row in chosen])
    known = ~np.isnan(values)
    sums, counts = np.where(known, values, 0.0)[chosen].sum(1), known[chosen].sum(1)
    return np.divide(sums, counts, out=np.full(len(chosen), np.nan), where=counts > 0)


# ---- many seeds -----------------------------------------------------------------------------------------------------


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """Returns the two-sided p-value that paired differences are symmetric about 0 (Fisher's exact randomization test).

    All 2^n flips of signs are counted, those with a mean at least as far from 0 as the one found: with n seeds the
    least possible value is 2 / 2^n, which is 0.0078 for 8 seeds and 0.25 for 3.

    Raises ValueError for no difference, or for more than 20, whose flips are too many to count.
    """
    n = len(differences)
    if not 1 <= n <= 20:
        raise ValueError(f"got {n} paired differences; the exact test takes 1 to 20")
    return exact_sign_flip_p_value(differences)
