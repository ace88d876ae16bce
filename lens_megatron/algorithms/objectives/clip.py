"""PPO's clipped objective with dual clip, which LENS, GRPO, DAPO and GSPO share (LENS, eq. 7)."""

import torch
from lens_kernels.kl import LOG_RATIO_LIMIT
from torch import Tensor

from lens_megatron.algorithms.entry import Entry, NoOptions
from lens_megatron.algorithms.objectives import SurrogateResult
from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import TokenTerms


def clip(
    log_ratio: Tensor, log_probs: Tensor, terms: TokenTerms, algorithm: AlgorithmConfig, options: NoOptions
) -> SurrogateResult:
    """Returns -min(rho A, clip(rho) A), and for negative advantages at most `dual_clip` |A|."""
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return clipped_surrogate(ratio, terms.advantages, algorithm)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, algorithm: AlgorithmConfig) -> SurrogateResult:
    """Returns PPO's clipped loss, with dual clip for negative advantages, and 1.0 where a clip holds; all are [T]."""
    plain = -ratio * advantages
    bounded = -ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high) * advantages
    loss, clipped = torch.maximum(plain, bounded), bounded > plain
    if algorithm.dual_clip is not None:
        ceiling = -algorithm.dual_clip * advantages
        beyond = (advantages < 0) & (loss > ceiling)
        loss, clipped = torch.where(beyond, ceiling, loss), clipped | beyond
    return SurrogateResult(loss, clipped.float())


ENTRY = Entry(clip, paper="Schulman et al. 2017, arXiv 1707.06347; dual clip: Ye et al. 2019, arXiv 1912.09729")
