"""Computes log-probabilities from hidden states: LM head and token_logprobs together, without the full [T, V] logits.

logits = hidden @ weight.T + bias, in float32 and never rounded: rounding them to bfloat16 adds an error of about 0.06
nat per token, which changes the ranking of interference scores while the policy is close to the reference. Rows are
computed in chunks of fixed size; use the same chunk_rows, precision and path for policy and reference, since a GEMM's
rounding depends on its shape.

The order is _head.py (the plan) -> _chunk.py (a chunk's statistics and the gradient of its logits) -> _head_gradient.py
(the sums over chunks) -> this file. _products.py has every matrix product, _linear_ops.py what torch.compile sees.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lens_kernels._head import HeadPlan, PathName, check_head
from lens_kernels._linear_ops import differentiate_logprobs, evaluate_logprobs
from lens_kernels._products import PrecisionName
from lens_kernels._vocab_parallel import SoftmaxTotals
from lens_kernels.logprobs import shape_results, zeros_for_none
from lens_kernels.shard import VocabShard


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: HeadPlan, return_entropy: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        totals = evaluate_logprobs(hidden, weight, bias, plan, return_entropy)
        ctx.save_for_backward(hidden, weight, bias, *totals.softmax)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return (totals.logprobs, totals.asked_entropy()) if return_entropy else totals.logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None = None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *saved = ctx.saved_tensors
        d_logprobs = zeros_for_none(d_logprobs, d_entropy)
        needs = tuple(ctx.needs_input_grad[:3])
        gradients = differentiate_logprobs(
            hidden, weight, bias, ctx.plan, SoftmaxTotals(*saved), d_logprobs, d_entropy, needs
        )
        pairs = zip(gradients, (hidden, weight, bias), strict=True)
        return *(None if g is None else g.to(x.dtype) for g, x in pairs), None, None


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    rows: Tensor | None = ...,
    temperature: Tensor | float = ...,
    logit_softcap: float | None = ...,
    return_entropy: Literal[False] = ...,
    valid_vocab_size: int | None = ...,
    shard: VocabShard | None = ...,
    chunk_rows: int | None = ...,
    sequence_parallel: bool = ...,
    precision: PrecisionName = ...,
    path: PathName = ...,
) -> Tensor: ...


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    rows: Tensor | None = ...,
    temperature: Tensor | float = ...,
    logit_softcap: float | None = ...,
    return_entropy: Literal[True],
    valid_vocab_size: int | None = ...,
    shard: VocabShard | None = ...,
    chunk_rows: int | None = ...,
    sequence_parallel: bool = ...,
    precision: PrecisionName = ...,
    path: PathName = ...,
) -> tuple[Tensor, Tensor]: ...


def linear_token_logprobs(
    hidden: Tensor,  # [..., H] float32, bfloat16 or float16; the same on all ranks of `shard`
    weight: Tensor,  # [V, H]; this rank's rows of the LM head if `shard` is given
    token_ids: Tensor,  # [...] int64 or int32, global ids; negative: ignore the row. [T] if `rows` is given
    *,
    bias: Tensor | None = None,  # [V]
    rows: Tensor | None = None,  # [T] int64: the flattened rows of `hidden` that need a head at all
    temperature: Tensor | float = 1.0,
    logit_softcap: float | None = None,  # > 0: logits become logit_softcap * tanh(logits / logit_softcap)
    return_entropy: bool = False,
    valid_vocab_size: int | None = None,
    shard: VocabShard | None = None,
    chunk_rows: int | None = None,
    sequence_parallel: bool = False,
    precision: PrecisionName = "auto",
    path: PathName = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # float32, shaped like token_ids, or (logprobs, entropy)
    """Returns token_logprobs(hidden.float() @ weight.float().T + bias, ...) with at most a chunk of logits in memory.

    With `rows`, only those rows are computed and token_ids, temperature and the result have one entry per index.
    The backward computes each chunk's logits again (four GEMMs in all), accumulates the weight's gradient in float32
    and sums the gradient of `hidden` over the shard's group, so do not sum it a second time in the layer before.
    With `sequence_parallel`, each rank holds an equal part of `hidden` along its first axis: the parts are gathered
    here and the gradient is reduce-scattered; token_ids and `rows` refer to the gathered rows.

    `precision` says what is multiplied; sums and logits are float32 always.
        "auto"        the operands as they are: in the dtype of torch.autocast where it is on, else in their own, which
                      must be the same for both
        "bfloat16"    both operands rounded to bfloat16
        "bfloat16x2"  float32 operands as sums of two bfloat16 numbers, in 3 products; 16 significant bits
        "bfloat16x3"  of three, in 6 products; nearly as exact as float32. A bfloat16 operand stays one number in both
        "float32"     operands turned to float32; never TF32
    Where the operands are half precision, a GPU rounds the logits' gradient to bfloat16 before its two products, for
    float16 operands too, whose range it would exceed: these are then turned to bfloat16 a block at a time.

    `path` chooses how a chunk's logits exist: as a whole ("chunks"), or a tile of 2048 columns at a time ("tiles"),
    which keeps bfloat16 exponentials for the backward and nothing for a forward without gradients. "auto" takes tiles
    for half-precision operands on a GPU. That this is the faster one is a prediction that no GPU has tested yet.

    Forward takes one collective for all chunks. Extra memory is chunk_rows * V * 4 bytes, and in the backward the
    weight's gradient in float32. With tiles it is chunk_rows * 8192 bytes in the forward, and chunk_rows * V * 2 more
    in the backward, twice as much with a soft cap.

    Raises ValueError for a wrong shape, dtype, device, temperature, vocabulary size, chunk or row index, for operands
    of two dtypes with precision="auto" outside autocast, and for an operand that is a DTensor, cut by ZeRO-3 or
    quantised.
    """
    plan = check_head(
        hidden,
        weight,
        token_ids,
        bias,
        rows,
        temperature,
        logit_softcap,
        valid_vocab_size,
        shard,
        chunk_rows,
        sequence_parallel,
        precision,
        path,
    )
    results = _LinearTokenLogprobs.apply(hidden.reshape(-1, hidden.shape[-1]), weight, bias, plan, return_entropy)
    return shape_results(results, token_ids.shape)
