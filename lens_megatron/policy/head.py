"""Computes log-probabilities and losses from hidden states by `lens_kernels`, without a [T, V] tensor of logits.

Megatron's own output layer is never called. Its weight, which is this rank's rows of the vocabulary, goes to the
operators as it is; they sum the gradient of the hidden states over the tensor-parallel group themselves, and gather and
scatter them under sequence parallelism.
"""

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypedDict

import torch
from lens_kernels import PolicyLoss, VocabShard, linear_policy_loss, linear_token_logprobs
from torch import Tensor

from lens_megatron.algorithms.policy_objective import Objective, PolicySlopes
from lens_megatron.config import AlgorithmConfig
from lens_megatron.policy.model import Policy
from lens_megatron.types import MicroBatch, SequenceBatch, TokenTerms


@dataclass(frozen=True, slots=True)
class MicroBatchLoss:
    """This rank's share of a micro-batch's loss, and its parts at the t tokens that this rank asks about."""

    loss: Tensor
    """A float32 scalar, the only one that carries a gradient."""
    log_probs: Tensor
    """Log-probabilities, [t] float32, as are the following fields."""
    entropy: Tensor
    ratio: Tensor
    clipped: Tensor
    """1.0 where a clip holds, else 0."""
    kl: Tensor
    slopes: PolicySlopes


class _HeadArguments(TypedDict):
    """Arguments that both operators of lens_kernels take by name."""

    rows: Tensor
    temperature: float
    shard: VocabShard
    sequence_parallel: bool


class _GradientArguments(TypedDict):
    """Arguments of `linear_policy_loss` that say where the weight's gradient goes."""

    accumulate_into: Tensor | None
    loss_gradient: float | None


def token_log_probs(policy: Policy, hidden: Tensor, sequences: SequenceBatch, temperature: float) -> Tensor:
    """Computes the log-probabilities [t] float32 of `sequences.target_ids` from the last stage's hidden states."""
    arguments = _head_arguments(policy, sequences, temperature)
    return linear_token_logprobs(hidden, _head_weight(policy), sequences.target_ids, **arguments)


def micro_batch_loss(
    policy: Policy,
    hidden: Tensor,  # [S, 1, D], or [S/tp, 1, D] under sequence parallelism
    batch: MicroBatch,
    objective: Objective,
    algorithm: AlgorithmConfig,
    temperature: float,
) -> MicroBatchLoss:
    """Computes the micro-batch's loss under autograd: the head's weight and the hidden states get their gradients.

    One pass over the head forms the gradients too, and adds its weight's to Megatron's buffer. Only an objective over
    whole sequences that context parallelism has cut takes two passes, and the weight's gradient goes the ordinary way.
    """
    weight, ids, terms = _head_weight(policy), batch.sequences.target_ids, batch.own_terms
    arguments = _head_arguments(policy, batch.sequences, temperature)
    if objective.whole_sequences and batch.sequences.own is not None:
        log_probs, entropy = linear_token_logprobs(hidden, weight, ids, **arguments, return_entropy=True)
        return _cut_sequences_loss(policy, log_probs, entropy, batch.sequences.own, batch, objective, algorithm)

    into = _GradientArguments(accumulate_into=gradient_buffer(policy), loss_gradient=_loss_gradient(policy))
    fused = objective.fused(terms, algorithm) if objective.fused else None
    if fused is not None:
        found = linear_policy_loss(hidden, weight, ids, **arguments, **into, **fused)
        return _with_all_parts(found, objective.slopes(found.logprobs, terms, algorithm))

    def losses(log_probs: Tensor, entropy: Tensor, part: slice) -> Tensor:
        return objective.losses(log_probs, entropy, _terms_of_chunk(terms, part), algorithm).losses

    result = linear_policy_loss(
        hidden,
        weight,
        ids,
        **arguments,
        **into,
        objective=losses,
        boundaries=list(accumulate(batch.sequences.lengths)) if objective.whole_sequences else None,
    )
    with torch.no_grad():
        tokens = objective.losses(result.logprobs, result.entropy, terms, algorithm)
    slopes = objective.slopes(result.logprobs, terms, algorithm)
    return MicroBatchLoss(result.loss, result.logprobs, result.entropy, tokens.ratio, tokens.clipped, tokens.kl, slopes)


