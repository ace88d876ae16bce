"""Computes the policy loss from hidden states: LM head, loss and all gradients in one pass over chunks of rows.

It takes three GEMMs per chunk (logits, hidden gradient, weight gradient): the loss is a sum over rows, so a chunk's
gradient is known as soon as its logits are, and the forward computes it. The backward only scales by the incoming
scalar. A sequence-level objective gets chunks that end where its sequences do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lens_kernels._backend import apply_outside_graphs
from lens_kernels._checks import check_device, check_tensor, may_read_values, require
from lens_kernels._head import PathName, check_head
from lens_kernels._head_gradient import WeightTotal
from lens_kernels._linear_ops import evaluate_loss
from lens_kernels._linear_passes import HeadLoss, Needs, loss_pass
from lens_kernels._objectives import Objective, objective_evaluator, refuse_loss_arguments
from lens_kernels._products import PrecisionName
from lens_kernels.clipped_loss import PolicyLoss, check_loss_terms
from lens_kernels.kl import KlEstimator
from lens_kernels.shard import VocabShard


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, H]
        weight: Tensor,
        bias: Tensor | None,
        evaluate: Callable[[Tensor, Tensor, Tensor | None], HeadLoss],
        accumulate_into: Tensor | None,
        loss_gradient: float | None,
    ) -> tuple[Tensor | None, ...]:
        result = evaluate(hidden, weight, bias)
        ctx.save_for_backward(*result.gradients)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.accumulate_into, ctx.loss_gradient = accumulate_into, loss_gradient
        ctx.weight = None if accumulate_into is None else weight  # only for the marks that Megatron sets on it
        ctx.set_materialize_grads(False)
        tensors = result.tensors()
        ctx.mark_non_differentiable(*(x for x in tensors[1:] if x is not None))
        return tensors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_loss is None:
            return None, None, None, None, None, None
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        hidden, weight, bias = ctx.dtypes
        if ctx.loss_gradient is not None:
            d_loss = _expected(d_loss, ctx)
            d_weight = _placeholder(ctx.weight)
        elif d_weight is not None and ctx.accumulate_into is not None:
            ctx.accumulate_into.addcmul_(d_weight, d_loss)
            d_weight = _placeholder(ctx.weight)
        else:
            d_weight = _scale(d_weight, d_loss, weight)
        return _scale(d_hidden, d_loss, hidden), d_weight, _scale(d_bias, d_loss, bias), None, None, None


def _expected(d_loss: Tensor, ctx: Any) -> Tensor:
    """Returns the loss's gradient, a NaN where it is not the announced one, which the weight's already contains."""
    if ctx.accumulate_into is None:
        raise RuntimeError("loss_gradient: the forward added the weight's gradient, so it allows one backward only")
    ctx.accumulate_into = None
    if may_read_values(d_loss.device) and d_loss.item() != ctx.loss_gradient:
        raise RuntimeError(
            f"loss_gradient: got {ctx.loss_gradient}, but the backward brought {d_loss.item()}, and the weight's "
            "gradient is in its buffer already; pass the true one, or None to have the backward add it"
        )
    return torch.where(d_loss == ctx.loss_gradient, d_loss, torch.nan)


def _scale(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """Returns gradient * factor in the operand's dtype, without a second float32 tensor of its size.

    The result is a tensor of its own: the saved one must survive a second backward.
    """
    if gradient is None:
        return None
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    return torch.mul(gradient, factor, out=out)


def _placeholder(weight: Tensor) -> Tensor | None:
    """Returns what stands for the gradient of a weight whose gradient went into Megatron's buffer.

    Megatron's hook adds `weight.grad` to the buffer unless `grad_added_to_main_grad` is set. It still needs a tensor
    there to know when the buffer may be reduced, of any values; zeros where `zero_out_wgrad` says that another layer
    shares the weight, so that autograd adds that layer's gradient to them and the hook uses the sum. Source: Megatron's
    LinearWithGradAccumulationAndAsyncCommunication. A weight without the mark has no such hook, and gets no gradient.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def _check_accumulator(accumulate_into: Tensor | None, weight: Tensor, loss_gradient: float | None) -> None:
    if accumulate_into is None:
        need = "None without accumulate_into: only a gradient that is added in the forward must know it"
        require(loss_gradient is None, "loss_gradient", loss_gradient, need)
        return
    known = loss_gradient is None or (isinstance(loss_gradient, (int, float)) and math.isfinite(loss_gradient))
    require(known, "loss_gradient", loss_gradient, "a finite number, or None")
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
    kl_estimator: KlEstimator = "k3",
    temperature: Tensor | float = 1.0,
    logit_softcap: float | None = None,  # > 0
    valid_vocab_size: int | None = None,
    shard: VocabShard | None = None,
    bias: Tensor | None = None,  # [V]
    chunk_rows: int | None = None,
    sequence_parallel: bool = False,
    accumulate_into: Tensor | None = None,  # [V, H] float32
    loss_gradient: float | None = None,  # what the backward will bring for the loss, if it is known
    boundaries: Sequence[int] | None = None,  # rows at which a chunk may end, rising to T
    precision: PrecisionName = "auto",
    path: PathName = "auto",
) -> PolicyLoss:
    """Returns policy_loss(hidden.float() @ weight.float().T + bias, ...) with at most a chunk of logits in memory.

    `objective(logprobs, entropy, part)` replaces the CRPO loss: it gets a chunk's float32 [n] statistics under autograd
    and their slice of the flattened T rows, and returns the [n] losses to be summed; the result has ratio, clipped and
    kl None. It must treat rows independently of other chunks. Rows that depend on each other, as those of a sequence
    may, share a chunk if `boundaries` names the rows at which sequences end: a chunk ends only there, has as many
    sequences as fit into chunk_rows, and a longer sequence is a chunk of its own.

    The weight's gradient is summed in float32, and added into `accumulate_into` (Megatron's main_grad) when the
    backward runs. weight.grad is then None, or a placeholder where Megatron's `grad_added_to_main_grad` is there to be
    set (zeros with `zero_out_wgrad`). With `loss_gradient` (1 for `loss.backward()`) the forward already adds it, and
    needs no sum of the weight's size. One backward with that gradient must then follow: another is a RuntimeError on a
    CPU, and elsewhere makes all gradients of the call NaN; activation checkpointing would add twice.
    The gradient of `hidden` is summed over the shard's group while the chunk's next product runs, with tiles in its own
    dtype. Each chunk takes two collectives.

    `precision` and `path` are as in linear_token_logprobs. Extra memory is chunk_rows * V * 4 bytes, with tiles
    chunk_rows * (V * 2 + 8192), or V * 4 with a soft cap, and the float32 gradients of hidden and weight from forward
    to backward.
    Under torch.compile the function is one operator; with `objective` or `accumulate_into` it runs outside the graph,
    which holds neither a function nor a mark on the weight, and which fullgraph=True therefore refuses.

    Raises ValueError as linear_token_logprobs and policy_loss do, for loss arguments next to an objective, for
    boundaries without one, and for a loss_gradient without accumulate_into.
    """
    plan = check_head(
        *(hidden, weight, token_ids, bias, rows, temperature, logit_softcap, valid_vocab_size, shard),
        *(chunk_rows, sequence_parallel, precision, path, boundaries),
    )
    _check_accumulator(accumulate_into, weight, loss_gradient)
    per_row: dict[str, Any] = {
        **{"old_logprobs": old_logprobs, "advantages": advantages, "reference_logprobs": reference_logprobs},
        **{"policy_weights": policy_weights, "kl_weights": kl_weights, "entropy_weights": entropy_weights},
    }
    operands = hidden.reshape(-1, hidden.shape[-1]), weight, bias
    needs = _needed_gradients(*operands)
    evaluate: Callable[..., HeadLoss]
    if objective is None:
        require(boundaries is None, "boundaries", "rows without an objective", "None: the CRPO loss is one per row")
        limits: dict[str, Any] = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
        limits |= {"kl_limit": kl_limit, "kl_estimator": kl_estimator}
        terms = check_loss_terms(token_ids.shape, hidden.device, **per_row, **limits)
        evaluate = functools.partial(evaluate_loss, plan=plan, terms=terms, needs=needs)
    else:
        refuse_loss_arguments(**per_row)
        evaluate = functools.partial(loss_pass, plan=plan, evaluate=objective_evaluator(objective), needs=needs)
    if accumulate_into is not None and loss_gradient is not None and needs[1]:
        evaluate = functools.partial(evaluate, into=WeightTotal(accumulate_into, float(loss_gradient)))
    inside = objective is None and accumulate_into is None
    apply: Callable[..., Any] = _LinearPolicyLoss.apply
    if not inside:
        apply = functools.partial(apply_outside_graphs, _LinearPolicyLoss)
    loss, logprobs, *optional, entropy = apply(*operands, evaluate, accumulate_into, loss_gradient)
    shape = token_ids.shape
    ratio, clipped, kl = (None if x is None else x.view(shape) for x in optional)
    return PolicyLoss(loss, logprobs.view(shape), ratio, clipped, kl, entropy.view(shape))


def _needed_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Needs:
    if not torch.is_grad_enabled():
        return False, False, False
    return hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad
