"""Adds a tile of a chunk's logits to the row statistics, and keeps the tile's exponentials for the gradient.

A tile is a float32 product [n, TILE_COLUMNS] in a buffer that every tile of the vocabulary overwrites, so that it can
stay in the GPU's cache. With raw logits z, temperature tau and s = log2(e) / tau, each row has
    statistics   [K, n], as _vocab_parallel has them; the maximum is that of the tiles so far
    anchor       [2, n]: r, the maximum of the first tile that has a finite logit (-inf until then), and f, at first 0
    exponentials [n, V]: E = 2**((z - r) * s + f), at most 2**60, so that the softmax is E times one number per row
    slopes       [n, V]: of the soft cap, where there is one; z is then the capped logit. They cannot be read off E:
                 see _soft_cap.py
A tile whose logits are so high that E would exceed 2**60 becomes the new anchor: r is then its maximum, f a fraction of
1, and the row's earlier exponentials are multiplied by a power of two, which is exact. bfloat16 holds all E: its
exponents are those of float32.

The reference comes first, then the kernel, its launcher and the choice between the two.
"""

from __future__ import annotations

import math
from typing import NamedTuple, no_type_check

import torch
from torch import Tensor

from lens_kernels._backend import jit, launch, tl, uses_triton
from lens_kernels._soft_cap import capped, slope_of_cap, soft_cap, soft_cap_slope
from lens_kernels._vocab_parallel import LOWEST, TokenRows

TILE_COLUMNS = 2048  # a power of two; 32 MiB of logits with 4096 rows
HIGHEST_EXPONENT = 60.0
WARPS = 4


class TileSums(NamedTuple):
    """What the tiles of a chunk have in common; every tile updates it in place."""

    stats: Tensor  # [3 or 4, n] float32
    anchor: Tensor  # [2, n] float32: r and f
    exponentials: Tensor | None  # [n, columns] float32 or bfloat16, whole tiles in a row; None: no gradient is wanted
    slopes: Tensor | None = None  # like the exponentials; None: no soft cap, or no gradient is wanted


def update_tile_reference(
    tile: Tensor,  # [n, columns] float32 logits
    offset: int,  # of the tile's first column among this rank's columns
    rows: TokenRows,
    sums: TileSums,
) -> None:
    token_ids, tau, softcap, shard = rows
    stats, anchor, kept, slopes = sums
    columns = tile.shape[1]
    local = token_ids - shard.start - offset
    owned = (token_ids >= 0) & (local >= 0) & (local < min(columns, shard.valid - offset))
    z = capped(tile, softcap)
    if offset + columns > shard.valid:
        z = z.masked_fill(torch.arange(offset, offset + columns, device=z.device) >= shard.valid, -torch.inf)
    z = z.masked_fill((token_ids < 0)[:, None], -torch.inf)
    if offset == 0:
        stats[0], stats[1:], stats[2], anchor[0], anchor[1] = -torch.inf, 0, -torch.inf, -torch.inf, 0
    stats[2] = torch.where(owned, z.gather(1, local.clamp(0, columns - 1)[:, None])[:, 0], stats[2])
    inverse_tau = torch.ones_like(stats[0]) if tau is None else 1 / tau
    top = torch.maximum(stats[0], z.amax(1))
    shift = top.masked_fill(top == -torch.inf, 0)  # -inf - -inf would be NaN
    x = (z - shift[:, None]) * inverse_tau[:, None]
    weights = x.exp()
    moved = ((stats[0] - shift) * inverse_tau).clamp(min=LOWEST)
    rescale = moved.exp()
    if len(stats) == 4:
        stats[3] = rescale * (stats[3] + moved * stats[1]) + (weights * x.clamp(min=LOWEST)).sum(1)
    stats[0], stats[1] = top, rescale * stats[1] + weights.sum(1)
    if kept is None:
        return
    if slopes is not None and softcap is not None:
        slopes[:, offset : offset + columns] = slope_of_cap(tile, softcap).masked_fill(z == -torch.inf, 0)
    anchor[0] = torch.where(anchor[0] == -torch.inf, top, anchor[0])
    exponent = (top - anchor[0]) * inverse_tau * math.log2(math.e) + anchor[1]
    exponent = exponent.masked_fill(top == -torch.inf, 0)
    moves = exponent > HIGHEST_EXPONENT
    if moves.any():
        power = torch.where(moves, exponent.floor(), 0)
        kept[:, :offset].mul_(torch.exp2(-power)[:, None])
        exponent -= power
        anchor[0], anchor[1] = torch.where(moves, top, anchor[0]), torch.where(moves, exponent, anchor[1])
    kept[:, offset : offset + columns] = weights * torch.exp2(exponent)[:, None]


