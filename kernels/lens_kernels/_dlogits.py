"""Computes the gradient of the logits from two numbers per row, in one pass.

The reference comes first, then the kernel, its launcher and the choice between the two.
"""

from __future__ import annotations

from typing import no_type_check

import torch
from torch import Tensor

from lens_kernels._backend import jit, launch, tl, uses_triton
from lens_kernels._kernel_parts import edge_columns, elements_before_boundary, row_start
from lens_kernels._rows import (
    VECTOR_BYTES,
    addressable_rows,
    row_chunks,
    row_layout,
    rows_begin_at_boundaries,
    rows_lie_alike,
)
from lens_kernels._soft_cap import capped, slope_of_cap, soft_cap, soft_cap_slope
from lens_kernels._vocab_parallel import LOWEST, SoftmaxTotals, TokenRows, local_targets

WARPS = 8
BLOCK = 4096  # columns per program


def write_dlogits_reference(
    out: Tensor,  # [..., V], may be the logits themselves
    logits: Tensor,  # [..., V]
    rows: TokenRows,
    totals: SoftmaxTotals,
    d_logprobs: Tensor,  # [T] g
    d_entropy: Tensor | None,  # [T] e
    upstream: Tensor | None,  # scalar
) -> None:
    token_ids, tau, softcap, shard = rows
    if shard.valid == 0:
        out.zero_()
        return
    if upstream is not None:
        d_logprobs = d_logprobs * upstream
        d_entropy = None if d_entropy is None else d_entropy * upstream
    local, owned = local_targets(token_ids, shard)
    at_target = d_logprobs * owned
    for part, (whole, written) in row_chunks(logits, out):
        z, d = whole[:, : shard.valid], written[:, : shard.valid]
        slope = None
        if softcap is not None:
            raw = z.float()
            slope, z = slope_of_cap(raw, softcap), capped(raw, softcap)
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
        if slope is not None:
            grad *= slope
        d.copy_(grad.masked_fill_((token_ids[part] < 0)[:, None], 0))
        written[:, shard.valid :] = 0


@jit
@no_type_check
def _softmax_gradient(
    z,  # capped
    maximum,
    log_sum,  # in bits, as `scale` and `entropy` are
    scale,
    d_logprob,  # over the temperature, as d_entropy is
    d_entropy,  # per bit
    entropy,
    WITH_ENTROPY: tl.constexpr,
):
    """Returns -p * (g + e * (log p + H)) / tau, what every column gets; the target gets g / tau beside."""
    bits = (z - maximum) * scale - log_sum  # log2 p
    factor = -d_logprob
    if WITH_ENTROPY:
        factor -= d_entropy * (tl.maximum(bits, -200.0) + entropy)  # p is 0 below; the bound avoids 0 * -inf, a NaN
    return tl.exp2(bits) * factor


@jit
@no_type_check
def _write_where(
    z_pointers,  # [n]
    out_pointers,  # [n]
    column,  # [n]
    inside,  # [n] whether the row has this column
    limit,
    target,
    maximum,
    log_sum,
    scale,
    d_logprob,
    d_entropy,
    entropy,
    SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    PACKS: tl.constexpr,
):
    """Writes the gradients of columns among which the target, padding, or columns past the row may be."""
    z = tl.load(z_pointers, mask=inside & (limit > 0), other=0.0).to(tl.float32)
    if PACKS:
        tl.debug_barrier()
    z_capped = tl.where(column < limit, soft_cap(z, SOFTCAP), -float("inf"))
    gradient = _softmax_gradient(z_capped, maximum, log_sum, scale, d_logprob, d_entropy, entropy, WITH_ENTROPY)
    gradient = tl.where(column == target, gradient + d_logprob, gradient)
    if SOFTCAP is not None:
        gradient *= soft_cap_slope(z, SOFTCAP)
    tl.store(out_pointers, tl.where(column < limit, gradient, 0.0), mask=inside)


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
    upstream_ptr,  # scalar or None
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
    out_inner,
    out_stride_outer,
    out_stride_inner,
    # constants
    SOFTCAP: tl.constexpr,  # or None
    # tunables
    PACKS: tl.constexpr,  # out overlaps the logits' bytes, with smaller elements: a program must own whole rows
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    EDGES: tl.constexpr,  # see _kernel_parts
    ALIKE: tl.constexpr,  # the rows of both surely begin as far from a boundary
):
    """Runs one program per row and piece. Blocks before the padding and without the target take no comparison."""
    row, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    token = tl.load(ids_ptr + row)
    limit = tl.where(token < 0, 0, valid)  # no column of an ignored row is read
    target = (token - start).to(tl.int32)
    factor = 1.0
    if tau_ptr is not None:
        factor = 1.0 / tl.load(tau_ptr + row)
    scale = factor * 1.4426950408889634
    maximum, log_sum = tl.load(maximum_ptr + row), tl.load(log_sum_ptr + row) * 1.4426950408889634
    if upstream_ptr is not None:
        factor *= tl.load(upstream_ptr)
    d_logprob, d_entropy, entropy = tl.load(d_logprobs_ptr + row) * factor, 0.0, 0.0
    WITH_ENTROPY: tl.constexpr = d_entropy_ptr is not None
    if WITH_ENTROPY:
        d_entropy = tl.load(d_entropy_ptr + row) * factor * 0.6931471805599453
        entropy = tl.load(entropy_ptr + row) * 1.4426950408889634

    ALIGNED: tl.constexpr = (VECTOR > 1) and (not EDGES)
    base = row_start(logits_ptr, row, inner, stride_outer, stride_inner, ALIGNED)
    out_base = row_start(out_ptr, row, out_inner, out_stride_outer, out_stride_inner, ALIGNED)
    lead, body, out_body, length = 0, base, out_base, columns // VECTOR * VECTOR
    if EDGES:
        lead = elements_before_boundary(out_base)
        body, out_body = tl.multiple_of(base + lead, 16), tl.multiple_of(out_base + lead, 16)
        length = tl.maximum(columns - lead, 0) // VECTOR * VECTOR
    for block in range(blocks_per_piece):
        begin = (piece * blocks_per_piece + block) * BLOCK
        offset = begin + tl.arange(0, BLOCK)  # [BLOCK], from the body's begin
        first, last = lead + begin, lead + begin + BLOCK
        plain = (last <= limit) & (begin + BLOCK <= length) & ((target < first) | (target >= last))
        if not ALIKE:
            plain = plain & (elements_before_boundary(base) == lead)
        if plain:
            z = tl.load(body + offset).to(tl.float32)
            if PACKS:
                tl.debug_barrier()  # this block's stores overwrite logits that other threads may not have read yet
            gradient = _softmax_gradient(
                soft_cap(z, SOFTCAP), maximum, log_sum, scale, d_logprob, d_entropy, entropy, WITH_ENTROPY
            )
            if SOFTCAP is not None:
                gradient *= soft_cap_slope(z, SOFTCAP)
            tl.store(out_body + offset, gradient)
        else:
            column, inside = lead + offset, offset < length
            z_pointers, out_pointers = body + offset, out_body + offset
            if not ALIKE:  # one of the bodies may begin between two boundaries, against what the compiler was told
                z_pointers, out_pointers = base + column, out_base + column
            _write_where(
                z_pointers, out_pointers, column, inside, limit, target,
                maximum, log_sum, scale, d_logprob, d_entropy, entropy, SOFTCAP, WITH_ENTROPY, PACKS,
            )  # fmt: skip
    if EDGES:
        if piece == pieces - 1:
            column, is_edge = edge_columns(tl.arange(0, 2 * VECTOR), lead, lead + length, columns, VECTOR)
            _write_where(
                base + column, out_base + column, column, is_edge, limit, target,
                maximum, log_sum, scale, d_logprob, d_entropy, entropy, SOFTCAP, WITH_ENTROPY, PACKS,
            )  # fmt: skip


