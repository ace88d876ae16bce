"""Turns the exponentials of _tiles.py into the gradient of the logits, up to one factor per row.

With E, r and f of _tiles.py, p = c * E for c = exp((r - maximum) / tau - f * ln 2 - log_sum). So with g and e, the
gradients of the loss by log-probability and entropy, and z the logit of which the log-probability is taken:
    d logits = factor * D      factor = -g * c / tau      D = E,                                   (p_a - 1) / c at a
    with an entropy or softcap term:
                               factor = -c / tau          D = E * (g + e * (log p + entropy)) * u, less g * u / c at a
where a is the row's token and u the slope of the cap, which _tiles.py kept beside E. The first form touches one element
of a row, the second takes a pass over the exponentials. The element at the token comes from its unrounded logit.

c is kept above 2**-80, so that 1 / c and the product of `factor` and the hidden states stay within bfloat16. A rank
whose logits all lie far below another's has a smaller c: its exponentials are multiplied by 2**-60 first, and what is
smaller still counts for nothing.

The reference comes first, then the kernel, its launcher and the choice between the two.
"""

from __future__ import annotations

import math
from typing import NamedTuple, no_type_check

import torch
from torch import Tensor

from lens_kernels import _tiles
from lens_kernels._backend import jit, launch, tl, uses_triton
from lens_kernels._kernel_parts import exp_accurate
from lens_kernels._tiles import TileSums
from lens_kernels._vocab_parallel import SoftmaxTotals, TokenRows

LOWEST_EXPONENT = -80.0  # of c
DROP = 60.0  # powers of two by which the exponentials of a row with a smaller c are lowered
WARPS = 4


class ScaledGradient(NamedTuple):
    """The gradient of a chunk's logits: factor[:, None] * matrix."""

    matrix: Tensor  # [n, V] float32 or bfloat16
    factor: Tensor | None  # [n] float32; None: 1


def tile_gradient_reference(
    sums: TileSums,  # whose exponentials become D
    columns: int,
    rows: TokenRows,
    totals: SoftmaxTotals,
    d_logprobs: Tensor,  # [n]
    d_entropy: Tensor | None,  # [n]
) -> ScaledGradient:
    token_ids, tau, _, shard = rows
    out = _exponentials(sums)[:, :columns]
    local = token_ids - shard.start
    owned = (token_ids >= 0) & (local >= 0) & (local < shard.valid)
    local = local.clamp(0, columns - 1)
    inverse_tau = torch.ones_like(d_logprobs) if tau is None else 1 / tau
    anchor = sums.anchor[0].masked_fill(sums.anchor[0] == -torch.inf, 0)
    exponent = ((anchor - totals.maximum) * inverse_tau - totals.log_sum) * math.log2(math.e) - sums.anchor[1]
    empty = (sums.anchor[0] == -torch.inf) | (token_ids < 0)
    exponent = exponent.masked_fill(empty, 0)
    drop = torch.where(exponent < LOWEST_EXPONENT, DROP, 0.0)
    if drop.any():
        out.mul_(torch.exp2(-drop)[:, None])
    exponent = (exponent + drop).clamp(min=LOWEST_EXPONENT)
    c = exponent.exp2()
    z = sums.stats[2].masked_fill(~owned, 0)
    logp = ((z - totals.maximum) * inverse_tau - totals.log_sum).masked_fill(~owned, 0)
    if d_entropy is None and sums.slopes is None:
        at_target, factor = torch.expm1(logp) / c, -d_logprobs * c * inverse_tau
    else:
        slope, slope_at_target = d_logprobs[:, None], d_logprobs * torch.expm1(logp)
        if d_entropy is not None:
            entropy = totals.asked_entropy()
            logs = (out.float().log2() + exponent[:, None]) * math.log(2) + entropy[:, None]
            slope = slope + d_entropy[:, None] * logs
            slope_at_target = slope_at_target + d_entropy * (logp + entropy) * logp.exp()
        if sums.slopes is not None:
            of_cap = sums.slopes[:, :columns].float()
            slope, slope_at_target = slope * of_cap, slope_at_target * of_cap.gather(1, local[:, None])[:, 0]
        out.copy_(torch.where(out == 0, 0, out * slope))
        at_target, factor = slope_at_target / c, -c * inverse_tau
    current = out.gather(1, local[:, None])[:, 0]
    out.scatter_(1, local[:, None], torch.where(owned, at_target.to(out.dtype), current)[:, None])
    return ScaledGradient(out, factor.masked_fill(empty, 0))


