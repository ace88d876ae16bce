"""The LM head by `lens_kernels`, on hidden states: log-probabilities and losses without a [T, V] tensor of logits.

Megatron's own output layer is never called. Its weight, this rank's rows of the vocabulary, goes to the operators as it
is; they sum the gradient of the hidden states over the tensor-parallel group themselves, and gather and scatter them
under sequence parallelism.
"""

from typing import Any

import torch
from lens_kernels import PolicyLoss, linear_policy_loss, linear_token_logprobs
from torch import Tensor

from lens_megatron.algorithms.objectives import Objective
from lens_megatron.config import AlgorithmConfig
from lens_megatron.policy.model import Policy
from lens_megatron.types import MicroBatch, SequenceBatch


def token_log_probs(policy: Policy, hidden: Tensor, sequences: SequenceBatch, temperature: float) -> Tensor:
    """[T] float32 log-probabilities of `sequences.target_ids`, from the last stage's hidden states."""
    return linear_token_logprobs(*_operands(policy, hidden, sequences), **_options(policy, sequences, temperature))


def micro_batch_loss(
    policy: Policy,
    hidden: Tensor,  # [S, 1, D], or [S/tp, 1, D] under sequence parallelism
    batch: MicroBatch,
    objective: Objective,
    algorithm: AlgorithmConfig,
    temperature: float,
) -> PolicyLoss:
    """This rank's share of the micro-batch's loss under autograd, and its [t] parts. Weights and hidden states get
    their gradients.

    Token-level objectives take one pass over the head, which adds its weight's gradient to Megatron's buffer; an
    objective over whole sequences takes two, and the weight's gradient goes the ordinary way.
    """
    operands, terms = _operands(policy, hidden, batch.sequences), batch.own_terms
    options = _options(policy, batch.sequences, temperature)
    if objective.whole_sequences:
        log_probs, entropy = linear_token_logprobs(*operands, **options, return_entropy=True)
        return _whole_sequences_loss(policy, log_probs, entropy, batch, objective, algorithm)

    options["accumulate_into"] = gradient_buffer(policy)
    fused = objective.fused(terms, algorithm) if objective.fused else None
    if fused is not None:
        return linear_policy_loss(*operands, **options, **fused)

    def losses(log_probs: Tensor, entropy: Tensor, part: slice) -> Tensor:
        return objective.losses(log_probs, entropy, terms.at(part), algorithm).losses

    result = linear_policy_loss(*operands, **options, objective=losses)
    with torch.no_grad():
        tokens = objective.losses(result.logprobs, result.entropy, terms, algorithm)
    return result._replace(ratio=tokens.ratio, clipped=tokens.clipped, kl=tokens.kl)


def _whole_sequences_loss(
    policy: Policy,
    log_probs: Tensor,  # [t]
    entropy: Tensor,  # [t]
    batch: MicroBatch,
    objective: Objective,
    algorithm: AlgorithmConfig,
) -> PolicyLoss:
    """Under context parallelism every rank computes the loss of all T tokens, of which its own t carry a gradient:
    the ranks' gradients add up to the whole. Its value counts the own tokens alone."""
    own = batch.sequences.own
    if own is None:
        own = slice(None)
    else:
        whole = torch.zeros(2, len(batch.terms.first), device=log_probs.device)
        whole[:, own] = torch.stack([log_probs.detach(), entropy.detach()])
        torch.distributed.all_reduce(whole, group=policy.mesh.cp_group)
        log_probs, entropy = whole[0].index_copy(0, own, log_probs), whole[1].index_copy(0, own, entropy)
    tokens = objective.losses(log_probs, entropy, batch.terms, algorithm)
    others = tokens.losses.detach().sum() - tokens.losses.detach()[own].sum()
    parts = (log_probs, tokens.ratio, tokens.clipped, tokens.kl, entropy)
    return PolicyLoss(tokens.losses.sum() - others, *(part.detach()[own] for part in parts))


def gradient_buffer(policy: Policy) -> Tensor | None:
    """[V/tp, D] float32, Megatron's `main_grad` of the head, for the operator to add to; None: not allowed here.

    After the backward, DDP's hook adds `weight.grad` to the same buffer: nothing, or the embedding's share if they are
    tied. With overlap_grad_reduce the hook insists on a `weight.grad`; a buffer of another precision cannot take
    float32 sums.
    """
    weight = policy.models()[-1].head_weight()
    buffer = getattr(weight, "main_grad", None)
    if buffer is None or buffer.dtype != torch.float32 or policy.chunks[-1].ddp_config.overlap_grad_reduce:
        return None
    return buffer


def _operands(policy: Policy, hidden: Tensor, sequences: SequenceBatch) -> tuple[Tensor, Tensor, Tensor]:
    return hidden, policy.models()[-1].head_weight(), sequences.target_ids


def _options(policy: Policy, sequences: SequenceBatch, temperature: float) -> dict[str, Any]:
    return {
        "rows": sequences.positions,
        "temperature": temperature,
        "valid_vocab_size": policy.vocab_size,
        "tp_group": policy.mesh.tp_group,
        "sequence_parallel": policy.bridge.config.sequence_parallel,
    }