def _vectors(out: Tensor, logits: Tensor) -> tuple[int, bool, bool]:
    """Returns the kernel's VECTOR, EDGES and ALIKE."""
    vector = VECTOR_BYTES // out.element_size()
    if rows_begin_at_boundaries(out) and rows_begin_at_boundaries(logits):
        return vector, out.shape[-1] % vector != 0, True
    alike = True if out is logits else rows_lie_alike(out, logits)
    return (1, False, True) if alike is False else (vector, True, alike is True)


def write_dlogits_triton(
    out: Tensor,
    logits: Tensor,
    rows: TokenRows,
    totals: SoftmaxTotals,
    d_logprobs: Tensor,
    d_entropy: Tensor | None,
    upstream: Tensor | None,
) -> None:
    """Launches the kernel, which reads each element and writes its gradient once.

    Tensors whose rows it cannot address are copied, `out` after the kernel has filled its copy.
    """
    readable, layout = addressable_rows(logits)
    direct = row_layout(out) is not None
    written, out_layout = addressable_rows(
        out if direct else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    )
    count, columns = len(rows.token_ids), logits.shape[-1]
    packs = out.dtype != logits.dtype  # no other case exists, and addresses cannot be compared under torch.compile
    blocks = -(-columns // BLOCK)
    pieces, blocks_per_piece = (1, blocks) if packs else (blocks, 1)
    entropy = None if d_entropy is None else totals.asked_entropy()
    launch(
        *(_write_dlogits_kernel, count * pieces, logits.device),
        *(readable, rows.token_ids, rows.tau, totals.maximum, totals.log_sum, entropy),
        *(d_logprobs.contiguous(), None if d_entropy is None else d_entropy.contiguous(), upstream),
        written,
        *(columns, rows.shard.start, rows.shard.valid, pieces, blocks_per_piece, *layout, *out_layout),
        rows.softcap,
        *(packs, BLOCK, *_vectors(written, readable)),
        warps=WARPS,
    )
    if not direct:
        out.copy_(written)
    elif not torch.compiler.is_compiling():  # torch.compile tracks writes itself
        torch.autograd.graph.increment_version(out)  # lets autograd detect a second use of overwritten logits


def write_dlogits(
    out: Tensor,  # [..., V]; the logits, other memory, or smaller elements packed into the logits' rows
    logits: Tensor,  # [..., V]
    rows: TokenRows,
    totals: SoftmaxTotals,
    d_logprobs: Tensor,  # [T] g
    d_entropy: Tensor | None,  # [T] e
    upstream: Tensor | None = None,  # scalar that multiplies both; None: 1
) -> None:
    """Writes the gradient of this shard's logits; zeros on ignored rows and padding columns.

    Rows move 16 bytes at a time where those of `out` and the logits lie alike (`rows_lie_alike`) or both begin at
    16-byte boundaries. Buffers of one's own get such rows from `empty_with_rows_like`, or from a row stride that is a
    multiple of 16 bytes.
    """
    write = write_dlogits_triton if uses_triton(logits.device) else write_dlogits_reference
    write(out, logits, rows, totals, d_logprobs, d_entropy, upstream)
