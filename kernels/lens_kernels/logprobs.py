"""Computes log-probabilities (and entropies) of given tokens from logits.

With x = logits / temperature over the valid columns of the whole vocabulary, p = softmax(x), a = token_ids (and logits
replaced by logit_softcap * tanh(logits / logit_softcap) first, where a soft cap is given):
    logprob = log p_a                      entropy = - sum_v p_v log p_v        (0 * -inf = 0)
    d logits_v = (1 / temperature) * (g * ([v = a] - p_v) - e * p_v * (log p_v + entropy))
where g, e are the gradients of the loss by logprob and entropy: the backward needs only two numbers per row, so it
reads the logits once, writes their gradient once, and does not depend on the loss. The two-number form is Fast-LLM's
idea; the packed statistics of a vocabulary shard (one small gather instead of three all-reduces) are
TransformerEngine's.

The order is _statistics.py (a pass over the logits) -> _vocab_parallel.py (merges shards) -> this file -> _dlogits.py.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lens_kernels._backend import uses_triton
from lens_kernels._checks import (
    check_matrix,
    check_softcap,
    check_temperature,
    check_token_ids,
    check_valid_vocab_size,
    require,
)
from lens_kernels._dlogits import write_dlogits
from lens_kernels._rows import empty_with_rows_like
from lens_kernels._statistics import row_statistics
from lens_kernels._vocab_parallel import SoftmaxTotals, TokenRows, merge_statistics, resolve_shard
from lens_kernels.shard import VocabShard

_Derivatives = tuple[Tensor | None, Tensor | None]
"""Those of a loss by the log-probabilities and by the entropies, [T] each."""


def save_rows(
    ctx: Any,
    logits: Tensor,
    rows: TokenRows,
    totals: SoftmaxTotals,
    inplace: bool,
    derivatives: _Derivatives = (None, None),  # if the forward knows them
) -> None:
    """Saves the logits and a few numbers per row, which compute_dlogits needs."""
    ctx.save_for_backward(logits, rows.token_ids, rows.tau, *totals, *derivatives)
    ctx.softcap, ctx.shard, ctx.inplace = rows.softcap, rows.shard, inplace


def compute_dlogits(
    ctx: Any,  # that save_rows has filled
    derivatives: _Derivatives | None = None,  # None: those that were saved
    upstream: Tensor | None = None,  # scalar that multiplies them; None: 1
) -> Tensor:
    """Computes the gradient of the logits, the backward that the losses from logits share."""
    try:
        logits, token_ids, tau, maximum, log_sum, entropy, *saved = ctx.saved_tensors
    except RuntimeError as error:
        if not ctx.inplace:
            raise
        raise RuntimeError(
            "inplace_backward=True: the logits were changed after the forward or already used up by a backward. Their "
            "storage receives the gradient, so they allow one backward and no other use; pass inplace_backward=False"
        ) from error
    d_logprobs, d_entropy = saved if derivatives is None else derivatives
    rows = TokenRows(token_ids, tau, ctx.softcap, ctx.shard)
    logits = logits.detach()
    empty = empty_with_rows_like if uses_triton(logits.device) else torch.empty_like
    out = logits if ctx.inplace else empty(logits)
    totals = SoftmaxTotals(maximum, log_sum, entropy)
    write_dlogits(out, logits, rows, totals, zeros_for_none(d_logprobs, d_entropy), d_entropy, upstream)
    return out


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        rows: TokenRows,
        return_entropy: bool,
        inplace: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        stats = row_statistics(logits, rows, with_entropy=return_entropy)
        totals = merge_statistics(stats, rows)
        save_rows(ctx, logits, rows, totals.softmax, inplace)
        ctx.set_materialize_grads(False)
        # No result is None, because torch.compile has no gradient for it.
        return (totals.logprobs, totals.asked_entropy()) if return_entropy else totals.logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return compute_dlogits(ctx, (d_logprobs, d_entropy)), None, None, None


def zeros_for_none(d_logprobs: Tensor | None, d_entropy: Tensor | None) -> Tensor:
    """Returns the gradient [T] by the log-probabilities, zeros where the loss used the entropies alone."""
    if d_logprobs is not None:
        return d_logprobs
    if d_entropy is None:
        raise RuntimeError("backward: got no gradient at all, need one of log-probabilities or entropies")
    return torch.zeros_like(d_entropy)


def shape_results(results: Tensor | tuple[Tensor, Tensor], shape: torch.Size) -> Tensor | tuple[Tensor, Tensor]:
    """Returns log-probabilities [T], or those and entropies, in the shape of the token ids."""
    return results.view(shape) if isinstance(results, Tensor) else (results[0].view(shape), results[1].view(shape))


def check_logits_arguments(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor | float,
    valid_vocab_size: int | None,
    shard: VocabShard | None,
    inplace: bool,
    logit_softcap: float | None = None,
) -> TokenRows:
    """Checks the arguments that all functions of logits share, and returns what they ask of each row."""
    check_matrix("logits", logits, "V")
    ids = check_token_ids(token_ids, logits.shape[:-1], logits.device)
    check_valid_vocab_size(valid_vocab_size)
    if inplace:
        shared = any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True))
        require(not shared, "logits", f"strides {logits.stride()}", "no expanded axis with inplace_backward=True")
    tau = check_temperature(temperature, logits.shape[:-1], logits.device)
    check_softcap(logit_softcap)
    softcap = None if logit_softcap is None else float(logit_softcap)
    return TokenRows(ids, tau, softcap, resolve_shard(logits.shape[-1], ids, valid_vocab_size, shard))


@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: Tensor | float = ...,
    logit_softcap: float | None = ...,
    return_entropy: Literal[False] = ...,
    valid_vocab_size: int | None = ...,
    shard: VocabShard | None = ...,
    inplace_backward: bool = ...,
) -> Tensor: ...


@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: Tensor | float = ...,
    logit_softcap: float | None = ...,
    return_entropy: Literal[True],
    valid_vocab_size: int | None = ...,
    shard: VocabShard | None = ...,
    inplace_backward: bool = ...,
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(
    logits: Tensor,  # [..., V] float32, bfloat16 or float16; this rank's columns if `shard` is given
    token_ids: Tensor,  # [...] int64 or int32, global ids; negative: ignore the row
    *,
    temperature: Tensor | float = 1.0,  # number > 0, or a tensor that broadcasts to the rows
    logit_softcap: float | None = None,  # > 0, as Gemma 2 has it; None: logits as they are
    return_entropy: bool = False,
    valid_vocab_size: int | None = None,  # columns from here on are padding; with a shard, its `total` says so
    shard: VocabShard | None = None,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # [...] float32, or (logprobs, entropy)
    """Returns the log-probability of each row's token, and on request each row's entropy in nats; both differentiable.

    The result equals the following, without its float32 copy of the logits:
        `F.log_softmax(logits.float() / temperature, -1).gather(-1, token_ids[..., None])[..., 0]`
    A `logit_softcap` c replaces the logits by c * tanh(logits / c), before the temperature; the gradient is by the
    logits given. The results are tensors of their own, which may be edited in place.
    Ignored rows give 0 and get gradient 0. A token outside the vocabulary has log-probability -inf (set
    LENS_KERNELS_CHECK_IDS=1 to have it refused); a row without a finite logit gives NaN, as in PyTorch.

    With a `shard`, every rank of its group gets the same result, and the backward needs no communication because each
    rank writes its own columns.
    `inplace_backward` writes the gradient over the logits: this avoids a second vocabulary-sized tensor, but the logits
    then allow one backward and no other use (RuntimeError on a second one).
    The logits and three numbers per row are saved for backward. Forward moves 2 bytes per bf16 element, backward 4. The
    gradient's rows lie in memory as the logits' rows do, so that kernels move 16 bytes of both at a time.

    Raises ValueError for a wrong shape, dtype, device, temperature, soft cap or vocabulary size.
    """
    rows = check_logits_arguments(
        logits, token_ids, temperature, valid_vocab_size, shard, inplace_backward, logit_softcap
    )
    results = _TokenLogprobs.apply(logits, rows, return_entropy, inplace_backward)
    return shape_results(results, token_ids.shape)
