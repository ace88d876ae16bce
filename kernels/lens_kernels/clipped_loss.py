"""Computes the CRPO policy loss (weighted, clipped, with KL and entropy terms) from logits.

Per row t, with logp_t and H_t from logprobs.py and A_t = advantages:
    loss_t  = policy_weights_t * PG_t + kl_weights_t * k3_t - entropy_weights_t * H_t
    rho_t   = exp(clamp(logp_t - old_logprobs_t, -20, 20))
    PG_t    = max(-rho_t * A_t, -clip(rho_t, 1 - clip_low, 1 + clip_high) * A_t), at most -dual_clip * A_t if A_t < 0
    k3_t    = min(exp(-u) + u - 1, kl_limit),  u = logp_t - reference_logprobs_t, -u clamped to +-20
The gradient is that of these formulas, so it is 0 where a bound holds: where rho or k3 is clipped, and where a
log-ratio, which is clamped only so that its exp does not overflow, is beyond +-20 nats. Without a kl_limit a token
that the policy makes very improbable may dominate the KL term: at -u = 10 its gradient is 22,025 * kl_weights_t.
The weights must contain every normalisation of an algorithm (per token, per sequence, LENS's success-rate weights).

On-policy rows: old_logprobs=None, or NaN on a row, means that the row was sampled from the policy being trained. Its
rho is exactly 1 and its gradient is that of old_logprobs = logp.detach(), so no second forward pass is needed.
Sources: LENS, arXiv 2601.21244, eq. 7; PPO, arXiv 1707.06347; dual clip, arXiv 1912.09729; k3 in kl.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lens_kernels._backend import jit, tl, uses_triton
from lens_kernels._checks import check_limits, check_tensor, per_row, per_row_or_none
from lens_kernels._statistics import row_statistics
from lens_kernels._vocab_parallel import RowTotals, TokenRows, exp_accurate, merge_statistics
from lens_kernels.kl import LOG_RATIO_LIMIT, k3, k3_and_slope
from lens_kernels.logprobs import check_logits_arguments, compute_dlogits, save_rows
from lens_kernels.shard import VocabShard

CRPO_ROWS = 128  # rows per program of the Triton kernel


class PolicyLoss(NamedTuple):
    """The results of the policy losses, all float32; ignored rows are 0. Only `loss` carries a gradient."""

    loss: Tensor  # scalar, the sum over rows
    logprobs: Tensor  # [...]
    ratio: Tensor | None  # [...] rho; None with an objective of the caller's own
    clipped: Tensor | None  # [...] 1.0 where a clip (dual clip included) cut the policy gradient to 0; None likewise
    kl: Tensor | None  # [...] k3, at most kl_limit, 0 without reference_logprobs; None likewise
    entropy: Tensor  # [...]


class LossTerms(NamedTuple):
    """The checked inputs of the loss: float32 [T] tensors, None for an absent term."""

    old_logprobs: Tensor | None
    advantages: Tensor
    reference_logprobs: Tensor | None
    policy_weights: Tensor | None
    kl_weights: Tensor | None
    entropy_weights: Tensor | None
    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_limit: float | None

    def at(self, rows: slice) -> LossTerms:
        """Returns the terms of some of the rows."""
        return self._replace(
            old_logprobs=_rows_of(self.old_logprobs, rows),
            advantages=self.advantages[rows],
            reference_logprobs=_rows_of(self.reference_logprobs, rows),
            policy_weights=_rows_of(self.policy_weights, rows),
            kl_weights=_rows_of(self.kl_weights, rows),
            entropy_weights=_rows_of(self.entropy_weights, rows),
        )


def _rows_of(term: Tensor | None, rows: slice) -> Tensor | None:
    return None if term is None else term[rows]


class TokenLosses(NamedTuple):
    """The results per row, all [T] float32 and 0 on ignored rows."""

    losses: Tensor
    ratio: Tensor | None
    clipped: Tensor | None
    kl: Tensor | None
    d_logprobs: Tensor
    d_entropy: Tensor | None  # None: the loss does not depend on the entropy


def crpo_reference(logprobs: Tensor, entropy: Tensor, token_ids: Tensor, terms: LossTerms) -> TokenLosses:
    advantages = terms.advantages
    log_ratio = torch.zeros_like(logprobs)
    if terms.old_logprobs is not None:
        log_ratio = (logprobs - terms.old_logprobs).masked_fill(terms.old_logprobs.isnan(), 0)
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
        difference = terms.reference_logprobs - logprobs
        kl = k3(difference)
        flat = difference.abs() > LOG_RATIO_LIMIT
        if terms.kl_limit is not None:
            flat |= kl > terms.kl_limit
            kl = kl.clamp(max=terms.kl_limit)
        if terms.kl_weights is not None:
            d_logprobs = d_logprobs - terms.kl_weights * torch.expm1(difference).masked_fill(flat, 0)
    if terms.kl_weights is not None:
        losses = losses + terms.kl_weights * kl
    d_entropy = None
    if terms.entropy_weights is not None:
        losses, d_entropy = losses - terms.entropy_weights * entropy, -terms.entropy_weights
    ignored = token_ids < 0
    return TokenLosses(
        losses.masked_fill(ignored, 0),
        ratio.masked_fill(ignored, 0),
        clipped.float().masked_fill(ignored, 0),
        kl.masked_fill(ignored, 0),
        d_logprobs.masked_fill(ignored, 0),
        None if d_entropy is None else d_entropy.masked_fill(ignored, 0),
    )


@jit
@no_type_check
def _crpo_kernel(
    # inputs, [T]; None for an absent term
    logprobs_ptr,
    entropy_ptr,
    ids_ptr,
    old_ptr,  # or None
    advantages_ptr,
    reference_ptr,  # or None
    policy_weights_ptr,  # or None
    kl_weights_ptr,  # or None
    entropy_weights_ptr,  # or None
    # outputs, [T]
    losses_ptr,
    ratio_ptr,
    clipped_ptr,
    kl_ptr,
    d_logprobs_ptr,
    d_entropy_ptr,  # or None
    # shapes
    rows,
    # constants
    CLIP_LOW: tl.constexpr,
    CLIP_HIGH: tl.constexpr,
    DUAL_CLIP: tl.constexpr,  # or None
    LOG_RATIO_LIMIT: tl.constexpr,
    KL_LIMIT: tl.constexpr,  # or None
    # tunables
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = row < rows
    ignored = tl.load(ids_ptr + row, mask=inside, other=-1) < 0
    logprobs = tl.load(logprobs_ptr + row, mask=inside, other=0.0)
    advantages = tl.load(advantages_ptr + row, mask=inside, other=0.0)
    log_ratio = tl.zeros((BLOCK,), tl.float32)
    if old_ptr is not None:
        old = tl.load(old_ptr + row, mask=inside, other=0.0)
        log_ratio = tl.where(old != old, 0.0, logprobs - old)  # NaN: on-policy
    ratio = exp_accurate(tl.minimum(tl.maximum(log_ratio, -LOG_RATIO_LIMIT), LOG_RATIO_LIMIT))
    within = tl.minimum(tl.maximum(ratio, 1 - CLIP_LOW), 1 + CLIP_HIGH)
    losses = tl.maximum(-ratio * advantages, -within * advantages)
    positive, negative = advantages > 0, advantages < 0
    clipped = (positive & (ratio > 1 + CLIP_HIGH)) | (negative & (ratio < 1 - CLIP_LOW))
    if DUAL_CLIP is not None:
        losses = tl.where(negative, tl.minimum(losses, -DUAL_CLIP * advantages), losses)
        clipped = clipped | (negative & (ratio > DUAL_CLIP))
    flat = clipped | (tl.abs(log_ratio) > LOG_RATIO_LIMIT)
    d_logprobs = tl.where(flat, 0.0, -ratio * advantages)
    if policy_weights_ptr is not None:
        weights = tl.load(policy_weights_ptr + row, mask=inside, other=0.0)
        losses, d_logprobs = losses * weights, d_logprobs * weights

    kl = tl.zeros((BLOCK,), tl.float32)
    if reference_ptr is not None:
        difference = tl.load(reference_ptr + row, mask=inside, other=0.0) - logprobs
        kl, slope = k3_and_slope(difference, LOG_RATIO_LIMIT, KL_LIMIT)
        if kl_weights_ptr is not None:
            weights = tl.load(kl_weights_ptr + row, mask=inside, other=0.0)
            losses += weights * kl
            d_logprobs -= weights * slope
    if entropy_weights_ptr is not None:
        weights = tl.load(entropy_weights_ptr + row, mask=inside, other=0.0)
        losses -= weights * tl.load(entropy_ptr + row, mask=inside, other=0.0)
        tl.store(d_entropy_ptr + row, tl.where(ignored, 0.0, -weights), mask=inside)
    tl.store(losses_ptr + row, tl.where(ignored, 0.0, losses), mask=inside)
    tl.store(ratio_ptr + row, tl.where(ignored, 0.0, ratio), mask=inside)
    tl.store(clipped_ptr + row, tl.where(ignored, 0.0, clipped.to(tl.float32)), mask=inside)
    tl.store(kl_ptr + row, tl.where(ignored, 0.0, kl), mask=inside)
    tl.store(d_logprobs_ptr + row, tl.where(ignored, 0.0, d_logprobs), mask=inside)


def crpo_triton(logprobs: Tensor, entropy: Tensor, token_ids: Tensor, terms: LossTerms) -> TokenLosses:
    rows = len(token_ids)
    outputs = torch.empty(6, rows, dtype=torch.float32, device=logprobs.device)
    losses, ratio, clipped, kl, d_logprobs, d_entropy = outputs.unbind()
    results = TokenLosses(losses, ratio, clipped, kl, d_logprobs, None if terms.entropy_weights is None else d_entropy)
    if rows:
        _crpo_kernel[(-(-rows // CRPO_ROWS),)](
            *(logprobs, entropy, token_ids, *terms[:6]),
            *results,
            rows,
            *(float(terms.clip_low), float(terms.clip_high)),
            None if terms.dual_clip is None else float(terms.dual_clip),
            LOG_RATIO_LIMIT,
            None if terms.kl_limit is None else float(terms.kl_limit),
            CRPO_ROWS,
        )
    return results


def crpo(logprobs: Tensor, entropy: Tensor, token_ids: Tensor, terms: LossTerms) -> TokenLosses:
    """Returns the loss of each row and its derivatives by logprob and entropy; all arguments are [T]."""
    evaluate = crpo_triton if uses_triton(logprobs.device) else crpo_reference
    return evaluate(logprobs, entropy, token_ids, terms)


def merge_and_evaluate(
    stats: Tensor,  # [D, 4, T] float32
    rows: TokenRows,
    terms: LossTerms,
) -> tuple[RowTotals, TokenLosses]:
    """Merges the statistics of all shards, and evaluates the loss of each row on the result."""
    totals = merge_statistics(stats, rows)
    return totals, crpo(totals.logprobs, totals.softmax.asked_entropy(), rows.token_ids, terms)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: TokenRows, terms: LossTerms, inplace: bool
    ) -> tuple[Tensor | None, ...]:
        stats = row_statistics(logits, rows, with_entropy=True)
        totals, tokens = merge_and_evaluate(stats, rows, terms)
        save_rows(ctx, logits, rows, totals.softmax)
        ctx.inplace = inplace
        ctx.derivatives = tokens.d_logprobs, tokens.d_entropy
        entropy = totals.softmax.asked_entropy()
        per_token = (totals.logprobs, tokens.ratio, tokens.clipped, tokens.kl, entropy.clone())
        ctx.mark_non_differentiable(*per_token)
        return tokens.losses.sum(), *per_token

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        d_logprobs, d_entropy = ctx.derivatives
        d_entropy = None if d_entropy is None else d_entropy * d_loss
        return compute_dlogits(ctx, d_logprobs * d_loss, d_entropy), None, None, None


def check_loss_terms(
    shape: torch.Size,
    device: torch.device,
    *,
    old_logprobs: Tensor | None,
    advantages: Tensor | float | None,
    reference_logprobs: Tensor | None,
    policy_weights: Tensor | float | None,
    kl_weights: Tensor | float | None,
    entropy_weights: Tensor | float | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_limit: float | None,
) -> LossTerms:
    """Checks the loss's arguments and broadcasts them to rows of `shape`. Raises ValueError."""
    check_limits(clip_low, clip_high, dual_clip, kl_limit)
    if advantages is None:
        raise ValueError("advantages: got None, need a tensor that broadcasts to the rows")
    if kl_weights is not None:
        check_tensor("reference_logprobs (needed by kl_weights)", reference_logprobs)
    return LossTerms(
        per_row_or_none("old_logprobs", old_logprobs, shape, device),
        per_row("advantages", advantages, shape, device),
        per_row_or_none("reference_logprobs", reference_logprobs, shape, device),
        per_row_or_none("policy_weights", policy_weights, shape, device),
        per_row_or_none("kl_weights", kl_weights, shape, device),
        per_row_or_none("entropy_weights", entropy_weights, shape, device),
        clip_low,
        clip_high,
        dual_clip,
        kl_limit,
    )


