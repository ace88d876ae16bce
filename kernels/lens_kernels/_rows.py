"""Iterates over the rows of [..., V] tensors with any leading axes, without a copy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

CHUNK_ELEMENTS = 1 << 20  # float32 elements held at a time by the plain PyTorch path: 4 MiB


def row_chunks(*tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yields (rows, [n, V] views of each [..., V] tensor), a few rows at a time, without a copy.

    Layouts whose leading axes cannot be merged into one (a transposed [S, B, V]) are cut along their first axis.
    """
    shape = tensors[0].shape
    flat_or_none = [_flat_view(x) for x in tensors]
    flat = [view for view in flat_or_none if view is not None]
    if len(flat) == len(tensors):
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


class RowLayout(NamedTuple):
    """The strides, in elements, of [..., V] seen as [outer, inner, V]."""

    inner: int
    stride_outer: int
    stride_inner: int
    stride_column: int


def row_layout(x: Tensor) -> RowLayout | None:
    """Returns the strides, or None where the leading axes do not fold into two, which no trainer known to us needs."""
    axes: list[tuple[int, int]] = []  # (size, stride), folded
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        elif size != 1:
            axes.append((size, stride))
    if len(axes) > 2:
        return None
    (_, stride_outer), (inner, stride_inner) = [*[(1, 0)] * (2 - len(axes)), *axes]
    return RowLayout(inner, stride_outer, stride_inner, x.stride(-1))


def contiguous_layout(x: Tensor) -> RowLayout:
    """Returns the layout of a contiguous tensor with any leading axes."""
    return RowLayout(x.shape[:-1].numel(), 0, x.shape[-1], 1)
