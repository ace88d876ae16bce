"""Estimates of accuracy and their uncertainty, as pure functions of arrays.

A benchmark is a sample of problems: uncertainty is over problems, and the completions of one problem are averaged
first. Everything is seeded, so that equal inputs give equal numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
"""Bootstrap draws, and random sign flips."""
LEVEL = 0.95
_EXACT_FLIPS = 14
"""With at most this many differing problems all sign flips are counted, 2^14 of them."""
_CHUNK = 1_000
_SUBSETS = 200

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its uncertainty. Shares, so 0.5 is 50 %."""

    mean: float
    low: float
    high: float
    """[low, high] is the percentile interval at `LEVEL`."""
    standard_error: float


def pass_at(successes: Sequence[int], samples: int) -> Floats:
    """Returns [problems, samples] the unbiased estimate of pass@k of every problem, for k = 1 ... samples.

    1 - C(n - c, k) / C(n, k) for c successes among n samples (Chen et al. 2021, arXiv 2107.03374, eq. 1).

    Raises ValueError for a count that is not in 0 ... samples.
    """
    counts = np.asarray(successes, dtype=np.int64)
    if samples < 1 or (counts < 0).any() or (counts > samples).any():
        raise ValueError(f"successes {list(successes)[:5]} ... of {samples} samples; counts lie between 0 and samples")
    failures = samples - counts[:, None]
    # C(n-c, k) / C(n, k) is the product over i < k of (n-c-i) / (n-i), and 0 from its first factor of 0 on.
    steps = np.arange(samples)
    factors = np.clip(failures - steps, 0, None) / (samples - steps)
    return 1.0 - np.cumprod(factors, axis=1)


def bootstrap_means(scores: Sequence[float] | Floats, seed: int, draws: int = DRAWS) -> Floats:
    """Returns [draws] means of `scores` over problems drawn with replacement.

    Where all problems have one score a bootstrap has nothing to draw from, and would claim certainty from thirty
    failures. The draws are then those of the Beta(1 + sum, 1 + n - sum) distribution, which is what is known of a share
    after that many successes of n (uniform prior): 0 of 30 gives an upper bound of 11 %.

    Args:
        scores: [problems] between 0 and 1.

    Raises ValueError without scores.
    """
    values = np.asarray(scores, dtype=np.float64)
    if not values.size:
        raise ValueError("no scores; an uncertainty needs at least one problem")
    generator = np.random.default_rng(seed)
    if (values == values[0]).all():
        total = float(values.sum())
        return generator.beta(1 + total, 1 + values.size - total, draws)
    return _resampled(values, generator, draws)


def _resampled(values: Floats, generator: np.random.Generator, draws: int) -> Floats:
    shares = np.full(values.size, 1 / values.size)
    parts = [
        generator.multinomial(values.size, shares, size=min(_CHUNK, draws - start)) @ values / values.size
        for start in range(0, draws, _CHUNK)
    ]
    return np.concatenate(parts)


def estimate(scores: Sequence[float] | Floats, seed: int) -> Estimate:
    """Returns the mean over problems with its percentile bootstrap interval. `scores`: [problems] from 0 to 1."""
    return of_draws(float(np.mean(scores)), bootstrap_means(scores, seed))


def of_draws(mean: float, draws: Floats) -> Estimate:
    """Returns the estimate whose uncertainty is that of `draws`; the interval always contains the mean."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, min(float(low), mean), max(float(high), mean), float(draws.std()))


def average(parts: Sequence[Sequence[float] | Floats], seed: int) -> Estimate:
    """Returns the unweighted mean over benchmarks; problems are drawn within each benchmark.

    Args:
        parts: for each benchmark its [problems] scores.
    """
    means = [float(np.mean(scores)) for scores in parts]
    draws = np.mean([bootstrap_means(scores, seed + place) for place, scores in enumerate(parts)], axis=0)
    return of_draws(float(np.mean(means)), draws)


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of two runs on the same problems, first minus second."""

    mean: float
    low: float
    high: float
    p_value: float
    """Two-sided, of the hypothesis that on every problem the two could as well be exchanged."""


