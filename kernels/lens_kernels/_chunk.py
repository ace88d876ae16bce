"""Takes one chunk of rows through the LM head: its statistics first, then the gradient of its logits.

There are two paths. `chunks` forms the chunk's float32 logits [n, V] as a whole, and overwrites them with their
gradient. `tiles` forms a few columns at a time and keeps only their exponentials (_tiles.py, _tile_gradient.py); a pass
that wants no gradient keeps nothing, so that its memory does not grow with the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lens_kernels import _tiles
from lens_kernels._dlogits import write_dlogits
from lens_kernels._head import Chunk, HeadPlan, Operands, gradient_dtype, largest_chunk
from lens_kernels._products import multiply_logits
from lens_kernels._statistics import row_statistics
from lens_kernels._tile_gradient import ScaledGradient, tile_gradient
from lens_kernels._tiles import TileSums, update_tile
from lens_kernels._vocab_parallel import SoftmaxTotals


class Buffers(NamedTuple):
    """Memory that every chunk uses anew."""

    logits: Tensor  # float32 [rows, V], or [rows, TILE_COLUMNS] of a tile
    exponentials: Tensor | None  # [rows, whole tiles] of the gradient's dtype, of `tiles` with a gradient
    slopes: Tensor | None  # likewise, where a soft cap has any


class Projection(NamedTuple):
    """A chunk after the products that form its logits."""

    stats: Tensor  # [1, 3 or 4, n] float32, see _vocab_parallel
    logits: Tensor | None  # [n, V] float32, of `chunks`
    sums: TileSums | None  # of `tiles`


def allocate(plan: HeadPlan, operands: Operands, *, with_gradient: bool) -> Buffers:
    """Allocates the buffers of a pass over all chunks."""
    rows, columns, device = largest_chunk(plan), operands.columns, operands.hidden.device
    if plan.path == "chunks":
        return Buffers(torch.empty(rows, columns, dtype=torch.float32, device=device), None, None)
    width = _tiles.TILE_COLUMNS
    tile = torch.empty(rows, width, dtype=torch.float32, device=device)
    if not with_gradient:
        return Buffers(tile, None, None)
    padded = -(-columns // width) * width
    exponentials = torch.empty(rows, padded, dtype=gradient_dtype(plan, device), device=device)
    return Buffers(tile, exponentials, None if plan.tokens.softcap is None else torch.empty_like(exponentials))


def project(plan: HeadPlan, operands: Operands, chunk: Chunk, buffers: Buffers, *, with_entropy: bool) -> Projection:
    """Forms a chunk's logits and returns their statistics, with what its gradient needs."""
    if plan.path == "tiles":
        return _project_tiles(operands, chunk, buffers, with_entropy)
    logits = _logits(operands, chunk, slice(0, operands.columns), buffers.logits)
    stats = row_statistics(logits, chunk.tokens, with_entropy=with_entropy, split_rows=False)
    return Projection(stats, logits, None)


def _project_tiles(operands: Operands, chunk: Chunk, buffers: Buffers, with_entropy: bool) -> Projection:
    count, device = len(chunk.hidden), buffers.logits.device
    exponentials, slopes = (None if kept is None else kept[:count] for kept in buffers[1:])
    stats = torch.empty(1, 4 if with_entropy else 3, count, dtype=torch.float32, device=device)
    anchor = torch.empty(2, count, dtype=torch.float32, device=device)
    sums = TileSums(stats[0], anchor, exponentials, slopes)
    for start in range(0, operands.columns, _tiles.TILE_COLUMNS):
        columns = slice(start, min(start + _tiles.TILE_COLUMNS, operands.columns))
        update_tile(_logits(operands, chunk, columns, buffers.logits), start, chunk.tokens, sums)
    return Projection(stats, None, sums)


def _logits(operands: Operands, chunk: Chunk, columns: slice, buffer: Tensor) -> Tensor:
    """Writes logits [n, columns] into the first columns of the buffer's first rows."""
    out = buffer[: len(chunk.hidden), : columns.stop - columns.start]
    multiply_logits(chunk.factors, tuple(part[columns] for part in operands.weight), out)
    if operands.bias is not None:
        out += operands.bias[columns]
    return out


def logits_gradient(
    plan: HeadPlan,
    projection: Projection,
    columns: int,  # V
    chunk: Chunk,
    totals: SoftmaxTotals,  # [n]
    d_logprobs: Tensor,  # [n] g
    d_entropy: Tensor | None,  # [n] e
) -> ScaledGradient:
    """Returns the gradient of a chunk's logits, in place of what the projection held."""
    if projection.sums is not None:
        return tile_gradient(projection.sums, columns, chunk.tokens, totals, d_logprobs, d_entropy)
    if projection.logits is None:
        raise RuntimeError("projection: got neither logits nor sums of tiles, need the result of project()")
    out = gradient_buffer(projection.logits, gradient_dtype(plan, d_logprobs.device))
    write_dlogits(out, projection.logits, chunk.tokens, totals, d_logprobs, d_entropy)
    return ScaledGradient(out, None)


def gradient_buffer(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns [n, V] in the storage of float32 `logits`: bfloat16 rows fill half of it."""
    return logits if dtype == torch.float32 else logits.view(dtype)[:, : logits.shape[1]]
