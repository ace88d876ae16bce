"""Computes the gradient of the logits from two numbers per row, in one pass.

The reference comes first, then the kernel, its launcher and the choice between the two.
"""

from __future__ import annotations

from typing import no_type_check

import torch
from torch import Tensor

from lens_kernels._backend import jit, tl, uses_triton
from lens_kernels._rows import RowLayout, row_chunks, row_layout
from lens_kernels._vocab_parallel import (
    LOWEST,
    SoftmaxTotals,
    TokenRows,
    local_targets,
    padding_mask,
)

WARPS = 8
BLOCK = 4096  # columns per program


def write_dlogits_reference(
    out: Tensor,  # [..., V], may be the logits themselves
    logits: Tensor,  # [..., V]
    rows: TokenRows,
    totals: SoftmaxTotals,
    d_logprobs: Tensor,  # [T] g
    d_entropy: Tensor | None,  # [T] e
) -> None:
    token_ids, tau, _, shard = rows
    columns = logits.shape[-1]
    local, owned = local_targets(token_ids, columns, shard)
    padding = padding_mask(columns, shard, logits.device)
    at_target = d_logprobs * owned
    for part, (z, d) in row_chunks(logits, out):
        if padding is not None:
            z = z.masked_fill(padding, -torch.inf)
        logp = z - totals.maximum[part, None]
        if tau is not None:
            logp /= tau[part, None]
        logp -= totals.log_sum[part, None]
        p = logp.exp()
        if d_entropy is None:
            grad = p.mul_(-d_logprobs[part, None])
        else:
            # -p * (g + e * (log p + H)). LOWEST replaces -inf, as 0 * -inf is NaN. p before e avoids overflow.
            logp.clamp_(min=LOWEST).add_(totals.asked_entropy()[part, None]).mul_(p).mul_(d_entropy[part, None])
            grad = p.mul_(d_logprobs[part, None]).add_(logp).neg_()
        grad.scatter_add_(1, local[part, None], at_target[part, None])
        if tau is not None:
            grad /= tau[part, None]
        d.copy_(grad.masked_fill_((token_ids[part] < 0)[:, None], 0))


@jit
@no_type_check
def _write_dlogits_kernel(
    # inputs
    logits_ptr,  # [outer, inner, V]
    ids_ptr,  # [T] int64
    tau_ptr,  # [T] or None
    maximum_ptr,  # [T]
    log_sum_ptr,  # [T]
    entropy_ptr,  # [T] or None
    d_logprobs_ptr,  # [T]
    d_entropy_ptr,  # [T] or None
    # output
    out_ptr,  # [outer, inner, V]
    # shapes
    columns,
    start,  # global id of column 0
    valid,  # columns before the padding
    pieces,
    blocks_per_piece,
    inner,
    stride_outer,
    stride_inner,
    stride_column,
    out_inner,
    out_stride_outer,
    out_stride_inner,
    out_stride_column,
    # tunables
    PACKS: tl.constexpr,  # out overlaps the logits' bytes, with smaller elements: a program must own whole rows
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // pieces).to(tl.int64)
    token = tl.load(ids_ptr + row)
    inverse_tau = 1.0
    if tau_ptr is not None:
        inverse_tau = 1.0 / tl.load(tau_ptr + row)
    limit = tl.where(token < 0, 0, valid)  # no column of an ignored row is read
    target = (token - start).to(tl.int32)
    maximum, log_sum = tl.load(maximum_ptr + row), tl.load(log_sum_ptr + row)
    d_logprob = tl.load(d_logprobs_ptr + row)
    base = logits_ptr + (row // inner) * stride_outer + (row % inner) * stride_inner
    out = out_ptr + (row // out_inner) * out_stride_outer + (row % out_inner) * out_stride_inner

    begin = (tl.program_id(0) % pieces) * blocks_per_piece * BLOCK
    for block in range(blocks_per_piece):
        column = begin + block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        inside = column < columns
        z = tl.load(base + column.to(tl.int64) * stride_column, mask=inside & (limit > 0), other=-float("inf"))
        if PACKS:
            tl.debug_barrier()  # this block's stores overwrite logits that other threads may not have read yet
        z = tl.where(column < limit, z.to(tl.float32), -float("inf"))
        logp = (z - maximum) * inverse_tau - log_sum
        p = tl.exp2(logp * 1.4426950408889634)
        grad = p * d_logprob
        if d_entropy_ptr is not None:
            # p comes first, because with e first the product may overflow. The bound avoids 0 * -inf, a NaN.
            grad += (p * (tl.maximum(logp, -1e30) + tl.load(entropy_ptr + row))) * tl.load(d_entropy_ptr + row)
        grad = tl.where(column == target, d_logprob - grad, -grad) * inverse_tau
        grad = tl.where(column < limit, grad, 0.0)
        tl.store(out + column.to(tl.int64) * out_stride_column, grad, mask=inside)


def write_dlogits_triton(
    out: Tensor,
    logits: Tensor,
    layouts: tuple[RowLayout, RowLayout],
    rows: TokenRows,
    totals: SoftmaxTotals,
    d_logprobs: Tensor,
    d_entropy: Tensor | None,
) -> None:
    """Launches the kernel, which reads each element and writes its gradient once."""
    count, columns = len(rows.token_ids), logits.shape[-1]
    if not count:
        return
    packs = out.dtype != logits.dtype  # no other case exists; data_ptr() would break torch.compile
    blocks = -(-columns // BLOCK)
    pieces, blocks_per_piece = (1, blocks) if packs else (blocks, 1)
    entropy = None if d_entropy is None else totals.entropy
    _write_dlogits_kernel[(count * pieces,)](
        *(logits, rows.token_ids, rows.tau, totals.maximum, totals.log_sum, entropy),
        *(d_logprobs.contiguous(), None if d_entropy is None else d_entropy.contiguous()),
        out,
        *(columns, rows.shard.start, rows.shard.valid, pieces, blocks_per_piece, *layouts[0], *layouts[1]),
        *(packs, BLOCK),
        num_warps=WARPS,
    )
    if not torch.compiler.is_compiling():  # torch.compile tracks writes itself
        torch.autograd.graph.increment_version(out)  # lets autograd detect a second use of overwritten logits


def write_dlogits(
    out: Tensor,  # [..., V]; the logits, other memory, or smaller elements packed into the logits' rows
    logits: Tensor,  # [..., V]
    rows: TokenRows,
    totals: SoftmaxTotals,
    d_logprobs: Tensor,  # [T] g
    d_entropy: Tensor | None,  # [T] e
) -> None:
    """Writes the gradient of this shard's logits; zeros on ignored rows and padding columns."""
    if uses_triton(logits.device):
        read, written = row_layout(logits), row_layout(out)
        if read is not None and written is not None:
            write_dlogits_triton(out, logits, (read, written), rows, totals, d_logprobs, d_entropy)
            return
    write_dlogits_reference(out, logits, rows, totals, d_logprobs, d_entropy)