def paired(parts: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int) -> Difference:
    """Compares two runs problem by problem; benchmarks count equally, as in `average`.

    The interval is a percentile bootstrap over problems, the p-value that of a permutation test that flips the sign of
    each problem's difference: of all flips where few problems differ, else of random ones, with one added to both
    counts.

    Args:
        parts: for each benchmark the [problems] scores of both runs, in the same order.

    Raises ValueError for unequal lengths, or without problems.
    """
    differences = []
    for first, second in parts:
        if len(first) != len(second):
            raise ValueError(f"{len(first)} scores beside {len(second)}; both runs must have the same problems")
        differences.append(np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64))
    if not differences or not all(values.size for values in differences):
        raise ValueError("nothing to compare; both runs need at least one problem")
    mean = float(np.mean([values.mean() for values in differences]))
    generator = np.random.default_rng(seed)
    draws = np.mean([_resampled(values, generator, DRAWS) for values in differences], axis=0)
    interval = of_draws(mean, draws)
    weighted = np.concatenate([values / (values.size * len(differences)) for values in differences])
    return Difference(mean, interval.low, interval.high, _sign_flip_p(weighted, generator))


def exact_sign_flip_p_value(terms: Sequence[float] | Floats) -> float:
    """Returns the share of all 2^n ways to flip signs that bring the sum of n terms at least as far from 0 as it is.

    It is the two-sided p-value of Fisher's randomization test of paired differences. It takes memory for 2^n n numbers.
    """
    values = np.asarray(terms, dtype=np.float64)
    limit = abs(values.sum()) - _rounding(values)
    bits = np.arange(2**values.size)[:, None] >> np.arange(values.size) & 1
    return float(np.mean(np.abs((1.0 - 2.0 * bits) @ values) >= limit))


def _rounding(terms: Floats) -> float:
    """Returns the bound below which sums of the same terms in another order differ."""
    return float(1e-12 * np.abs(terms).sum())


def _sign_flip_p(terms: Floats, generator: np.random.Generator) -> float:
    """Returns the two-sided p-value of the sum of `terms` under random signs."""
    terms = terms[terms != 0]
    if not terms.size:
        return 1.0
    if terms.size <= _EXACT_FLIPS:
        return exact_sign_flip_p_value(terms)
    limit = abs(terms.sum()) - _rounding(terms)
    reached = 0
    for start in range(0, DRAWS, _CHUNK):
        signs = generator.choice((-1.0, 1.0), size=(min(_CHUNK, DRAWS - start), terms.size))
        reached += int(np.sum(np.abs(signs @ terms) >= limit))
    return (1 + reached) / (1 + DRAWS)


def majority(votes: Sequence[float], clusters: Sequence[int], correct: int) -> float:
    """Returns the chance that the answer with most votes is correct, where ties are broken by lot.

    Args:
        votes: [samples] the weight of each sample's vote.
        clusters: [samples] which answer it votes for; -1 for none.
        correct: the cluster of the correct answer.
    """
    totals: dict[int, float] = {}
    for vote, cluster in zip(votes, clusters, strict=True):
        if cluster >= 0:
            totals[cluster] = totals.get(cluster, 0.0) + vote
    if not totals:
        return 0.0
    most = max(totals.values())
    winners = [cluster for cluster, total in totals.items() if total >= most - 1e-9]
    return (correct in winners) / len(winners)


def majority_at(clusters: Sequence[int], correct: int, k: int, seed: int) -> float:
    """Returns maj@k of a problem: the mean of `majority` over subsets of k samples (arXiv 2203.11171).

    It is over all subsets where there are few, else over random ones.
    """
    n = len(clusters)
    if comb(n, k) <= _SUBSETS:
        chosen = list(combinations(range(n), k))
    else:
        generator = np.random.default_rng(seed)
        chosen = [tuple(generator.permutation(n)[:k].tolist()) for _ in range(_SUBSETS)]
    ones = [1.0] * k
    return float(np.mean([majority(ones, [clusters[i] for i in subset], correct) for subset in chosen]))


def borda_votes(certainties: Sequence[float], power: float = 0.5) -> list[float]:
    """Returns [samples] the weights (n - rank + 1)^power of votes by self-certainty, the most certain one at rank 1.

    Kang, Zhao and Song 2025, arXiv 2502.18581, eq. 11. Equal certainties are ranked in the order of the samples.
    """
    order = sorted(range(len(certainties)), key=lambda sample: -certainties[sample])
    votes = [0.0] * len(order)
    for place, sample in enumerate(order):
        votes[sample] = float(len(order) - place) ** power
    return votes
