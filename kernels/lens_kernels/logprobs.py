"""Log-probabilities (and entropies) of given tokens, from logits.

With x = logits / temperature over the valid columns of the whole vocabulary, p = softmax(x), a = token_ids:
    logprob = log p_a                      entropy = - sum_v p_v log p_v        (0 * -inf = 0)
    d logits_v = (1 / temperature) * (g * ([v = a] - p_v) - e * p_v * (log p_v + entropy))
where g, e are the gradients of the loss by logprob and entropy: two numbers per row are all the backward needs, so it
reads the logits once, writes their gradient once, and knows no loss. The two-number form is Fast-LLM's idea; the packed
statistics of a vocabulary shard (one small gather instead of three all-reduces) are TransformerEngine's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lens_kernels._checks import check_matrix, check_temperature, check_token_ids, check_valid_vocab_size, require
from lens_kernels._vocab_parallel import (
    LOWEST,
    RowTotals,
    Shard,
    local_targets,
    locate_shard,
    merge_statistics,
    padding_mask,
)

CHUNK_ELEMENTS = 1 << 20  # float32 elements held at a time by the plain PyTorch path: 4 MiB


def row_chunks(*tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yields (rows, [n, V] views of each [..., V] tensor), a few rows at a time and never a copy.

    Layouts whose leading axes cannot be merged into one (a transposed [S, B, V]) are walked along their first axis.
    """
    shape = tensors[0].shape
    flat = [_flat_view(x) for x in tensors]
    if None not in flat:
        step = max(1, CHUNK_ELEMENTS // shape[-1])
        for start in range(0, shape[:-1].numel(), step):
            yield slice(start, min(start + step, shape[:-1].numel())), [x[start : start + step] for x in flat]
        return
    inner = shape[1:-1].numel()
    for i in range(shape[0]):
        for rows, views in row_chunks(*(x[i] for x in tensors)):
            yield slice(i * inner + rows.start, i * inner + rows.stop), views


def _flat_view(x: Tensor) -> Tensor | None:
    with contextlib.suppress(RuntimeError):  # view() raises if it would have to copy
        return x.view(x.shape[:-1].numel(), x.shape[-1])
    return None


def row_statistics_reference(
    logits: Tensor,  # [..., V]
    token_ids: Tensor,  # [T]
    tau: Tensor | None,  # [T]
    shard: Shard,
    with_entropy: bool,
) -> Tensor:  # [3 or 4, T] float32, see _vocab_parallel
    columns = logits.shape[-1]
    stats = torch.empty(4 if with_entropy else 3, len(token_ids), dtype=torch.float32, device=logits.device)
    local, owned = local_targets(token_ids, columns, shard)
    padding = padding_mask(columns, shard, logits.device)
    for rows, (z,) in row_chunks(logits):
        if padding is not None:
            z = z.masked_fill(padding, -torch.inf)
        top = z.amax(-1).float()
        target = z.gather(1, local[rows, None])[:, 0].float()
        shift = top.masked_fill(top == -torch.inf, 0)  # -inf - -inf would be NaN
        x = z - shift[:, None]  # promotes to float32 in the same pass
        if tau is not None:
            x /= tau[rows, None]
        weight = x.exp()
        stats[0, rows], stats[1, rows] = top, weight.sum(-1)
        stats[2, rows] = target.masked_fill(~owned[rows], -torch.inf)
        if with_entropy:
            stats[3, rows] = weight.mul_(x.clamp_(min=LOWEST)).sum(-1)
    return stats


def write_dlogits_reference(
    out: Tensor,  # [..., V], may be the logits themselves
    logits: Tensor,  # [..., V]
    token_ids: Tensor,  # [T]
    tau: Tensor | None,  # [T]
    shard: Shard,
    totals: RowTotals,
    d_logprobs: Tensor,  # [T] g
    d_entropy: Tensor | None,  # [T] e
) -> None:
    """Writes the gradient of this shard's logits; zeros on ignored rows and padding columns."""
    columns = logits.shape[-1]
    local, owned = local_targets(token_ids, columns, shard)
    padding = padding_mask(columns, shard, logits.device)
    at_target = d_logprobs * owned
    for rows, (z, d) in row_chunks(logits, out):
        if padding is not None:
            z = z.masked_fill(padding, -torch.inf)
        logp = z - totals.maximum[rows, None]
        if tau is not None:
            logp /= tau[rows, None]
        logp -= totals.log_sum[rows, None]
        p = logp.exp()
        if d_entropy is None:
            grad = p.mul_(-d_logprobs[rows, None])
        else:
            # -p * (g + e * (log p + H)). LOWEST for -inf: 0 * -inf is NaN. p comes before e: no overflow.
            logp.clamp_(min=LOWEST).add_(totals.entropy[rows, None]).mul_(p).mul_(d_entropy[rows, None])
            grad = p.mul_(d_logprobs[rows, None]).add_(logp).neg_()
        grad.scatter_add_(1, local[rows, None], at_target[rows, None])
        if tau is not None:
            grad /= tau[rows, None]
        d.copy_(grad.masked_fill_((token_ids[rows] < 0)[:, None], 0))


def compute_dlogits(ctx: FunctionCtx, d_logprobs: Tensor, d_entropy: Tensor | None) -> Tensor:
    """Backward shared by the losses from logits; `ctx` was filled by save_rows."""
    try:
        logits, token_ids, tau, *totals = ctx.saved_tensors
    except RuntimeError as error:
        if not ctx.inplace:
            raise
        raise RuntimeError(
            "inplace_backward=True: the logits were changed after the forward or already used up by a backward. Their "
            "storage receives the gradient, so they allow one backward and no other use; pass inplace_backward=False"
        ) from error
    logits = logits.detach()
    out = logits if ctx.inplace else torch.empty_like(logits)
    write_dlogits_reference(out, logits, token_ids, tau, ctx.shard, RowTotals(*totals), d_logprobs, d_entropy)
    return out


def save_rows(
    ctx: FunctionCtx, logits: Tensor, token_ids: Tensor, tau: Tensor | None, shard: Shard, totals: RowTotals
) -> None:
    """Saves what compute_dlogits needs: the logits, and four numbers per row."""
    ctx.save_for_backward(logits, token_ids, tau, *totals)
    ctx.shard = shard


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, token_ids, tau, shard, return_entropy, inplace):
        totals = merge_statistics(
            row_statistics_reference(logits, token_ids, tau, shard, return_entropy), token_ids, tau, shard
        )
        save_rows(ctx, logits, token_ids, tau, shard, totals)
        ctx.inplace = inplace
        ctx.set_materialize_grads(False)
        return totals.logprobs.clone(), None if totals.entropy is None else totals.entropy.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprobs, d_entropy):
        if d_logprobs is None:
            d_logprobs = torch.zeros_like(d_entropy)
        return compute_dlogits(ctx, d_logprobs, d_entropy), None, None, None, None, None


