"""Computes the CRPO policy loss (weighted, clipped, with KL and entropy terms) from logits.

Per row t, with logp_t and H_t from logprobs.py and A_t = advantages:
    loss_t  = policy_weights_t * PG_t + kl_weights_t * KL_t - entropy_weights_t * H_t
    rho_t   = exp(clamp(logp_t - old_logprobs_t, -20, 20))
    PG_t    = max(-rho_t * A_t, -clip(rho_t, 1 - clip_low, 1 + clip_high) * A_t), at most -dual_clip * A_t if A_t < 0
    KL_t    = min(k(reference_logprobs_t - logp_t), kl_limit),  k = k1, k2 or k3 of kl.py; k3 is exp(d) - d - 1
The gradient is that of these formulas, so it is 0 where a bound holds: where rho or KL is clipped, and where a
log-ratio, which is clamped so that its exp does not overflow, is beyond +-20 nats. Without a kl_limit a token that the
policy makes very improbable may dominate the KL term: at d = 10 the gradient of k3 is 22,025 * kl_weights_t.
The weights must contain every normalisation of an algorithm (per token, per sequence, LENS's success-rate weights).

On-policy rows: old_logprobs=None, or NaN on a row, means that the row was sampled from the policy being trained. Its
rho is exactly 1 and its gradient is that of old_logprobs = logp.detach(), so no second forward pass is needed.
Sources: LENS, arXiv 2601.21244, eq. 7; PPO, arXiv 1707.06347; dual clip, arXiv 1912.09729; KL in kl.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lens_kernels._backend import apply_outside_graphs
from lens_kernels._checks import check_limits, check_tensor, number_or_per_row, number_or_per_row_or_none
from lens_kernels._crpo import LossTerms
from lens_kernels._objectives import Evaluator, Objective, crpo_evaluator, objective_evaluator, refuse_loss_arguments
from lens_kernels._statistics import row_statistics
from lens_kernels._vocab_parallel import TokenRows
from lens_kernels.kl import KlEstimator
from lens_kernels.logprobs import check_logits_arguments, compute_dlogits, save_rows
from lens_kernels.shard import VocabShard


class PolicyLoss(NamedTuple):
    """The results of the policy losses, all float32; ignored rows are 0. Only `loss` carries a gradient.

    Each is a tensor of its own, which may be edited in place before and after the backward.
    """

    loss: Tensor  # scalar, the sum over rows
    logprobs: Tensor  # [...]
    ratio: Tensor | None  # [...] rho; None with an objective of the caller's own
    clipped: Tensor | None  # [...] 1.0 where a clip (dual clip included) cut the policy gradient to 0; None likewise
    kl: Tensor | None  # [...] KL, at most kl_limit, 0 without reference_logprobs; None likewise
    entropy: Tensor  # [...]


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: TokenRows, evaluate: Evaluator, inplace: bool
    ) -> tuple[Tensor | None, ...]:
        stats = row_statistics(logits, rows, with_entropy=True)
        totals, tokens = evaluate(stats, rows, slice(0, len(rows.token_ids)))
        totals_kept = totals.softmax if tokens.d_entropy is not None else totals.softmax._replace(entropy=None)
        save_rows(ctx, logits, rows, totals_kept, inplace, (tokens.d_logprobs, tokens.d_entropy))
        per_token = (totals.logprobs, tokens.ratio, tokens.clipped, tokens.kl, totals.asked_entropy())
        ctx.mark_non_differentiable(*(x for x in per_token if x is not None))
        ctx.set_materialize_grads(False)
        return tokens.losses.sum(), *per_token

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return compute_dlogits(ctx, upstream=d_loss), None, None, None


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
    kl_estimator: KlEstimator = "k3",
) -> LossTerms:
    """Checks the loss's arguments and broadcasts tensors to rows of `shape`. Raises ValueError."""
    check_limits(clip_low, clip_high, dual_clip, kl_limit, kl_estimator)
    if advantages is None:
        raise ValueError("advantages: got None, need a number or a tensor that broadcasts to the rows")
    if kl_weights is not None:
        check_tensor("reference_logprobs (needed by kl_weights)", reference_logprobs)
    return LossTerms(
        number_or_per_row_or_none("old_logprobs", old_logprobs, shape, device),
        number_or_per_row("advantages", advantages, shape, device),
        number_or_per_row_or_none("reference_logprobs", reference_logprobs, shape, device),
        number_or_per_row_or_none("policy_weights", policy_weights, shape, device),
        number_or_per_row_or_none("kl_weights", kl_weights, shape, device),
        number_or_per_row_or_none("entropy_weights", entropy_weights, shape, device),
        clip_low,
        clip_high,
        dual_clip,
        kl_limit,
        kl_estimator,
    )


