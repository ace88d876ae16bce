"""How far the engine's probabilities of the sampled tokens are from the trainer's: sums that add up, and statistics.

p = exp(trainer's log-probability), q = exp(engine's), of one token under the prompt that generated it. Every statistic
comes from sums over tokens, so no layout and no cut into micro-batches changes it.
"""

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from lens_megatron.types import MismatchSums


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Statistics over tokens, by verl's definitions (`calculate_debug_metrics`, `rollout_corr`)."""

    mean: float
    """Of |p - q|."""
    std: float
    """Of |p - q|, with n - 1; 0 for a single token."""
    largest: float
    pearson: float | None
    """Of p and q; None where one of them is constant."""
    kl: float
    """KL(engine || trainer) in nats, estimated by the mean of log q - log p; may be negative."""
    k3: float
    """The same by k3 = p/q - 1 - log(p/q), never negative."""
    weight: float
    """Mean weight that the correction gave."""
    limited: float
    """Share of tokens whose weight was truncated or which were dropped."""


def mismatch_sums(trainer: Tensor, engine: Tensor, weights: Tensor, limited: Tensor) -> Tensor:
    """Four [n] tensors -> [len(MismatchSums)] float64 in the order of its fields; zeros for n = 0."""
    trainer, engine = trainer.double(), engine.double()
    p, q = trainer.exp(), engine.exp()
    difference, log_ratio = (p - q).abs(), trainer - engine
    k3 = torch.expm1(log_ratio.clamp(max=20.0)) - log_ratio
    columns = (q, p, q * q, p * p, p * q, difference, difference * difference, -log_ratio, k3, weights, limited)
    sums = [column.double().sum() for column in columns]
    largest = difference.max() if len(difference) else difference.sum()
    return torch.stack([torch.ones_like(p).sum(), *sums, largest])


def pooled(parts: Iterable[MismatchSums]) -> MismatchSums:
    rows = [astuple(part) for part in parts]
    *columns, largest = zip(astuple(MismatchSums()), *rows, strict=True)
    return MismatchSums(*map(sum, columns), max(largest))


def mismatch(sums: MismatchSums) -> Mismatch:
    """Of one token or more."""
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
    # Of a constant, rounding leaves a variance that is not quite 0.
    if min(variances) <= 1e-12 * max(sums.engine_squared, sums.trainer_squared):
        return None
    return (sums.product - sums.engine * sums.trainer / n) / math.sqrt(variances[0] * variances[1])
