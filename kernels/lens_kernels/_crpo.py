"""Merges the shards' row statistics and evaluates the CRPO loss of every row, in one launch.

The formulas are in clipped_loss.py. The reference comes first, then the kernel, its launcher and the choice between
the two.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
from torch import Tensor

from lens_kernels._backend import jit, launch, tl, uses_triton
from lens_kernels._kernel_parts import exp_accurate
from lens_kernels._vocab_parallel import (
    MERGE_ROWS,
    RowTotals,
    TokenRows,
    empty_totals,
    gather_statistics,
    merge_reference,
    merge_rows,
)
from lens_kernels.kl import LOG_RATIO_LIMIT, KlEstimator, kl_and_slope, kl_and_slope_in_kernel


class LossTerms(NamedTuple):
    """The checked inputs of the loss: float32 [T] of any stride, one number for all rows, or None: an absent term."""

    old_logprobs: Tensor | float | None
    advantages: Tensor | float
    reference_logprobs: Tensor | float | None
    policy_weights: Tensor | float | None
    kl_weights: Tensor | float | None
    entropy_weights: Tensor | float | None
    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_limit: float | None
    kl_estimator: KlEstimator

    def at(self, rows: slice) -> LossTerms:
        """Returns the terms of some of the rows."""
        return LossTerms._make(x[rows] if isinstance(x, Tensor) else x for x in self)


class TokenLosses(NamedTuple):
    """The results per row, all [T] float32 and 0 on ignored rows; no other tensor shares their memory."""

    losses: Tensor
    ratio: Tensor | None
    clipped: Tensor | None
    kl: Tensor | None
    d_logprobs: Tensor
    d_entropy: Tensor | None  # None: the loss does not depend on the entropy


def merge_and_evaluate_reference(
    parts: Tensor,  # [pieces, 4, T]
    rows: TokenRows,
    terms: LossTerms,
) -> tuple[RowTotals, TokenLosses]:
    totals = merge_reference(parts, rows.token_ids, rows.tau)
    return totals, _crpo(totals.logprobs, totals.asked_entropy(), rows.token_ids, terms)


def _crpo(logprobs: Tensor, entropy: Tensor, token_ids: Tensor, terms: LossTerms) -> TokenLosses:
    advantages, log_ratio = _spread(terms.advantages, logprobs), torch.zeros_like(logprobs)
    if terms.old_logprobs is not None:
        old = _spread(terms.old_logprobs, logprobs)
        log_ratio = (logprobs - old).masked_fill(old.isnan(), 0)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    low, high = 1 - terms.clip_low, 1 + terms.clip_high
    losses = torch.maximum(-ratio * advantages, -ratio.clamp(low, high) * advantages)
    clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    if terms.dual_clip is not None:
        bounded = torch.minimum(losses, -terms.dual_clip * advantages)
        losses = torch.where(advantages < 0, bounded, losses)
        clipped |= (advantages < 0) & (ratio > terms.dual_clip)
    flat = clipped | (log_ratio.abs() > LOG_RATIO_LIMIT)
    d_logprobs = (-ratio * advantages).masked_fill(flat, 0)
    if terms.policy_weights is not None:
        losses, d_logprobs = losses * terms.policy_weights, d_logprobs * terms.policy_weights

    kl = torch.zeros_like(logprobs)
    if terms.reference_logprobs is not None:
        kl, slope = kl_and_slope(terms.reference_logprobs - logprobs, terms.kl_estimator, terms.kl_limit)
        if terms.kl_weights is not None:
            losses, d_logprobs = losses + terms.kl_weights * kl, d_logprobs - terms.kl_weights * slope
    d_entropy = None
    if terms.entropy_weights is not None:
        weights = _spread(terms.entropy_weights, entropy)
        losses, d_entropy = losses - weights * entropy, -weights
    ignored = token_ids < 0
    return TokenLosses(
        losses.masked_fill(ignored, 0),
        ratio.masked_fill(ignored, 0),
        clipped.float().masked_fill(ignored, 0),
        kl.masked_fill(ignored, 0),
        d_logprobs.masked_fill(ignored, 0),
        None if d_entropy is None else d_entropy.masked_fill(ignored, 0),
    )


def _spread(term: Tensor | float, like: Tensor) -> Tensor:
    """Returns a term of the rows, [T]."""
    return term if isinstance(term, Tensor) else torch.full_like(like, term)


@jit
@no_type_check
def _load(
    term,  # [T], or one number
    stride,  # None for a number
    row,  # [BLOCK]
    inside,  # [BLOCK]
):
    """Returns a term of the rows, [BLOCK]."""
    if stride is None:
        value = tl.zeros(row.shape, tl.float32) + term
    else:
        value = tl.load(term + row * stride, mask=inside, other=0.0)
    return value


@jit
@no_type_check
def _clipped_policy_loss(
    log_ratio,  # [BLOCK], as are the results
    advantages,  # [BLOCK]
    CLIP_LOW: tl.constexpr,
    CLIP_HIGH: tl.constexpr,
    DUAL_CLIP: tl.constexpr,  # or None
    LOG_RATIO_LIMIT: tl.constexpr,
):
    """Returns (losses, their derivative by log_ratio, ratio, whether a clip cut the gradient)."""
    ratio = exp_accurate(tl.minimum(tl.maximum(log_ratio, -LOG_RATIO_LIMIT), LOG_RATIO_LIMIT))
    within = tl.minimum(tl.maximum(ratio, 1 - CLIP_LOW), 1 + CLIP_HIGH)
    losses = tl.maximum(-ratio * advantages, -within * advantages)
    positive, negative = advantages > 0, advantages < 0
    clipped = (positive & (ratio > 1 + CLIP_HIGH)) | (negative & (ratio < 1 - CLIP_LOW))
    if DUAL_CLIP is not None:
        losses = tl.where(negative, tl.minimum(losses, -DUAL_CLIP * advantages), losses)
        clipped = clipped | (negative & (ratio > DUAL_CLIP))
    flat = clipped | (tl.abs(log_ratio) > LOG_RATIO_LIMIT)
    return losses, tl.where(flat, 0.0, -ratio * advantages), ratio, clipped.to(tl.float32)


@jit
@no_type_check
def _merge_and_evaluate_kernel(
    # inputs
    parts_ptr,  # [pieces, 4, T]
    ids_ptr,  # [T]
    tau_ptr,  # [T] or None
    # terms of the loss, each a pointer and the stride of [T], or a number or None, and None
    old,
    old_stride,
    advantages,
    advantages_stride,
    reference,
    reference_stride,
    policy_weights,
    policy_weights_stride,
    kl_weights,
    kl_weights_stride,
    entropy_weights,
    entropy_weights_stride,
    # outputs, [T]
    maximum_ptr,
    log_sum_ptr,
    saved_entropy_ptr,
    logprobs_ptr,
    entropy_ptr,
    losses_ptr,
    ratio_ptr,
    clipped_ptr,
    kl_ptr,
    d_logprobs_ptr,
    d_entropy_ptr,  # or None
    # shapes
    rows,
    pieces,
    # constants
    CLIP_LOW: tl.constexpr,
    CLIP_HIGH: tl.constexpr,
    DUAL_CLIP: tl.constexpr,  # or None
    KL_LIMIT: tl.constexpr,  # or None
    KL_ESTIMATOR: tl.constexpr,
    LOG_RATIO_LIMIT: tl.constexpr,
    # tunables
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = row < rows
    kept = tl.load(ids_ptr + row, mask=inside, other=-1) >= 0
    inverse_tau = 1.0
    if tau_ptr is not None:
        inverse_tau = 1.0 / tl.load(tau_ptr + row, mask=inside, other=1.0)
    maximum, log_sum, logprobs, entropy = merge_rows(parts_ptr, row, inside, inverse_tau, rows, pieces, 4, BLOCK)
    tl.store(maximum_ptr + row, tl.where(kept, maximum, 0.0), mask=inside)
    tl.store(log_sum_ptr + row, tl.where(kept, log_sum, 0.0), mask=inside)
    tl.store(saved_entropy_ptr + row, tl.where(kept, entropy, 0.0), mask=inside)
    tl.store(logprobs_ptr + row, tl.where(kept, logprobs, 0.0), mask=inside)
    tl.store(entropy_ptr + row, tl.where(kept, entropy, 0.0), mask=inside)

    log_ratio = tl.zeros((BLOCK,), tl.float32)
    if old is not None:
        old_logprobs = _load(old, old_stride, row, inside)
        log_ratio = tl.where(old_logprobs != old_logprobs, 0.0, logprobs - old_logprobs)  # NaN: on-policy
    advantage = _load(advantages, advantages_stride, row, inside)
    losses, d_logprobs, ratio, clipped = _clipped_policy_loss(
        log_ratio, advantage, CLIP_LOW, CLIP_HIGH, DUAL_CLIP, LOG_RATIO_LIMIT
    )
    if policy_weights is not None:
        weights = _load(policy_weights, policy_weights_stride, row, inside)
        losses, d_logprobs = losses * weights, d_logprobs * weights
    kl = tl.zeros((BLOCK,), tl.float32)
    if reference is not None:
        difference = _load(reference, reference_stride, row, inside) - logprobs
        kl, slope = kl_and_slope_in_kernel(difference, KL_ESTIMATOR, LOG_RATIO_LIMIT, KL_LIMIT)
        if kl_weights is not None:
            weights = _load(kl_weights, kl_weights_stride, row, inside)
            losses, d_logprobs = losses + weights * kl, d_logprobs - weights * slope
    if entropy_weights is not None:
        weights = _load(entropy_weights, entropy_weights_stride, row, inside)
        losses -= weights * entropy
        tl.store(d_entropy_ptr + row, tl.where(kept, -weights, 0.0), mask=inside)
    tl.store(losses_ptr + row, tl.where(kept, losses, 0.0), mask=inside)
    tl.store(ratio_ptr + row, tl.where(kept, ratio, 0.0), mask=inside)
    tl.store(clipped_ptr + row, tl.where(kept, clipped, 0.0), mask=inside)
    tl.store(kl_ptr + row, tl.where(kept, kl, 0.0), mask=inside)
    tl.store(d_logprobs_ptr + row, tl.where(kept, d_logprobs, 0.0), mask=inside)


def merge_and_evaluate_triton(parts: Tensor, rows: TokenRows, terms: LossTerms) -> tuple[RowTotals, TokenLosses]:
    pieces, _, count = parts.shape
    totals = empty_totals(count, True, parts.device)
    tokens = TokenLosses._make(torch.empty_like(totals.logprobs) for _ in TokenLosses._fields)
    if terms.entropy_weights is None:
        tokens = tokens._replace(d_entropy=None)
    arguments = [(x, x.stride(0) if isinstance(x, Tensor) else None) for x in terms[:6]]
    launch(
        *(_merge_and_evaluate_kernel, -(-count // MERGE_ROWS), parts.device),
        *(parts, rows.token_ids, rows.tau),
        *(value for pair in arguments for value in pair),
        *(*totals.softmax, totals.logprobs, totals.entropy, *tokens),
        *(count, pieces),
        *(float(terms.clip_low), float(terms.clip_high)),
        *(None if bound is None else float(bound) for bound in (terms.dual_clip, terms.kl_limit)),
        *(terms.kl_estimator, LOG_RATIO_LIMIT, MERGE_ROWS),
    )
    return totals, tokens


def merge_and_evaluate(
    stats: Tensor,  # [D, 4, T] float32
    rows: TokenRows,
    terms: LossTerms,
) -> tuple[RowTotals, TokenLosses]:
    """Merges the statistics of all shards, and evaluates the loss of each row on the result."""
    evaluate = merge_and_evaluate_triton if uses_triton(stats.device) else merge_and_evaluate_reference
    return evaluate(gather_statistics(stats, rows.shard), rows, terms)
