"""Logits of a micro-batch -> its loss. Registry `OBJECTIVES`, keyed by `algorithm.ratio`; an entry is a pure function.

The vocabulary-sized work is `lens_kernels`'; what stands here works on one number per token.
"""

from typing import Protocol

import torch
from lens_kernels import PolicyLoss, policy_loss, token_logprobs
from torch import Tensor
from torch.distributed import ProcessGroup

from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import MicroBatch

LOG_RATIO_LIMIT = 20.0


class Objective(Protocol):
    """Loss = sum over response tokens of policy_weight * clipped surrogate + kl_weight * k3 - entropy_weight * H."""

    def __call__(
        self,
        logits: Tensor,
        batch: MicroBatch,
        algorithm: AlgorithmConfig,
        *,
        temperature: float,
        valid_vocab_size: int,
        tp_group: ProcessGroup | None,
    ) -> PolicyLoss: ...


def token_ratio(logits, batch, algorithm, *, temperature, valid_vocab_size, tp_group) -> PolicyLoss:
    """CRPO / GRPO with a ratio per token (LENS, eq. 7): one fused operator."""
    shared = {"temperature": temperature, "valid_vocab_size": valid_vocab_size, "tp_group": tp_group}
    result = policy_loss(
        logits,
        batch.sequences.target_ids,
        old_logprobs=batch.old_log_probs,
        advantages=batch.advantages,
        reference_logprobs=batch.reference_log_probs if algorithm.kl_coef else None,
        policy_weights=batch.policy_weights,
        kl_weights=batch.kl_weights if algorithm.kl_coef else None,
        entropy_weights=batch.entropy_weights if algorithm.entropy_coef else None,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        **shared,
    )
    if not algorithm.imitation_coef:
        return result
    log_probs = token_logprobs(logits, batch.sequences.target_ids, **shared)
    return result._replace(loss=result.loss - (batch.imitation_weights * log_probs).sum())


def sequence_ratio(logits, batch, algorithm, *, temperature, valid_vocab_size, tp_group) -> PolicyLoss:
    """One ratio per response: the product over its tokens, or their geometric mean (GSPO's form).

    It becomes the token form by giving every token of a response the same log-ratio, with the gradient of the response.
    """
    mask = batch.mask
    log_probs, entropy = token_logprobs(
        logits,
        batch.sequences.target_ids,
        temperature=temperature,
        valid_vocab_size=valid_vocab_size,
        tp_group=tp_group,
        return_entropy=True,
    )
    old = torch.where(batch.old_log_probs.isnan(), log_probs.detach(), batch.old_log_probs)
    summed = torch.where(mask, log_probs - old, 0).sum(1, keepdim=True)
    if algorithm.ratio == "sequence_geometric":
        summed = summed / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = summed.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().expand_as(log_probs)
    surrogate, clipped = clipped_surrogate(ratio, batch.advantages, algorithm)
    shift = torch.where(mask, batch.reference_log_probs - log_probs, 0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    kl = torch.expm1(shift) - shift
    per_token = (
        batch.policy_weights * surrogate
        + batch.kl_weights * kl
        - batch.entropy_weights * entropy
        - batch.imitation_weights * log_probs
    )
    loss = torch.where(mask, per_token, 0).sum()
    return PolicyLoss(loss, log_probs.detach(), ratio.detach(), clipped, kl.detach(), entropy.detach())


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


OBJECTIVES: dict[str, Objective] = {
    "token": token_ratio,
    "sequence": sequence_ratio,
    "sequence_geometric": sequence_ratio,
}
