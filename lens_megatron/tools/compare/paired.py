"""Compares two methods over seeds, paired by seed: interval, test, and the seeds that a claim would need.

Pure functions of numbers. Distributions are scipy's.
"""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from lens_megatron.evaluation.statistics import exact_sign_flip_p_value

LEVEL, POWER = 0.05, 0.8
"""The probability of claiming a difference where there is none, and of finding one of the supposed size."""
MOST_EXACT = 12
"""Up to this number of pairs all sign flips are enumerated: 4,096 of them."""
DRAWS = 20_000
MOST_SEEDS = 10_000
"""Nobody trains more; a claim that needs more has no number."""
_TOLERANCE = 1e-12
"""Sums of the same numbers in another order differ by rounding; they count as equal."""


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """The differences of a number between a method and the baseline, one per seed that both have."""

    differences: tuple[float, ...]
    mean: float
    deviation: float | None
    """The standard deviation of the differences; None with fewer than two seeds, as all that follows from it."""
    low: float | None
    high: float | None
    """The 95 % t interval of the mean, which supposes that differences are spread normally."""
    p_value: float | None
    """Of the sign-flip test: two-sided, without that supposition. None with fewer than two seeds."""
    seeds_needed: int | None
    """How many seeds a claim of a difference of this size needs; None where it is 0, too small, or has no deviation."""

    @property
    def least_p_value(self) -> float:
        """The smallest p-value that this number of seeds can give, however large the difference."""
        return 2.0 ** (1 - len(self.differences))


def compare(differences: Sequence[float]) -> PairedDifference:
    """Compares by the differences method - baseline, of which there is at least one."""
    count, mean = len(differences), statistics.fmean(differences)
    if count < 2:
        return PairedDifference(tuple(differences), mean, None, None, None, None, None)
    deviation = statistics.stdev(differences)
    half = float(stats.t.ppf(1 - LEVEL / 2, count - 1)) * deviation / math.sqrt(count)
    return PairedDifference(
        differences=tuple(differences),
        mean=mean,
        deviation=deviation,
        low=mean - half,
        high=mean + half,
        p_value=sign_flip_p_value(differences),
        seeds_needed=seeds_needed(mean / deviation) if deviation else None,
    )


def sign_flip_p_value(differences: Sequence[float], seed: int = 0) -> float:
    """Returns the share of ways to flip the signs of the differences that give a sum at least as far from 0.

    Without an effect each sign is a matter of chance, so this is the p-value of the two-sided permutation test of
    paired data (Fisher 1935). Up to MOST_EXACT differences it is exact; beyond, it is of DRAWS random flips, and one is
    added to both counts (Phipson and Smyth 2010, eq. 2), so that it is never 0.
    """
    if len(differences) <= MOST_EXACT:
        return exact_sign_flip_p_value(differences)
    bound = abs(math.fsum(differences)) - _TOLERANCE * math.fsum(map(abs, differences))
    chance = random.Random(seed)
    far = sum(abs(math.fsum(chance.choice((1, -1)) * d for d in differences)) >= bound for _ in range(DRAWS))
    return (far + 1) / (DRAWS + 1)


def power(effect: float, count: int) -> float:
    """Returns the probability that a two-sided paired t test at LEVEL finds an effect with `count` pairs.

    With t' noncentral t of count - 1 degrees of freedom and noncentrality effect * sqrt(count), and c the quantile
    1 - LEVEL / 2 of t, it is P(t' > c) + P(t' < -c) (Cohen, Statistical Power Analysis, 2nd ed. 1988, section 2.5).

    Args:
        effect: mean / standard deviation of the differences.
    """
    bound, noncentrality = stats.t.ppf(1 - LEVEL / 2, count - 1), abs(effect) * math.sqrt(count)
    return float(stats.nct.sf(bound, count - 1, noncentrality) + stats.nct.cdf(-bound, count - 1, noncentrality))


def seeds_needed(effect: float) -> int | None:
    """Returns the least number of pairs with which `power` is at least POWER; None beyond MOST_SEEDS, or for 0."""
    if not effect:
        return None
    normal = statistics.NormalDist()
    wanted = (normal.inv_cdf(1 - LEVEL / 2) + normal.inv_cdf(POWER)) / abs(effect)
    if wanted**2 > MOST_SEEDS:
        return None
    # The normal distribution, for which this is the number, needs fewer pairs than Student's at any size.
    count = max(2, math.floor(wanted**2))
    while power(effect, count) < POWER:
        count += 1
    return count
