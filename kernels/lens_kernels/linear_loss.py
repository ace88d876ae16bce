"""Computes the policy loss from hidden states: LM head, loss and all gradients in one pass over chunks of rows.

It takes three GEMMs per chunk (logits, hidden gradient, weight gradient): the loss is a sum over rows, so a chunk's
gradient is known as soon as its logits are, and the forward computes it. The backward only scales by the incoming
scalar. A sequence-level objective couples chunks and takes two phases: linear_token_logprobs, then the objective on its
result under autograd and the backward (four GEMMs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lens_kernels._checks import check_device, check_tensor, require
from lens_kernels._dlogits import write_dlogits
from lens_kernels._objectives import Evaluator, Objective, crpo_evaluator, objective_evaluator, refuse_loss_arguments
from lens_kernels._statistics import row_statistics
from lens_kernels.clipped_loss import PolicyLoss, check_loss_terms
from lens_kernels.linear_logprobs import (
    HeadRows,
    backproject,
    check_head,
    full_precision,
    gradient_buffer,
    project,
    zeros_float32,
)
from lens_kernels.shard import VocabShard


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: HeadRows,
        evaluate: Evaluator,
        accumulate_into: Tensor | None,
        needs: list[bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.shape, ctx.dtypes = hidden.shape, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        head = rows.head(hidden, weight, bias)
        needs_hidden, needs_weight, needs_bias = needs
        d_hidden = zeros_float32(head.hidden, needs_hidden)
        d_weight, d_bias = zeros_float32(weight, needs_weight), zeros_float32(bias, needs_bias)
        buffer = head.empty_logits()
        losses: list[Tensor] = [torch.zeros(0, dtype=torch.float32, device=hidden.device)]
        results: list[tuple[Tensor | None, ...]] = []
        with full_precision(hidden.device):
            for part, chunk in head.chunks():
                asked = rows.tokens.at(part)
                logits = project(chunk, head, buffer[: len(chunk)])
                stats = row_statistics(logits, asked, with_entropy=True, split_rows=False)
                totals, tokens = evaluate(stats, asked, part)
                losses.append(tokens.losses)
                entropy = totals.softmax.asked_entropy()
                results.append((totals.logprobs, tokens.ratio, tokens.clipped, tokens.kl, entropy))
                if not any(needs):
                    continue
                d_logits = gradient_buffer(logits, chunk)
                write_dlogits(d_logits, logits, asked, totals.softmax, tokens.d_logprobs, tokens.d_entropy)
                head.scatter(d_hidden, part, backproject(d_logits, chunk, head, d_weight, d_bias, needs_hidden))
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.rows, ctx.accumulate_into = rows, accumulate_into
        per_token = _concatenate(results) or [losses[0].clone() for _ in range(5)]
        ctx.mark_non_differentiable(*(x for x in per_token if x is not None))
        return torch.cat(losses).sum(), *per_token

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        if d_hidden is not None:
            # Scaled into a new tensor: the saved one must survive a second backward.
            d_hidden = ctx.rows.reduce(d_hidden * d_loss, ctx.shape, ctx.dtypes[0])
        if d_weight is not None and ctx.accumulate_into is not None:
            ctx.accumulate_into.addcmul_(d_weight, d_loss)
            d_weight = None
        elif d_weight is not None:
            d_weight = _scale(d_weight, d_loss, ctx.dtypes[1])
        d_bias = None if d_bias is None else _scale(d_bias, d_loss, ctx.dtypes[2])
        return d_hidden, d_weight, d_bias, None, None, None, None


def _scale(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns (x * factor).to(dtype) without a second float32 tensor of the weight's size."""
    return torch.mul(x, factor, out=torch.empty(x.shape, dtype=dtype, device=x.device))


def _concatenate(results: Sequence[tuple[Tensor | None, ...]]) -> list[Tensor | None]:
    """Joins the chunks' tensors into [T] each; a tensor that the chunks do not have stays None."""
    return [_join(column) for column in zip(*results, strict=True)]


