"""Narrows distributions to their most probable tokens (top-k, then top-p), and says how certain a distribution is.

Training never narrows: the trainer's probabilities are of the whole distribution. Protocols of evaluation do.
"""

import math

import torch
from torch import Tensor


def narrowed(log_probs: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Returns log-probabilities of the distributions that are left, -inf for tokens that are not.

    Top-k comes first, and top-p keeps the fewest tokens that have at least that share of what top-k has left, as vLLM
    and transformers do; the most probable token always stays. Equal probabilities are kept in the order of their ids.

    Args:
        log_probs: [B, V] normalised, in nats.
        top_p: [B] in (0, 1]; 1 keeps every token.
        top_k: [B] int64; 0 keeps every token.
    """
    ordered, ids = log_probs.double().sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(log_probs.shape[1], device=log_probs.device)
    ordered = ordered.masked_fill((top_k[:, None] > 0) & (ranks >= top_k[:, None]), -math.inf).log_softmax(-1)
    shares = ordered.exp()
    before = shares.cumsum(-1) - shares  # the probability of all tokens that are more probable
    late = (top_p[:, None] < 1) & (before >= top_p[:, None]) & (ranks > 0)
    ordered = ordered.masked_fill(late, -math.inf).log_softmax(-1)
    return torch.empty_like(ordered).scatter_(1, ids, ordered).to(log_probs.dtype)


def certainty(log_probs: Tensor) -> Tensor:
    """Returns [B] the self-certainty of whole distributions, -mean over tokens of log(V p), in nats: 0 if uniform.

    Kang, Zhao and Song 2025 (arXiv 2502.18581), eq. 6; a completion's is the mean over its tokens.

    Args:
        log_probs: [B, V] normalised, at temperature 1.
    """
    return -log_probs.mean(-1) - math.log(log_probs.shape[1])
