"""CRPO's and GRPO's objective: every token has a ratio of its own (LENS, eq. 7)."""

from torch import Tensor

from lens_megatron.algorithms.objectives.clipped import clipped_loss, log_ratio_to_old
from lens_megatron.algorithms.objectives.objective import FusedLossArguments, ObjectiveResult
from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import TokenTerms


def token_ratio(log_probs: Tensor, entropy: Tensor, terms: TokenTerms, algorithm: AlgorithmConfig) -> ObjectiveResult:
    """Returns the clipped loss with a ratio per token; `log_probs` and `entropy` are [T] float32."""
    return clipped_loss(log_ratio_to_old(log_probs, terms), log_probs, entropy, terms, algorithm)


def fused_arguments(terms: TokenTerms, algorithm: AlgorithmConfig) -> FusedLossArguments | None:
    """Returns `token_ratio` as arguments of lens_kernels' loss; None with an imitation term, which that loss lacks."""
    if algorithm.imitation_coef:
        return None
    return FusedLossArguments(
        old_logprobs=terms.old_log_probs,
        advantages=terms.advantages,
        reference_logprobs=terms.reference_log_probs if algorithm.kl_coef else None,
        policy_weights=terms.policy_weights,
        kl_weights=terms.kl_weights if algorithm.kl_coef else None,
        entropy_weights=terms.entropy_weights if algorithm.entropy_coef else None,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        kl_limit=algorithm.kl_limit,
    )
