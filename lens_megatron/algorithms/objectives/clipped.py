"""Computes PPO's clipped loss with KL, entropy and imitation terms for all objectives, which differ in their ratio."""

import torch
from lens_kernels import k3
from lens_kernels.kl import LOG_RATIO_LIMIT
from torch import Tensor

from lens_megatron.algorithms.objectives.objective import ObjectiveResult
from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import TokenTerms


def clipped_loss(
    log_ratio: Tensor,  # [T]
    log_probs: Tensor,  # [T]
    entropy: Tensor,  # [T]
    terms: TokenTerms,
    algorithm: AlgorithmConfig,
) -> ObjectiveResult:
    """Returns policy_weight * surrogate + kl_weight * k3 - entropy_weight * H - imitation_weight * log p, per token."""
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    surrogate, clipped = clipped_surrogate(ratio, terms.advantages, algorithm)
    kl = torch.zeros_like(log_probs)
    if algorithm.kl_coef:
        kl = k3(terms.reference_log_probs - log_probs, algorithm.kl_limit)
    losses = (
        terms.policy_weights * surrogate
        + terms.kl_weights * kl
        - terms.entropy_weights * entropy
        - terms.imitation_weights * log_probs
    )
    return ObjectiveResult(losses, ratio, clipped, kl)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Returns PPO's clipped loss, with dual clip for negative advantages, and 1.0 where a clip holds; all are [T]."""
    plain = -ratio * advantages
    bounded = -ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high) * advantages
    loss, clipped = torch.maximum(plain, bounded), bounded > plain
    if algorithm.dual_clip is not None:
        ceiling = -algorithm.dual_clip * advantages
        beyond = (advantages < 0) & (loss > ceiling)
        loss, clipped = torch.where(beyond, ceiling, loss), clipped | beyond
    return loss, clipped.float()


def log_ratio_to_old(log_probs: Tensor, terms: TokenTerms) -> Tensor:
    """Returns log pi - log pi_old [T]; it is exactly 0, with the gradient of log pi, where the token is on-policy."""
    return log_probs - torch.where(terms.old_log_probs.isnan(), log_probs.detach(), terms.old_log_probs)
