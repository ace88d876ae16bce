"""CISPO: the policy gradient, weighted by a ratio that is clipped and has no gradient (arXiv 2506.13585)."""

from lens_kernels.kl import LOG_RATIO_LIMIT
from pydantic import Field
from torch import Tensor

from lens_megatron.algorithms.entry import Entry
from lens_megatron.algorithms.objectives import SurrogateResult
from lens_megatron.config import AlgorithmConfig, Section
from lens_megatron.types import TokenTerms


class CispoOptions(Section):
    """Bounds of the ratio itself. verl counts from 1 (`1 - clip_ratio_low`, `1 + clip_ratio_high`), TRL as here."""

    lowest_ratio: float = Field(0.0, ge=0, le=1)
    """Smaller ratios count as this one. With 0 there is no lower bound, as in the paper's experiments."""
    highest_ratio: float = Field(5.0, ge=1)
    """Larger ratios count as this one."""


def cispo(
    log_ratio: Tensor, log_probs: Tensor, terms: TokenTerms, algorithm: AlgorithmConfig, options: CispoOptions
) -> SurrogateResult:
    """Returns -sg(min(max(rho, lowest_ratio), highest_ratio)) A log p, in which sg takes the gradient away.

    So every token keeps a gradient, and those counted as clipped have that of the bound. `clip_low`, `clip_high` and
    `dual_clip` have no effect. The paper means with `algorithm.aggregation=token-mean`.
    """
    ratio = log_ratio.detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    bounded = ratio.clamp(options.lowest_ratio, options.highest_ratio)
    return SurrogateResult(-bounded * terms.advantages * log_probs, (bounded != ratio).to(log_probs.dtype))


ENTRY = Entry(cispo, paper="MiniMax 2025, arXiv 2506.13585", options=CispoOptions)
