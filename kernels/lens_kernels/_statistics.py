"""Computes the row statistics of a vocabulary shard in one pass over the logits.

The reference comes first, then the kernel, its launcher and the choice between the two.
"""

from __future__ import annotations

from typing import no_type_check

import torch
from torch import Tensor

from lens_kernels._backend import jit, launch, multiprocessors, tl, uses_triton
from lens_kernels._kernel_parts import edge_columns, elements_before_boundary, row_start
from lens_kernels._rows import VECTOR_BYTES, addressable_rows, row_chunks, rows_begin_at_boundaries
from lens_kernels._soft_cap import capped, soft_cap
from lens_kernels._vocab_parallel import LOWEST, TokenRows, local_targets

WARPS = 8
UNROLL = 2  # loads of VECTOR_BYTES in flight per thread
WAVES = 4  # programs per multiprocessor below which a row's columns are split among several programs


def row_statistics_reference(
    logits: Tensor,  # [..., V]
    rows: TokenRows,
    with_entropy: bool,
) -> Tensor:  # [1, 3 or 4, T] float32, see _vocab_parallel
    token_ids, tau, softcap, shard = rows
    stats = torch.empty(4 if with_entropy else 3, len(token_ids), dtype=torch.float32, device=logits.device)
    if shard.valid == 0:
        stats[0], stats[1:], stats[2] = -torch.inf, 0, -torch.inf
        return stats[None]
    local, owned = local_targets(token_ids, shard)
    # Once for all rows: what a chunk does for a few numbers costs the host as much as a pass over its logits.
    at_target = logits.gather(-1, local.view(*logits.shape[:-1], 1)).reshape(-1).float()
    stats[2] = capped(at_target, softcap).masked_fill(~owned, -torch.inf)
    buffers: list[Tensor] | None = None
    for part, (whole,) in row_chunks(logits):
        z = whole[:, : shard.valid]
        if buffers is None:  # of the first chunk, the largest: memory that the cache already holds is used again
            buffers = [torch.empty(z.shape, dtype=torch.float32, device=z.device) for _ in range(1 + with_entropy)]
        x, weights = buffers[0][: len(z)], buffers[-1][: len(z)]
        x.copy_(z)
        if softcap is not None:
            x.div_(softcap).tanh_().mul_(softcap)
        top = x.amax(-1, keepdim=True)
        stats[0, part] = top[:, 0]
        x.sub_(top.clamp(min=LOWEST))  # -inf - -inf would be NaN
        if tau is not None:
            x.div_(tau[part, None])
        torch.exp(x, out=weights)
        stats[1, part] = weights.sum(-1)
        if with_entropy:
            stats[3, part] = weights.mul_(x.clamp_(min=LOWEST)).sum(-1)
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
    start,  # global id of column 0
    valid,  # columns before the padding
    pieces,
    blocks_per_piece,
    inner,
    stride_outer,
    stride_inner,
    # constants
    SOFTCAP: tl.constexpr,  # or None
    # tunables
    K: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    EDGES: tl.constexpr,  # see _kernel_parts
):
    """Runs one program per row and piece. Every thread has its own statistics, so the loop needs no barrier."""
    BLOCK: tl.constexpr = UNROLL * THREADS * VECTOR
    row = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    token = tl.load(ids_ptr + row)
    scale = 1.4426950408889634  # log2(e) / tau
    if tau_ptr is not None:
        scale = scale / tl.load(tau_ptr + row)
    limit = tl.where(token < 0, 0, valid)  # no column of an ignored row is read
    base = row_start(logits_ptr, row, inner, stride_outer, stride_inner, not EDGES)
    top = tl.full((THREADS,), -3.4028234663852886e38, tl.float32)
    sums = tl.zeros((THREADS,), tl.float32)
    moments = tl.zeros((THREADS,), tl.float32)
    body, length = base, limit  # where the row's body begins, and its columns
    if EDGES:
        lead = elements_before_boundary(base)
        body = tl.multiple_of(base + lead, 16)
        length = tl.maximum(limit - lead, 0) // VECTOR * VECTOR
        # Each edge element is its thread's maximum, so that its weight is 1 and its moment 0.
        thread = tl.arange(0, THREADS)
        edge_column, is_edge = edge_columns(thread, lead, lead + length, limit, VECTOR)
        edge = tl.load(base + edge_column, mask=is_edge & (piece == 0), other=-float("inf")).to(tl.float32)
        edge = tl.where(is_edge & (piece == 0), soft_cap(edge, SOFTCAP), -float("inf"))
        top = tl.maximum(top, edge)
        sums = tl.exp2((edge - top) * scale)

    lane = tl.arange(0, THREADS)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    offsets = tl.arange(0, UNROLL)[:, None, None] * (THREADS * VECTOR) + lane  # [UNROLL, THREADS, VECTOR]
    begin = piece * blocks_per_piece * BLOCK
    end = tl.minimum(begin + blocks_per_piece * BLOCK, length)
    full = tl.maximum(end - begin, 0) // BLOCK
    for block in range(full):
        z = tl.load(body + (begin + block * BLOCK + offsets)).to(tl.float32)
        top, sums, moments = _accumulate(soft_cap(z, SOFTCAP), top, sums, moments, scale, K == 4)
    if begin + full * BLOCK < end:
        column = begin + full * BLOCK + offsets
        whole = tl.cdiv(end, VECTOR) * VECTOR  # reads padding columns, but never past the row
        z = tl.load(body + column, mask=column < whole, other=-float("inf")).to(tl.float32)
        z = tl.where(column < end, soft_cap(z, SOFTCAP), -float("inf"))
        top, sums, moments = _accumulate(z, top, sums, moments, scale, K == 4)

    highest = tl.max(top, 0)
    shift = tl.maximum((top - highest) * scale, -1e30)
    rescale = tl.exp2(shift)
    total = tl.sum(rescale * sums, 0)
    local = token - start
    owned = (token >= 0) & (local >= 0) & (local < limit) & (piece == 0)
    target = tl.load(base + local, mask=owned, other=0.0).to(tl.float32)
    out = stats_ptr + piece.to(tl.int64) * K * rows + row
    tl.store(out, tl.where(total == 0, -float("inf"), highest))
    tl.store(out + rows, total)
    tl.store(out + 2 * rows, tl.where(owned, soft_cap(target, SOFTCAP), -float("inf")))
    if K == 4:
        moment = tl.sum(rescale * (moments + shift * sums), 0)
        tl.store(out + 3 * rows, moment * 0.6931471805599453)


def row_statistics_triton(logits: Tensor, rows: TokenRows, with_entropy: bool, split_rows: bool) -> Tensor:
    """Launches the kernel, which reads each element once. Copies logits whose rows it cannot address first."""
    logits, layout = addressable_rows(logits)
    count, columns, kinds = len(rows.token_ids), logits.shape[-1], 4 if with_entropy else 3
    vector = VECTOR_BYTES // logits.element_size()
    edges = columns % vector != 0 or not rows_begin_at_boundaries(logits)
    blocks = -(-columns // (UNROLL * WARPS * 32 * vector))
    wanted = -(-WAVES * multiprocessors(logits.device) // max(1, count)) if split_rows else 1
    blocks_per_piece = -(-blocks // min(blocks, wanted))
    pieces = -(-blocks // blocks_per_piece)
    stats = torch.empty(pieces, kinds, count, dtype=torch.float32, device=logits.device)
    launch(
        *(_row_statistics_kernel, count * pieces, logits.device),
        *(logits, rows.token_ids, rows.tau),
        stats,
        *(count, rows.shard.start, rows.shard.valid, pieces, blocks_per_piece, *layout),
        rows.softcap,
        *(kinds, UNROLL, WARPS * 32, vector, edges),
        warps=WARPS,
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