def policy_loss(
    logits: Tensor,  # [..., V] float32, bfloat16 or float16; this rank's columns if `shard` is given
    token_ids: Tensor,  # [...] int64 or int32, global ids; negative: ignore the row
    *,
    old_logprobs: Tensor | None,  # [...]; NaN or None: on-policy
    advantages: Tensor | float,  # this and the following tensors: [...], or broadcastable to it; no gradient
    reference_logprobs: Tensor | None = None,
    policy_weights: Tensor | float | None = None,  # None: 1
    kl_weights: Tensor | float | None = None,  # None: no KL term
    entropy_weights: Tensor | float | None = None,  # None: no entropy term
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,  # > 1
    kl_limit: float | None = None,  # > 0; None: no limit
    temperature: Tensor | float = 1.0,
    valid_vocab_size: int | None = None,
    shard: VocabShard | None = None,
    inplace_backward: bool = False,
) -> PolicyLoss:
    """Returns the CRPO loss of the module docstring, summed over rows, and its parts per row.

    A row whose old_logprobs is NaN (all rows, if old_logprobs is None) is on-policy: ratio exactly 1, with gradient.
    `kl_limit` bounds k3, in the loss and in the result; where k3 is above it, the KL term has no gradient.
    Temperature, padding, shards, ignored rows and `inplace_backward` are as in token_logprobs.
    The logits and five numbers per row are saved for backward. Forward moves 2 bytes per bf16 element, backward 4.

    Raises ValueError for a wrong shape, dtype, device, temperature, clip or limit, and for kl_weights without
    reference_logprobs; RuntimeError for a second use of the logits after inplace_backward.
    """
    rows = check_logits_arguments(logits, token_ids, temperature, valid_vocab_size, shard, inplace_backward)
    terms = check_loss_terms(
        token_ids.shape,
        logits.device,
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
    loss, *per_token = _PolicyLoss.apply(logits, rows, terms, inplace_backward)
    return PolicyLoss(loss, *(x.view(token_ids.shape) for x in per_token))