def policy_loss(
    logits: Tensor,  # [..., V] float32, bfloat16 or float16; this rank's columns if `shard` is given
    token_ids: Tensor,  # [...] int64 or int32, global ids; negative: ignore the row
    *,
    objective: Objective | None = None,
    old_logprobs: Tensor | None = None,  # [...]; NaN or None: on-policy
    advantages: Tensor
    | float
    | None = None,  # this and the following: a number, or broadcastable to [...]; no gradient
    reference_logprobs: Tensor | None = None,
    policy_weights: Tensor | float | None = None,  # None: 1
    kl_weights: Tensor | float | None = None,  # None: no KL term
    entropy_weights: Tensor | float | None = None,  # None: no entropy term
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,  # > 1
    kl_limit: float | None = None,  # > 0; None: no limit
    kl_estimator: KlEstimator = "k3",
    temperature: Tensor | float = 1.0,
    logit_softcap: float | None = None,  # > 0
    valid_vocab_size: int | None = None,
    shard: VocabShard | None = None,
    inplace_backward: bool = False,
) -> PolicyLoss:
    """Returns the CRPO loss of the module docstring, summed over rows, and its parts per row.

    `objective(logprobs, entropy, part)` replaces the CRPO loss, and advantages, which that loss needs: it gets the
    float32 [T] statistics of all rows under autograd and slice(0, T), and returns the [T] losses to be summed, which
    may depend on several rows each. Its result has ratio, clipped and kl None. Under torch.compile such a call runs
    outside the graph, which holds no function, and which fullgraph=True therefore refuses.
    A row whose old_logprobs is NaN (all rows, if old_logprobs is None) is on-policy: ratio exactly 1, with gradient.
    `kl_limit` bounds the KL estimate from above, in the loss and in the result; above it, the KL term has no gradient.
    Temperature, soft cap, padding, shards, ignored rows and `inplace_backward` are as in token_logprobs.
    The logits and five numbers per row are saved for backward. Forward moves 2 bytes per bf16 element, backward 4.
    On an accelerator there are four launches, backward included, if the terms are numbers or float32 [T].

    Raises ValueError for a wrong shape, dtype, device, temperature, soft cap, clip, limit or estimator, for kl_weights
    without reference_logprobs, and for loss arguments next to an objective; RuntimeError for a second use of the logits
    after inplace_backward.
    """
    rows = check_logits_arguments(
        logits, token_ids, temperature, valid_vocab_size, shard, inplace_backward, logit_softcap
    )
    per_row: dict[str, Any] = {
        **{"old_logprobs": old_logprobs, "advantages": advantages, "reference_logprobs": reference_logprobs},
        **{"policy_weights": policy_weights, "kl_weights": kl_weights, "entropy_weights": entropy_weights},
    }
    if objective is None:
        limits: dict[str, Any] = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
        limits |= {"kl_limit": kl_limit, "kl_estimator": kl_estimator}
        evaluate = crpo_evaluator(check_loss_terms(token_ids.shape, logits.device, **per_row, **limits))
    else:
        refuse_loss_arguments(**per_row)
        evaluate = objective_evaluator(objective)
    apply: Callable[..., Any] = _PolicyLoss.apply
    if objective is not None:
        apply = functools.partial(apply_outside_graphs, _PolicyLoss)
    loss, logprobs, *optional, entropy = apply(logits, rows, evaluate, inplace_backward)
    shape = token_ids.shape
    ratio, clipped, kl = (None if x is None else x.view(shape) for x in optional)
    return PolicyLoss(loss, logprobs.view(shape), ratio, clipped, kl, entropy.view(shape))
