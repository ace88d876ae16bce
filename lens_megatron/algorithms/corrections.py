"""Weighs tokens to correct the engine's and trainer's disagreement on log pi; `algorithm.correction` chooses how.

Rollouts come from pi_engine; the trainer's pi_old is another distribution, although the parameters are the same. Each
function takes w_t = pi_old(y_t) / pi_engine(y_t), both under the prompt that generated the response, and returns what
multiplies the policy loss of its tokens, without a gradient. The clip is that of pi_theta / pi_old, as without a
correction (the decoupled form): pi_theta/pi_old * min(pi_old/pi_engine, C). KL, entropy and imitation terms keep their
weights, and the denominators of the loss count dropped tokens too.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Correction(NamedTuple):
    """The effect of a correction on the L tokens of one response."""

    weights: Tensor
    """[L] floating point. A number that is not finite is kept, so that its update is skipped, not altered."""
    limited: Tensor
    """[L] bool, True where the weight was truncated or the token dropped."""


CorrectionFunction = Callable[[Tensor, float, float], Correction]
"""It takes (log pi_old - log pi_engine [L] in nats, lower bound of w, upper bound of w)."""


def uncorrected(log_ratio: Tensor, low: float, high: float) -> Correction:
    """Gives every token the weight 1."""
    return Correction(torch.ones_like(log_ratio), torch.zeros_like(log_ratio, dtype=torch.bool))


def token_truncate(log_ratio: Tensor, low: float, high: float) -> Correction:
    """Truncated importance sampling: the weight is min(w_t, C) with C = high, without a lower bound.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
    """
    ratio = log_ratio.exp()
    return Correction(ratio.clamp(max=high), ratio > high)


def token_mask(log_ratio: Tensor, low: float, high: float) -> Correction:
    """IcePop: the weight is w_t where low <= w_t <= high, else 0 (Ring-1T, arXiv 2510.18855)."""
    ratio = log_ratio.exp()
    outside = (ratio < low) | (ratio > high)
    return Correction(ratio.masked_fill(outside, 0.0), outside)


def sequence_truncate(log_ratio: Tensor, low: float, high: float) -> Correction:
    """Gives every token of the response the weight min(prod_t w_t, C) with C = high."""
    return token_truncate(log_ratio.sum().expand_as(log_ratio), low, high)


def sequence_mask(log_ratio: Tensor, low: float, high: float) -> Correction:
    """Masked importance sampling: every token gets prod_t w_t, and the response is dropped if that is out of bounds."""
    return token_mask(log_ratio.sum().expand_as(log_ratio), low, high)


def sequence_geometric_mask(log_ratio: Tensor, low: float, high: float) -> Correction:
    """Drops responses whose geometric mean of w_t is out of bounds, and leaves the others as they are (verl's geometric
    rejection). Unlike the product it does not grow with length: bounds near 1, such as 0.99 and 1.01, mean something.
    """
    mean = log_ratio.mean() if len(log_ratio) else log_ratio.sum()
    kept, outside = token_mask(mean.expand_as(log_ratio), low, high)
    return Correction(torch.where(kept > 0, 1.0, kept), outside)


CORRECTIONS: dict[str, CorrectionFunction] = {
    "none": uncorrected,
    "token_truncate": token_truncate,
    "token_mask": token_mask,
    "sequence_truncate": sequence_truncate,
    "sequence_mask": sequence_mask,
    "sequence_geometric_mask": sequence_geometric_mask,
}
