"""Statistics of a micro-batch's tokens -> their losses. Registry `OBJECTIVES`, keyed by `algorithm.ratio`.

An objective sees one log-probability and one entropy per token; the LM head and everything else of vocabulary size is
`lens_kernels`', which differentiates whatever stands here. A new algorithm is a function of [T] tensors and an entry.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import TokenTerms

LOG_RATIO_LIMIT = 20.0
K3_LIMIT = 10.0


class LossTerms(NamedTuple):
    """All [T] float32."""

    losses: Tensor
    """Their sum is the micro-batch's loss. Under autograd."""
    ratio: Tensor
    clipped: Tensor
    """1.0 where a clip holds."""
    kl: Tensor


LossFunction = Callable[[Tensor, Tensor, TokenTerms, AlgorithmConfig], LossTerms]
"""(log-probabilities [T], entropies [T], terms, algorithm) -> losses."""


@dataclass(frozen=True, slots=True)
class Objective:
    """How the head computes it: `fused` if that gives arguments, else `losses`, chunk by chunk or all at once."""

    losses: LossFunction
    whole_sequences: bool = False
    """True: a token's loss depends on other tokens of its response, so the T tokens cannot be cut into chunks."""
    fused: Callable[[TokenTerms, AlgorithmConfig], dict[str, Any] | None] | None = None
    """Arguments with which the built-in loss of `lens_kernels.linear_policy_loss` is the same; None: it is not."""


def token_ratio(log_probs: Tensor, entropy: Tensor, terms: TokenTerms, algorithm: AlgorithmConfig) -> LossTerms:
    """CRPO / GRPO with a ratio per token (LENS, eq. 7)."""
    return clipped_loss(_log_ratio(log_probs, terms), log_probs, entropy, terms, algorithm)


def crpo_arguments(terms: TokenTerms, algorithm: AlgorithmConfig) -> dict[str, Any] | None:
    """`token_ratio` as lens_kernels' fused loss, which has no imitation term."""
    if algorithm.imitation_coef:
        return None
    return {
        "old_logprobs": terms.old_log_probs,
        "advantages": terms.advantages,
        "reference_logprobs": terms.reference_log_probs if algorithm.kl_coef else None,
        "policy_weights": terms.policy_weights,
        "kl_weights": terms.kl_weights if algorithm.kl_coef else None,
        "entropy_weights": terms.entropy_weights if algorithm.entropy_coef else None,
        "clip_low": algorithm.clip_low,
        "clip_high": algorithm.clip_high,
        "dual_clip": algorithm.dual_clip,
    }


def sequence_ratio(log_probs: Tensor, entropy: Tensor, terms: TokenTerms, algorithm: AlgorithmConfig) -> LossTerms:
    """One ratio per response: the product over its tokens, or their geometric mean (GSPO's form).

    It becomes the token form by giving every token of a response the same log-ratio, with the gradient of the response.
    """
    log_ratio = _sum_per_response(_log_ratio(log_probs, terms), terms)
    if algorithm.ratio == "sequence_geometric":
        log_ratio = log_ratio / _sum_per_response(torch.ones_like(log_ratio), terms)
    return clipped_loss(log_ratio, log_probs, entropy, terms, algorithm)


def clipped_loss(
    log_ratio: Tensor, log_probs: Tensor, entropy: Tensor, terms: TokenTerms, algorithm: AlgorithmConfig
) -> LossTerms:
    """policy_weight * clipped surrogate + kl_weight * k3 - entropy_weight * H - imitation_weight * log p, per token."""
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    surrogate, clipped = clipped_surrogate(ratio, terms.advantages, algorithm)
    kl = torch.zeros_like(log_probs)
    if algorithm.kl_coef:
        shift = (terms.reference_log_probs - log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        kl = (torch.expm1(shift) - shift).clamp(max=K3_LIMIT)
    losses = (
        terms.policy_weights * surrogate
        + terms.kl_weights * kl
        - terms.entropy_weights * entropy
        - terms.imitation_weights * log_probs
    )
    return LossTerms(losses, ratio, clipped, kl)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss per token, with dual clip for negative advantages, and 1.0 where the clip holds."""
    plain = -ratio * advantages
    bounded = -ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high) * advantages
    loss, clipped = torch.maximum(plain, bounded), bounded > plain
    if algorithm.dual_clip is not None:
        ceiling = -algorithm.dual_clip * advantages
        beyond = (advantages < 0) & (loss > ceiling)
        loss, clipped = torch.where(beyond, ceiling, loss), clipped | beyond
    return loss, clipped.float()


def _log_ratio(log_probs: Tensor, terms: TokenTerms) -> Tensor:
    """log pi - log pi_old per token; exactly 0, with the gradient of log pi, where the token is on-policy."""
    return log_probs - torch.where(terms.old_log_probs.isnan(), log_probs.detach(), terms.old_log_probs)


def _sum_per_response(values: Tensor, terms: TokenTerms) -> Tensor:
    """[T] -> [T], at every token the sum over the tokens of its response."""
    return torch.zeros_like(values).index_add(0, terms.first, values)[terms.first]


OBJECTIVES: dict[str, Objective] = {
    "token": Objective(token_ratio, fused=crpo_arguments),
    "sequence": Objective(sequence_ratio, whole_sequences=True),
    "sequence_geometric": Objective(sequence_ratio, whole_sequences=True),
}
