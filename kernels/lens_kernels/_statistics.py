"""Computes the row statistics of a vocabulary shard in one pass over the logits.

The reference comes first, then the kernel, its launcher and the choice between the two.
"""

from __future__ import annotations

from typing import no_type_check

import torch
from torch import Tensor

from lens_kernels._backend import jit, multiprocessors, tl, uses_triton
from lens_kernels._rows import contiguous_layout, row_chunks, row_layout
from lens_kernels._vocab_parallel import (
    LOWEST,
    TokenRows,
    local_targets,
    padding_mask,
)

WARPS = 8
VECTOR_BYTES = 16  # what one thread loads at once
UNROLL = 2  # such loads in flight per thread
WAVES = 4  # programs per multiprocessor below which a row's columns are split among several programs


def row_statistics_reference(
    logits: Tensor,  # [..., V]
    rows: TokenRows,
    with_entropy: bool,
) -> Tensor:  # [1, 3 or 4, T] float32, see _vocab_parallel
    token_ids, tau, _, shard = rows
    columns = logits.shape[-1]
    stats = torch.empty(4 if with_entropy else 3, len(token_ids), dtype=torch.float32, device=logits.device)
    local, owned = local_targets(token_ids, columns, shard)
    padding = padding_mask(columns, shard, logits.device)
    for part, (z,) in row_chunks(logits):
        if padding is not None:
            z = z.masked_fill(padding, -torch.inf)
        top = z.amax(-1).float()
        target = z.gather(1, local[part, None])[:, 0].float()
        shift = top.masked_fill(top == -torch.inf, 0)  # -inf - -inf would be NaN
        x = z - shift[:, None]  # promotes to float32 in the same pass
        if tau is not None:
            x /= tau[part, None]
        weight = x.exp()
        stats[0, part], stats[1, part] = top, weight.sum(-1)
        stats[2, part] = target.masked_fill(~owned[part], -torch.inf)
        if with_entropy:
            stats[3, part] = weight.mul_(x.clamp_(min=LOWEST)).sum(-1)
    return stats[None]


@jit
@no_type_check
def _accumulate(
    z,  # [UNROLL, THREADS, VECTOR]
    top,  # [THREADS] running maximum of z, finite
    sums,  # [THREADS] sum of 2**x, x = (z - top) * scale
    moments,  # [THREADS] sum of 2**x * x
    scale,
    WITH_ENTROPY: tl.constexpr,
):
    new = tl.maximum(top, tl.max(tl.max(z, 2), 0))
    # Both bounds avoid 0 * -inf, a NaN, in the moments.
    shift = tl.maximum((top - new) * scale, -1e30)
    x = (z - new[None, :, None]) * scale
    weights = tl.exp2(x)
    rescale = tl.exp2(shift)
    if WITH_ENTROPY:
        moments = rescale * (moments + shift * sums) + tl.sum(tl.sum(weights * tl.maximum(x, -1e30), 2), 0)
    return new, rescale * sums + tl.sum(tl.sum(weights, 2), 0), moments