@jit
@no_type_check
def _update_tile_kernel(
    # inputs
    tile_ptr,  # [n, BLOCK] float32
    ids_ptr,  # [n] int64
    tau_ptr,  # [n] or None
    # updated
    stats_ptr,  # [K, n]
    anchor_ptr,  # [2, n]
    out_ptr,  # [n, tiles * BLOCK] or None
    slopes_ptr,  # likewise
    # shapes
    stride_tile,
    stride_stats,
    stride_anchor,
    stride_out,
    offset,  # columns of the tiles before this one
    start,  # global id of this tile's first column
    valid,  # columns of this tile before the padding
    # constants
    SOFTCAP: tl.constexpr,  # or None
    HIGHEST_EXPONENT: tl.constexpr,
    FIRST: tl.constexpr,
    # tunables
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Runs one program per row, which reads its part of the tile once, into registers."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(ids_ptr + row)
    scale = 1.4426950408889634  # log2(e) / tau
    if tau_ptr is not None:
        scale = scale / tl.load(tau_ptr + row)
    limit = tl.where(token < 0, 0, valid)  # no column of an ignored row is read
    stats, anchor = stats_ptr + row, anchor_ptr + row
    top = -3.4028234663852886e38
    sums, moment, target = 0.0, 0.0, -float("inf")
    if not FIRST:
        top = tl.maximum(tl.load(stats), top)
        sums, target = tl.load(stats + stride_stats), tl.load(stats + 2 * stride_stats)
        if K == 4:
            moment = tl.load(stats + 3 * stride_stats)

    column, base = tl.arange(0, BLOCK), tile_ptr + row * stride_tile
    # The buffer is as wide as a block whatever the tile's width, so that the loads need no mask per column.
    z = tl.load(base + column, mask=limit > 0, other=-float("inf"))
    owned = (token >= start) & (token - start < limit)
    at_target = tl.load(base + (token - start), mask=owned, other=0.0)
    if slopes_ptr is not None:
        slopes = slopes_ptr + row * stride_out + offset + column
        tl.store(slopes, tl.where(column < limit, soft_cap_slope(z, SOFTCAP), 0.0))
    z = tl.where(column < limit, soft_cap(z, SOFTCAP), -float("inf"))
    new = tl.maximum(top, tl.max(z, 0))
    # Both bounds avoid 0 * -inf, a NaN, in the moments.
    shift = tl.maximum((top - new) * scale, -1e30)
    x = (z - new) * scale
    weights = tl.exp2(x)
    rescale = tl.exp2(shift)
    if K == 4:
        within = tl.sum(weights * tl.maximum(x, -1e30), 0)
        moment = rescale * moment + 0.6931471805599453 * (rescale * (shift * sums) + within)
        tl.store(stats + 3 * stride_stats, moment)
    sums = rescale * sums + tl.sum(weights, 0)
    tl.store(stats, tl.where(sums == 0, -float("inf"), new))
    tl.store(stats + stride_stats, sums)
    tl.store(stats + 2 * stride_stats, tl.where(owned, soft_cap(at_target, SOFTCAP), target))

    if out_ptr is not None:
        out = out_ptr + row * stride_out + column
        if FIRST:
            tl.store(out, weights)
            tl.store(anchor, tl.where(sums == 0, -float("inf"), new))
            tl.store(anchor + stride_anchor, 0.0)
        else:
            reference, fraction = tl.load(anchor), tl.load(anchor + stride_anchor)
            reference = tl.where(reference == -float("inf"), new, reference)
            exponent = (new - reference) * scale + fraction
            if exponent > HIGHEST_EXPONENT:
                power = tl.floor(exponent)
                for earlier in range(0, offset, BLOCK):
                    at = out + earlier
                    tl.store(at, tl.load(at).to(tl.float32) * tl.exp2(-power))
                exponent -= power
                reference, fraction = new, exponent
            tl.store(out + offset, weights * tl.exp2(exponent))
            tl.store(anchor, tl.where(sums == 0, -float("inf"), reference))
            tl.store(anchor + stride_anchor, fraction)


def update_tile_triton(tile: Tensor, offset: int, rows: TokenRows, sums: TileSums) -> None:
    """Launches the kernel. `tile` begins a row of a buffer that is TILE_COLUMNS wide, as do the exponentials' tiles."""
    count, columns = tile.shape
    stats, anchor, kept, slopes = sums
    launch(
        *(_update_tile_kernel, count, tile.device),
        *(tile, rows.token_ids, rows.tau),
        *(stats, anchor, kept, slopes),
        *(tile.stride(0), stats.stride(0), anchor.stride(0), 0 if kept is None else kept.stride(0)),
        *(offset, rows.shard.start + offset, min(max(rows.shard.valid - offset, 0), columns)),
        *(rows.softcap, HIGHEST_EXPONENT, offset == 0),
        *(len(stats), TILE_COLUMNS),
        warps=WARPS,
    )


def update_tile(
    tile: Tensor,  # [n, columns] float32, the first columns of a buffer that is TILE_COLUMNS wide
    offset: int,  # of the tile's first column among this rank's columns; tiles come in order, from 0
    rows: TokenRows,
    sums: TileSums,  # updated in place
) -> None:
    """Adds a tile to the statistics and writes its exponentials."""
    update = update_tile_triton if uses_triton(tile.device) else update_tile_reference
    update(tile, offset, rows, sums)