def _join(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _check_accumulator(accumulate_into: Tensor | None, weight: Tensor) -> None:
    if accumulate_into is None:
        return
    check_tensor("accumulate_into", accumulate_into)
    got = f"{accumulate_into.dtype} {tuple(accumulate_into.shape)}"
    fits = accumulate_into.dtype == torch.float32 and accumulate_into.shape == weight.shape
    require(fits, "accumulate_into", got, f"float32 {tuple(weight.shape)} like weight")
    check_device("accumulate_into", accumulate_into, weight.device)
    trains = weight.requires_grad or not torch.is_grad_enabled()
    require(trains, "accumulate_into", "a weight with requires_grad=False", "a weight that is trained")


def linear_policy_loss(
    hidden: Tensor,  # [..., H] float32, bfloat16 or float16; the same on all ranks of `shard`
    weight: Tensor,  # [V, H]; this rank's rows of the LM head if `shard` is given
    token_ids: Tensor,  # [...], or [T] if `rows` is given; as are all per-row arguments
    *,
    rows: Tensor | None = None,  # [T] int64: the flattened rows of `hidden` that need a head at all
    objective: Objective | None = None,
    old_logprobs: Tensor | None = None,
    advantages: Tensor | float | None = None,
    reference_logprobs: Tensor | None = None,
    policy_weights: Tensor | float | None = None,
    kl_weights: Tensor | float | None = None,
    entropy_weights: Tensor | float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_limit: float | None = None,
    temperature: Tensor | float = 1.0,
    valid_vocab_size: int | None = None,
    shard: VocabShard | None = None,
    bias: Tensor | None = None,  # [V]
    chunk_rows: int | None = None,
    sequence_parallel: bool = False,
    accumulate_into: Tensor | None = None,  # [V, H] float32
) -> PolicyLoss:
    """Returns policy_loss(hidden.float() @ weight.float().T + bias, ...) with at most a chunk of logits in memory.

    `objective(logprobs, entropy, part)` replaces the CRPO loss: it gets a chunk's float32 [n] statistics under autograd
    and their slice of the flattened T rows, and returns the [n] losses to be summed. It must treat rows independently
    of other chunks, and its result has ratio, clipped and kl None.
    The weight's gradient is summed in float32, and added into `accumulate_into` (Megatron's main_grad; weight.grad is
    then None) when the backward runs. The gradient of `hidden` is summed over the shard's group. Each chunk takes a
    collective.
    Extra memory is chunk_rows * V * 4 bytes, and the float32 gradients of hidden and weight from forward to backward.

    Raises ValueError as linear_token_logprobs and policy_loss do, and for loss arguments next to an objective.
    """
    head_rows = check_head(
        hidden, weight, token_ids, bias, rows, temperature, valid_vocab_size, shard, chunk_rows, sequence_parallel
    )
    _check_accumulator(accumulate_into, weight)
    if objective is None:
        terms = check_loss_terms(
            token_ids.shape,
            hidden.device,
            old_logprobs=old_logprobs,
            advantages=advantages,
            reference_logprobs=reference_logprobs,
            policy_weights=policy_weights,
            kl_weights=kl_weights,
            entropy_weights=entropy_weights,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            kl_limit=kl_limit,
        )
        evaluate = crpo_evaluator(terms)
    else:
        refuse_loss_arguments(
            old_logprobs=old_logprobs,
            advantages=advantages,
            reference_logprobs=reference_logprobs,
            policy_weights=policy_weights,
            kl_weights=kl_weights,
            entropy_weights=entropy_weights,
        )
        evaluate = objective_evaluator(objective)
    operands = hidden, weight, bias
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in operands]
    loss, logprobs, *optional, entropy = _LinearPolicyLoss.apply(*operands, head_rows, evaluate, accumulate_into, needs)
    shape = token_ids.shape
    ratio, clipped, kl = (None if x is None else x.view(shape) for x in optional)
    return PolicyLoss(loss, logprobs.view(shape), ratio, clipped, kl, entropy.view(shape))