@jit
@no_type_check
def _row_statistics_kernel(
    # inputs
    logits_ptr,  # [outer, inner, V]
    ids_ptr,  # [T] int64
    tau_ptr,  # [T] or None
    # output
    stats_ptr,  # [pieces, K, T]
    # shapes
    rows,
    columns,
    start,  # global id of column 0
    valid,  # columns before the padding
    pieces,
    blocks_per_piece,
    inner,
    stride_outer,
    stride_inner,
    stride_column,
    # tunables
    K: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Runs one program per row and piece. Every thread has its own statistics, so the loop needs no barrier."""
    BLOCK: tl.constexpr = UNROLL * THREADS * VECTOR
    row = (tl.program_id(0) // pieces).to(tl.int64)
    piece = tl.program_id(0) % pieces
    token = tl.load(ids_ptr + row)
    scale = 1.4426950408889634  # log2(e) / tau
    if tau_ptr is not None:
        scale = scale / tl.load(tau_ptr + row)
    limit = tl.where(token < 0, 0, valid)  # no column of an ignored row is read
    base = logits_ptr + (row // inner) * stride_outer + (row % inner) * stride_inner

    lane = tl.arange(0, THREADS)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    offsets = tl.arange(0, UNROLL)[:, None, None] * (THREADS * VECTOR) + lane  # [UNROLL, THREADS, VECTOR]
    top = tl.full((THREADS,), -3.4028234663852886e38, tl.float32)
    sums = tl.zeros((THREADS,), tl.float32)
    moments = tl.zeros((THREADS,), tl.float32)
    begin = piece * blocks_per_piece * BLOCK
    end = tl.minimum(begin + blocks_per_piece * BLOCK, limit)
    full = tl.maximum(end - begin, 0) // BLOCK
    for block in range(full):
        column = begin + block * BLOCK + offsets
        z = tl.load(base + column.to(tl.int64) * stride_column).to(tl.float32)
        top, sums, moments = _accumulate(z, top, sums, moments, scale, K == 4)
    column = begin + full * BLOCK + offsets
    if begin + full * BLOCK < end:
        z = tl.load(base + column.to(tl.int64) * stride_column, mask=column < columns, other=-float("inf"))
        z = tl.where(column < end, z.to(tl.float32), -float("inf"))
        top, sums, moments = _accumulate(z, top, sums, moments, scale, K == 4)

    highest = tl.max(top, 0)
    shift = tl.maximum((top - highest) * scale, -1e30)
    rescale = tl.exp2(shift)
    total = tl.sum(rescale * sums, 0)
    local = token - start
    owned = (token >= 0) & (local >= 0) & (local < limit) & (piece == 0)
    target = tl.load(base + local * stride_column, mask=owned, other=-float("inf")).to(tl.float32)
    out = stats_ptr + piece.to(tl.int64) * K * rows + row
    tl.store(out, tl.where(total == 0, -float("inf"), highest))
    tl.store(out + rows, total)
    tl.store(out + 2 * rows, target)
    if K == 4:
        moment = tl.sum(rescale * (moments + shift * sums), 0)
        tl.store(out + 3 * rows, moment * 0.6931471805599453)


def row_statistics_triton(logits: Tensor, rows: TokenRows, with_entropy: bool, split_rows: bool) -> Tensor:
    """Launches the kernel, which reads each element once. Copies leading axes that do not fold into two first."""
    layout = row_layout(logits)
    if layout is None:
        logits = logits.contiguous()
        layout = contiguous_layout(logits)
    count, columns, kinds = len(rows.token_ids), logits.shape[-1], 4 if with_entropy else 3
    vector = VECTOR_BYTES // logits.element_size()
    blocks = -(-columns // (UNROLL * WARPS * 32 * vector))
    wanted = -(-WAVES * multiprocessors(logits.device) // max(1, count)) if split_rows else 1
    blocks_per_piece = -(-blocks // min(blocks, wanted))
    pieces = -(-blocks // blocks_per_piece)
    stats = torch.empty(pieces, kinds, count, dtype=torch.float32, device=logits.device)
    if count:
        _row_statistics_kernel[(count * pieces,)](
            *(logits, rows.token_ids, rows.tau),
            stats,
            *(count, columns, rows.shard.start, rows.shard.valid, pieces, blocks_per_piece, *layout),
            *(kinds, UNROLL, WARPS * 32, vector),
            num_warps=WARPS,
        )
    return stats


def row_statistics(
    logits: Tensor,  # [..., V]
    rows: TokenRows,
    *,
    with_entropy: bool,
    split_rows: bool = True,  # let D exceed 1
) -> Tensor:  # [D, 3 or 4, T] float32, see _vocab_parallel
    if uses_triton(logits.device):
        return row_statistics_triton(logits, rows, with_entropy, split_rows)
    return row_statistics_reference(logits, rows, with_entropy)
