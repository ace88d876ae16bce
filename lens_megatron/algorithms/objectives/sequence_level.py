"""GSPO's objective and its product form: every response has one ratio (arXiv 2507.18071)."""

import torch
from torch import Tensor

from lens_megatron.algorithms.objectives.clipped import clipped_loss, log_ratio_to_old
from lens_megatron.algorithms.objectives.objective import ObjectiveResult
from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import TokenTerms


def sequence_ratio(
    log_probs: Tensor, entropy: Tensor, terms: TokenTerms, algorithm: AlgorithmConfig
) -> ObjectiveResult:
    """Returns the clipped loss with one ratio per response; `log_probs` and `entropy` are [T] float32.

    The ratio is the product over the response's tokens, or with `sequence_geometric` their geometric mean. Every token
    of a response gets the same log-ratio, whose gradient is that of the response.
    """
    log_ratio = _sum_per_response(log_ratio_to_old(log_probs, terms), terms)
    if algorithm.ratio == "sequence_geometric":
        log_ratio = log_ratio / _sum_per_response(torch.ones_like(log_ratio), terms)
    return clipped_loss(log_ratio, log_probs, entropy, terms, algorithm)


def _sum_per_response(values: Tensor, terms: TokenTerms) -> Tensor:
    """Sums per response, [T] -> [T]: every token gets the sum over the tokens of its response."""
    return torch.zeros_like(values).index_add(0, terms.first, values)[terms.first]
