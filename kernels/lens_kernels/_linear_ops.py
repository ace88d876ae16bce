"""Hides the passes over chunks from torch.compile, each behind one operator of `torch.library`.

torch.compile would unroll the loop over chunks for every number of rows, and inductor cannot lower a product of
bfloat16 factors with a float32 result. So while it traces, a pass is one operator that it does not look into. In all
other calls the pass is a plain function, because an operator costs the host a multiple of a function call.

The arguments of an operator are tensors, numbers and strings: a plan travels as the tuple that `_pack` makes of it,
with the name of its process group. A result that there is not travels as an empty tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lens_kernels._crpo import LossTerms
from lens_kernels._head import HeadPlan
from lens_kernels._head_gradient import HeadGradients, WeightTotal
from lens_kernels._linear_passes import (
    HeadLoss,
    Needs,
    logprobs_gradient_pass,
    logprobs_pass,
    loss_pass,
)
from lens_kernels._objectives import crpo_evaluator
from lens_kernels._products import Precision
from lens_kernels._vocab_parallel import RowTotals, SoftmaxTotals, TokenRows
from lens_kernels.shard import VocabShard

_OPERANDS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? tau, float? softcap, SymInt[] shard, "
    "str? group, Tensor? rows, SymInt chunk_rows, bool sequence_parallel, ScalarType dtype, int parts, str path"
)
_TERMS = (
    "Tensor? old_logprobs, Tensor advantages, Tensor? reference_logprobs, Tensor? policy_weights, Tensor? kl_weights, "
    "Tensor? entropy_weights, float clip_low, float clip_high, float? dual_clip, float? kl_limit, str kl_estimator"
)
_PLAN_ARGUMENTS = 11


def evaluate_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: HeadPlan, with_entropy: bool
) -> RowTotals:
    """Returns `logprobs_pass` of these arguments, in a form that torch.compile can take."""
    if not torch.compiler.is_compiling():
        return logprobs_pass(hidden, weight, bias, plan, with_entropy)
    maximum, log_sum, kept_entropy, logprobs, entropy = _logprobs_operator(
        hidden, weight, bias, *_pack(plan), with_entropy
    )
    if not with_entropy:
        return RowTotals(SoftmaxTotals(maximum, log_sum, None), logprobs, None)
    return RowTotals(SoftmaxTotals(maximum, log_sum, kept_entropy), logprobs, entropy)


def differentiate_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: HeadPlan,
    totals: SoftmaxTotals,
    d_logprobs: Tensor,
    d_entropy: Tensor | None,
    needs: Needs,
) -> HeadGradients:
    """Returns `logprobs_gradient_pass` of these arguments, in a form that torch.compile can take."""
    if not torch.compiler.is_compiling():
        return logprobs_gradient_pass(hidden, weight, bias, plan, totals, d_logprobs, d_entropy, needs)
    gradients = _logprobs_gradient_operator(
        hidden, weight, bias, *_pack(plan), *totals, d_logprobs, d_entropy, list(needs)
    )
    return _needed(gradients, needs)


def evaluate_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: HeadPlan,
    terms: LossTerms,
    needs: Needs,
    into: WeightTotal | None = None,
) -> HeadLoss:
    """Returns `loss_pass` of these arguments with the built-in loss, in a form that torch.compile can take."""
    if not torch.compiler.is_compiling() or into is not None:
        return loss_pass(hidden, weight, bias, plan, crpo_evaluator(terms), needs, into)
    loss, logprobs, ratio, clipped, kl, entropy, *gradients = _loss_operator(
        hidden, weight, bias, *_pack(plan), *terms, list(needs)
    )
    return HeadLoss(loss, logprobs, ratio, clipped, kl, entropy, _needed(gradients, needs))


def _needed(gradients: Sequence[Tensor], needs: Needs) -> HeadGradients:
    return HeadGradients(*(g if needed else None for g, needed in zip(gradients, needs, strict=True)))


def _pack(plan: HeadPlan) -> tuple[Any, ...]:
    token_ids, tau, softcap, shard = plan.tokens
    group = None if shard.group is None else shard.group.group_name
    numbers = [shard.start, shard.size, shard.total]
    how = plan.chunk_rows, plan.sequence_parallel, *plan.precision, plan.path
    return token_ids, tau, softcap, numbers, group, plan.rows, *how


def _unpack(
    token_ids: Tensor,
    tau: Tensor | None,
    softcap: float | None,
    shard: list[int],
    group: str | None,
    rows: Tensor | None,
    chunk_rows: int,
    sequence_parallel: bool,
    dtype: torch.dtype,
    parts: int,
    path: Any,
) -> HeadPlan:
    start, size, total = shard
    ranks = None
    if group is not None:
        # PyTorch has no public way from a name to a group; its own collectives in graphs take this one.
        ranks = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined,arg-type]  # private
    tokens = TokenRows(token_ids, tau, softcap, VocabShard(start, size, total, ranks))
    return HeadPlan(tokens, rows, chunk_rows, None, sequence_parallel, Precision(dtype, parts), path)


def _or_empty(value: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if value is None else value


def _logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *plan, with_entropy = rest
    totals = logprobs_pass(hidden, weight, bias, _unpack(*plan), with_entropy)
    return tuple(_or_empty(value, hidden) for value in (*totals.softmax, totals.logprobs, totals.entropy))


def _logprobs_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    token_ids, with_entropy = rest[0], rest[-1]
    there = True, True, with_entropy, True, with_entropy
    return tuple(_row(token_ids) if value else _or_empty(None, hidden) for value in there)


def _logprobs_gradient(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    plan, (*totals, d_logprobs, d_entropy, needs) = _unpack(*rest[:_PLAN_ARGUMENTS]), rest[_PLAN_ARGUMENTS:]
    gradients = logprobs_gradient_pass(
        hidden, weight, bias, plan, SoftmaxTotals(*totals), d_logprobs, d_entropy, tuple(needs)
    )
    return tuple(_or_empty(gradient, hidden) for gradient in gradients)


def _gradient_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    return tuple(
        hidden.new_empty(shape if needed else 0, dtype=torch.float32)
        for shape, needed in zip(shapes, rest[-1], strict=True)
    )


def _loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    plan, (*terms, needs) = _unpack(*rest[:_PLAN_ARGUMENTS]), rest[_PLAN_ARGUMENTS:]
    result = loss_pass(hidden, weight, bias, plan, crpo_evaluator(LossTerms(*terms)), tuple(needs))
    return tuple(_or_empty(value, hidden) for value in (*result.tensors(), *result.gradients))


def _loss_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    loss = hidden.new_empty((), dtype=torch.float32)
    return loss, *(_row(rest[0]) for _ in range(5)), *_gradient_shapes(hidden, weight, bias, *rest)


def _row(token_ids: Tensor) -> Tensor:
    return torch.empty_like(token_ids, dtype=torch.float32)


def _operator(name: str, function: Any, shapes: Any, arguments: str, results: int) -> Any:
    schema = f"({_OPERANDS}, {arguments}) -> ({', '.join(['Tensor'] * results)})"
    operator = torch.library.custom_op(f"lens_kernels::{name}", function, mutates_args=(), schema=schema)
    operator.register_fake(shapes)
    return operator


_logprobs_operator = _operator("linear_logprobs", _logprobs, _logprobs_shapes, "bool with_entropy", 5)
_logprobs_gradient_operator = _operator(
    "linear_logprobs_gradient",
    _logprobs_gradient,
    _gradient_shapes,
    "Tensor maximum, Tensor log_sum, Tensor? entropy, Tensor d_logprobs, Tensor? d_entropy, bool[] needs",
    3,
)
_loss_operator = _operator("linear_loss", _loss, _loss_shapes, f"{_TERMS}, bool[] needs", 9)
