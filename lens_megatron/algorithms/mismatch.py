"""Measures how far the engine's probabilities of sampled tokens are from the trainer's: additive sums and statistics.

p = exp(trainer's log-probability), q = exp(engine's), of one token under the prompt that generated it. Every statistic
comes from sums over tokens, so no layout and no cut into micro-batches changes it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import torch
from lens_kernels import k3
from torch import Tensor

from lens_megatron.results import MismatchSums


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Statistics over tokens, by verl's definitions (`calculate_debug_metrics`, `rollout_corr`)."""

    mean: float
    """The mean of |p - q|."""
    std: float
    """The standard deviation of |p - q|, with n - 1 in the denominator; 0 for a single token."""
    largest: float
    """The maximum of |p - q|."""
    pearson: float | None
    """The correlation of p and q; None where one of them is constant."""
    kl: float
    """KL(engine || trainer) in nats, estimated by the mean of log q - log p; it may be negative."""
    k3: float
    """The same divergence estimated by the mean of p/q - 1 - log(p/q), which is never negative."""
    weight: float
    """The mean of the weights that the correction gave."""
    limited: float
    """The share of tokens whose weight was truncated or which were dropped."""


def mismatch_sums(trainer: Tensor, engine: Tensor, weights: Tensor, limited: Tensor) -> Tensor:
    """Sums over n tokens what `MismatchSums` holds.

    Args:
        trainer, engine: [n] float32, log-probabilities in nats. weights: [n] float32. limited: [n] bool.

    Returns:
        [len(MismatchSums)] float64 in the order of its fields; zeros for n = 0.
    """
    trainer, engine = trainer.double(), engine.double()
    p, q = trainer.exp(), engine.exp()
    difference, log_ratio = (p - q).abs(), trainer - engine
    columns = (q, p, q * q, p * p, p * q, difference, difference**2, -log_ratio, k3(log_ratio), weights, limited)
    sums = [column.double().sum() for column in columns]
    largest = difference.max() if len(difference) else difference.sum()
    return torch.stack([torch.ones_like(p).sum(), *sums, largest])


def sums_record(sums: Sequence[float], largest: float) -> MismatchSums:
    """Makes the record of its fields' values in order, of which the last is a maximum and no sum."""
    return MismatchSums(*[*sums, largest])


def pooled(parts: Iterable[MismatchSums]) -> MismatchSums:
    """Adds the sums of several sets of tokens up."""
    rows = [astuple(part) for part in parts]
    *columns, largest = zip(astuple(MismatchSums()), *rows, strict=True)
    return sums_record([sum(column) for column in columns], max(largest))


def mismatch(sums: MismatchSums) -> Mismatch:
    """Computes the statistics of one token or more. Raises ZeroDivisionError where there is none."""
    n = sums.tokens
    mean = sums.difference / n
    variance = max(0.0, sums.difference_squared - n * mean * mean) / max(1.0, n - 1)
    return Mismatch(
        mean=mean,
        std=math.sqrt(variance),
        largest=sums.largest,
        pearson=_pearson(sums),
        kl=sums.log_ratio / n,
        k3=sums.k3 / n,
        weight=sums.weights / n,
        limited=sums.limited / n,
    )


def _pearson(sums: MismatchSums) -> float | None:
    n = sums.tokens
    variances = [
        squared - total * total / n
        for total, squared in ((sums.engine, sums.engine_squared), (sums.trainer, sums.trainer_squared))
    ]
    # Rounding leaves the variance of a constant a little above 0.
    if min(variances) <= 1e-12 * max(sums.engine_squared, sums.trainer_squared):
        return None
    return (sums.product - sums.engine * sums.trainer / n) / math.sqrt(variances[0] * variances[1])