@jit
@no_type_check
def _tile_gradient_kernel(
    # updated
    out_ptr,  # [n, tiles * BLOCK]
    # inputs, [n] but for the first
    slopes_ptr,  # [n, tiles * BLOCK], with the strides of `out`; or None
    ids_ptr,
    tau_ptr,  # or None
    maximum_ptr,
    log_sum_ptr,
    entropy_ptr,  # or None
    logit_ptr,  # the target's
    anchor_ptr,  # [2, n]
    d_logprobs_ptr,
    d_entropy_ptr,  # or None
    # output
    factor_ptr,  # [n]
    # shapes
    stride_out,
    stride_anchor,
    tiles,
    start,  # global id of column 0
    valid,  # columns before the padding
    # constants
    LOWEST_EXPONENT: tl.constexpr,
    DROP: tl.constexpr,
    LOWERED: tl.constexpr,  # 2**-DROP
    PASS: tl.constexpr,  # there is an entropy term or a softcap
    # tunables
    BLOCK: tl.constexpr,
):
    """Runs one program per row."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(ids_ptr + row)
    inverse_tau = 1.0
    if tau_ptr is not None:
        inverse_tau = 1.0 / tl.load(tau_ptr + row)
    maximum, log_sum = tl.load(maximum_ptr + row), tl.load(log_sum_ptr + row)
    reference, fraction = tl.load(anchor_ptr + row), tl.load(anchor_ptr + stride_anchor + row)
    d_logprob = tl.load(d_logprobs_ptr + row)
    empty = (token < 0) | (reference == -float("inf"))
    reference = tl.where(empty, 0.0, reference)
    exponent = ((reference - maximum) * inverse_tau - log_sum) * 1.4426950408889634 - fraction
    exponent = tl.where(empty, 0.0, exponent)
    column = tl.arange(0, BLOCK)
    out = out_ptr + row * stride_out
    if exponent < LOWEST_EXPONENT:
        for tile in range(tiles):
            at = out + tile * BLOCK + column
            tl.store(at, tl.load(at).to(tl.float32) * LOWERED)
        exponent += DROP
    exponent = tl.maximum(exponent, LOWEST_EXPONENT)
    c = tl.exp2(exponent)
    local = token - start
    owned = (token >= 0) & (local >= 0) & (local < valid)
    z = tl.load(logit_ptr + row, mask=owned, other=0.0)
    logp = tl.where(owned, (z - maximum) * inverse_tau - log_sum, 0.0)
    p = exp_accurate(tl.maximum(logp, -80.0))
    at_target = d_logprob * (p - 1.0)
    factor = -c * inverse_tau
    if PASS:
        if d_entropy_ptr is not None:
            d_entropy, entropy = tl.load(d_entropy_ptr + row), tl.load(entropy_ptr + row)
            at_target += d_entropy * (tl.maximum(logp, -1e30) + entropy) * p
        if slopes_ptr is not None:
            at_target *= tl.load(slopes_ptr + row * stride_out + local, mask=owned, other=0.0).to(tl.float32)
        for tile in range(tiles):
            at = out + tile * BLOCK + column
            e = tl.load(at).to(tl.float32)
            slope = d_logprob
            if d_entropy_ptr is not None:
                log2_e = tl.log2(tl.maximum(e, 1.2e-38))
                slope += d_entropy * ((log2_e + exponent) * 0.6931471805599453 + entropy)
            if slopes_ptr is not None:
                slope *= tl.load(slopes_ptr + row * stride_out + tile * BLOCK + column).to(tl.float32)
            tl.store(at, e * slope)
    else:
        at_target = p - 1.0
        factor *= d_logprob
    tl.debug_barrier()  # another thread may have written the token's column
    tl.store(factor_ptr + row, tl.where(empty, 0.0, factor))
    tl.store(out + local, at_target / c, mask=owned)


def tile_gradient_triton(
    sums: TileSums,
    columns: int,
    rows: TokenRows,
    totals: SoftmaxTotals,
    d_logprobs: Tensor,
    d_entropy: Tensor | None,
) -> ScaledGradient:
    """Launches the kernel."""
    out, count, tiles = _exponentials(sums), len(rows.token_ids), -(-columns // _tiles.TILE_COLUMNS)
    factor = torch.empty(count, dtype=torch.float32, device=out.device)
    launch(
        *(_tile_gradient_kernel, count, out.device),
        *(out, sums.slopes),
        *(rows.token_ids, rows.tau, totals.maximum, totals.log_sum, None if d_entropy is None else totals.entropy),
        *(sums.stats[2], sums.anchor, d_logprobs.contiguous()),
        None if d_entropy is None else d_entropy.contiguous(),
        factor,
        *(out.stride(0), sums.anchor.stride(0), tiles, rows.shard.start, rows.shard.valid),
        *(LOWEST_EXPONENT, DROP, 2.0**-DROP, d_entropy is not None or sums.slopes is not None),
        _tiles.TILE_COLUMNS,
        warps=WARPS,
    )
    return ScaledGradient(out[:, :columns], factor)


def _exponentials(sums: TileSums) -> Tensor:
    if sums.exponentials is None:
        raise RuntimeError("exponentials: got None, need tiles that were updated with a buffer for them")
    return sums.exponentials


def tile_gradient(
    sums: TileSums,  # whose exponentials become the result's matrix
    columns: int,  # V, the columns that there are in whole tiles
    rows: TokenRows,
    totals: SoftmaxTotals,
    d_logprobs: Tensor,  # [n] g
    d_entropy: Tensor | None,  # [n] e
) -> ScaledGradient:
    """Returns the gradient of this shard's logits; zeros on ignored rows and padding columns."""
    gradient = tile_gradient_triton if uses_triton(d_logprobs.device) else tile_gradient_reference
    return gradient(sums, columns, rows, totals, d_logprobs, d_entropy)
