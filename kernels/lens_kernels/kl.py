"""Estimates a KL divergence from the log-probabilities of sampled tokens, and bounds log-ratios for all losses.

With d = log pi_ref - log pi_theta of a token that pi_theta sampled, clamped to +-LOG_RATIO_LIMIT, three estimates of
KL(pi_theta || pi_ref) are in use:
    k1 = -d                 without bias; negative for many tokens
    k2 = d**2 / 2           biased, never negative; the mean of its gradient is the divergence's gradient
    k3 = exp(d) - d - 1     without bias, never negative
A limit bounds an estimate from above: min(k, limit). The gradient is that of these formulas, so it is 0 beyond either
bound; that of k1 is the same for every token, so its mean over tokens of pi_theta is 0.
Source: Schulman's note "Approximating KL divergence".
"""

from __future__ import annotations

import math
from typing import Literal, no_type_check

import torch
from torch import Tensor

from lens_kernels._backend import jit, tl
from lens_kernels._kernel_parts import exp_accurate

KlEstimator = Literal["k1", "k2", "k3"]
LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-20 nats before exp, so that no ratio overflows; beyond that the gradient is 0."""
_SERIES = [1 / math.factorial(n) for n in range(11, 1, -1)]


def k3(log_ratio: Tensor, limit: float | None = None) -> Tensor:
    """Returns min(exp(d) - d - 1, limit) for d = log_ratio clamped to +-LOG_RATIO_LIMIT, elementwise, differentiable.

    The formula as written loses all digits to cancellation near 0, where the result is d**2 / 2, and expm1(d) - d still
    loses half the digits at d = 0.001. Below |d| = 1 Taylor's series to d**11 is used instead, which has a relative
    error of at most 2e-7 in float32 and 4e-9 in float64.

    Args:
        log_ratio: [...] floating point, in nats: the reference's log-probability minus the policy's.
        limit: the largest value that is returned; None sets no limit.

    Returns:
        [...] of the same dtype, in nats. The gradient by `log_ratio` is exp(d) - 1. It is 0 where |log_ratio| is above
        LOG_RATIO_LIMIT and where k3 is above `limit`.
    """
    d = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    series = torch.full_like(d, _SERIES[0])
    for coefficient in _SERIES[1:]:
        series = series * d + coefficient
    value = torch.where(d.abs() < 1, series * d * d, torch.expm1(d) - d)
    return value if limit is None else value.clamp(max=limit)


def kl_and_slope(log_ratio: Tensor, estimator: KlEstimator, limit: float | None) -> tuple[Tensor, Tensor]:
    """Returns an estimate of the KL divergence and its derivative by `log_ratio`, elementwise; see the module."""
    d = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if estimator == "k1":
        value, slope = -d, torch.full_like(d, -1)
    elif estimator == "k2":
        value, slope = d * d / 2, d
    else:
        value, slope = k3(d), torch.expm1(d)
    slope = slope.masked_fill(log_ratio.abs() > LOG_RATIO_LIMIT, 0)
    return (value, slope) if limit is None else (value.clamp(max=limit), slope.masked_fill(value > limit, 0))


@jit
@no_type_check
def kl_and_slope_in_kernel(
    log_ratio,  # [BLOCK]
    ESTIMATOR: tl.constexpr,
    LOG_RATIO_LIMIT: tl.constexpr,
    KL_LIMIT: tl.constexpr,  # or None
):
    """Returns the same as the reference."""
    d = tl.minimum(tl.maximum(log_ratio, -LOG_RATIO_LIMIT), LOG_RATIO_LIMIT)
    if ESTIMATOR == "k1":
        value = -d
        slope = tl.full(d.shape, -1.0, tl.float32)
    elif ESTIMATOR == "k2":
        value = d * d * 0.5
        slope = d
    else:
        series = tl.full(d.shape, 1 / 39916800, tl.float32)
        series = series * d + 1 / 3628800
        series = series * d + 1 / 362880
        series = series * d + 1 / 40320
        series = series * d + 1 / 5040
        series = series * d + 1 / 720
        series = series * d + 1 / 120
        series = series * d + 1 / 24
        series = series * d + 1 / 6
        series = series * d + 0.5
        value = tl.where(tl.abs(d) < 1, series * d * d, exp_accurate(d) - d - 1)
        slope = value + d
    slope = tl.where(tl.abs(log_ratio) > LOG_RATIO_LIMIT, 0.0, slope)
    if KL_LIMIT is not None:
        slope = tl.where(value > KL_LIMIT, 0.0, slope)
        value = tl.minimum(value, KL_LIMIT)
    return value, slope
