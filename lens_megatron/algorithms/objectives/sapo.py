"""SAPO: a smooth gate on the ratio in the place of PPO's clip (arXiv 2511.20347)."""

import torch
from lens_kernels.kl import LOG_RATIO_LIMIT
from pydantic import Field
from torch import Tensor

from lens_megatron.algorithms.entry import Entry
from lens_megatron.algorithms.objectives import SurrogateResult
from lens_megatron.config import AlgorithmConfig, Section
from lens_megatron.types import TokenTerms


class SapoOptions(Section):
    """The temperatures of the gate: the higher, the faster the gradient fades as the ratio leaves 1."""

    tau_positive: float = Field(1.0, gt=0, le=1000)
    """The temperature for positive advantages."""
    tau_negative: float = Field(1.05, gt=0, le=1000)
    """The temperature for all others."""


def sapo(
    log_ratio: Tensor, log_probs: Tensor, terms: TokenTerms, algorithm: AlgorithmConfig, options: SapoOptions
) -> SurrogateResult:
    """Returns -(4 / tau) sigmoid(tau (rho - 1)) A.

    The gate's slope by rho is 1 at rho = 1, as in PPO, and fades on both sides, so that no token is ever clipped. Its
    value at rho = 1 is 2 / tau, which moves the loss but not its gradient. `clip_low`, `clip_high` and `dual_clip` have
    no effect. The paper means with `algorithm.aggregation=seq-mean-token-mean`.
    """
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    advantages = terms.advantages
    tau = torch.full_like(advantages, options.tau_negative).masked_fill(advantages > 0, options.tau_positive)
    losses = -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages
    return SurrogateResult(losses, torch.zeros_like(losses))


ENTRY = Entry(sapo, paper="Gao et al. 2025, arXiv 2511.20347", options=SapoOptions)