def _terms_of_chunk(terms: TokenTerms, part: slice) -> TokenTerms:
    """Returns the terms of some tokens, in which `first` counts from the first of them."""
    own = terms.at(part)
    return replace(own, first=own.first - part.start)


def _with_all_parts(result: PolicyLoss, slopes: PolicySlopes) -> MicroBatchLoss:
    if result.ratio is None or result.clipped is None or result.kl is None:
        raise RuntimeError(
            "lens_kernels' own loss came without ratio, clipped or kl, which only an objective leaves out"
        )
    return MicroBatchLoss(result.loss, result.logprobs, result.entropy, result.ratio, result.clipped, result.kl, slopes)


def _cut_sequences_loss(
    policy: Policy,
    log_probs: Tensor,  # [t]
    entropy: Tensor,  # [t]
    own: Tensor,  # [t] int64, which of the T tokens these are
    batch: MicroBatch,
    objective: Objective,
    algorithm: AlgorithmConfig,
) -> MicroBatchLoss:
    """Computes an objective whose tokens depend on each other and lie on several context-parallel ranks.

    Every rank computes the loss of all T tokens, of which its own t carry a gradient: the ranks' gradients add up to
    the whole. The loss's value counts only the rank's own tokens.
    """
    whole = torch.zeros(2, len(batch.terms.first), device=log_probs.device)
    whole[:, own] = torch.stack([log_probs.detach(), entropy.detach()])
    torch.distributed.all_reduce(whole, group=policy.mesh.cp_group)
    all_log_probs, all_entropy = whole[0].index_copy(0, own, log_probs), whole[1].index_copy(0, own, entropy)
    tokens = objective.losses(all_log_probs, all_entropy, batch.terms, algorithm)
    others = tokens.losses.detach().sum() - tokens.losses.detach()[own].sum()
    ratio, clipped, kl = (part.detach()[own] for part in (tokens.ratio, tokens.clipped, tokens.kl))
    slopes = PolicySlopes(*(part[own] for part in objective.slopes(all_log_probs, batch.terms, algorithm)))
    loss = tokens.losses.sum() - others
    return MicroBatchLoss(loss, log_probs.detach(), entropy.detach(), ratio, clipped, kl, slopes)


def gradient_buffer(policy: Policy) -> Tensor | None:
    """Returns Megatron's `main_grad` of the head, [V/tp, D] float32, if the operator may add to it, else None.

    The operator marks the weight as Megatron's own layers do, so that DDP's hook adds nothing to the buffer but the
    embedding's share where the two are tied. A buffer of another precision cannot take float32 sums.
    """
    buffer = getattr(_head_weight(policy), "main_grad", None)
    return None if buffer is None or buffer.dtype != torch.float32 else buffer


def _loss_gradient(policy: Policy) -> float | None:
    """Returns the gradient that the pipeline will bring for a micro-batch's loss, or None if that is not known.

    It is 1, because Megatron divides no loss by its number of tokens or micro-batches with `calculate_per_token_loss`,
    and scales none unless `optimizer.loss_scale` is set.
    """
    scaled = policy.optimizer.config.loss_scale
    return None if gradient_buffer(policy) is None or scaled else 1.0


def _head_weight(policy: Policy) -> Tensor:
    return policy.models()[-1].head_weight()


def _head_arguments(policy: Policy, sequences: SequenceBatch, temperature: float) -> _HeadArguments:
    return _HeadArguments(
        rows=sequences.positions,
        temperature=temperature,
        shard=VocabShard.even(len(_head_weight(policy)), policy.mesh.tp_group, policy.vocab_size),
        sequence_parallel=policy.bridge.config.sequence_parallel,
    )