def check_logits_arguments(
    logits: Tensor, token_ids: Tensor, temperature: Tensor | float, valid_vocab_size: int | None, inplace: bool
) -> tuple[Tensor, Tensor | None]:
    """Checks what all functions of logits share; returns (flat token ids, temperature per row)."""
    check_matrix("logits", logits, "V")
    ids = check_token_ids(token_ids, logits.shape[:-1], logits.device)
    check_valid_vocab_size(valid_vocab_size)
    if inplace:
        shared = any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True))
        require(not shared, "logits", f"strides {logits.stride()}", "no expanded axis with inplace_backward=True")
    return ids, check_temperature(temperature, logits.shape[:-1], logits.device)


def token_logprobs(
    logits: Tensor,  # [..., V] float32, bfloat16 or float16; this rank's shard if tp_group is given
    token_ids: Tensor,  # [...] int64 or int32, global ids; negative: ignore the row
    *,
    temperature: Tensor | float = 1.0,  # number > 0, or a tensor that broadcasts to the rows
    return_entropy: bool = False,
    valid_vocab_size: int | None = None,  # global; columns from here on are padding
    tp_group: dist.ProcessGroup | None = None,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # [...] float32, or (logprobs, entropy)
    """Log-probability of each row's token, and on request each row's entropy in nats; both differentiable.

    Equals, without its float32 copy of the logits,
        `F.log_softmax(logits.float() / temperature, -1).gather(-1, token_ids[..., None])[..., 0]`
    Ignored rows give 0 and get gradient 0. A token outside the vocabulary has log-probability -inf (set
    LENS_KERNELS_CHECK_IDS=1 to have it refused); a row without a finite logit gives NaN, as in PyTorch.

    With `tp_group`, shards are in rank order and may be unequal; every rank gets the same result, and the backward
    needs no communication because each rank writes its own columns.
    `inplace_backward` writes the gradient over the logits: no second vocabulary-sized tensor, but the logits then allow
    one backward and no other use (RuntimeError on a second one).
    Saved for backward: the logits and four numbers per row. Bytes per bf16 element: 2 forward, 4 backward.

    Raises ValueError for a wrong shape, dtype, device, temperature or vocabulary size.
    """
    ids, tau = check_logits_arguments(logits, token_ids, temperature, valid_vocab_size, inplace_backward)
    shard = locate_shard(logits.shape[-1], ids, valid_vocab_size, tp_group)
    logprobs, entropy = _TokenLogprobs.apply(logits, ids, tau, shard, return_entropy, inplace_backward)
    logprobs = logprobs.view(token_ids.shape)
    return (logprobs, entropy.view(token_ids.shape)) if return_entropy else logprobs
