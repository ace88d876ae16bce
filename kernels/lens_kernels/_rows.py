"""Sees [..., V] tensors with any leading axes as rows: in chunks for plain PyTorch, by their strides for kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 17  # elements computed at a time on a CPU: 512 KiB of float32, which its second-level cache holds
CHUNK_ELEMENTS_ACCELERATOR = 1 << 22  # on other devices, where each operation costs a launch
VECTOR_BYTES = 16  # what one thread of a GPU moves at once, from or to an address that it divides


def row_chunks(*tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yields (rows, [n, V] views of each [..., V] tensor), a few rows at a time, without a copy.

    Layouts whose leading axes cannot be merged into one (a transposed [S, B, V]) are cut along their first axis. Under
    torch.compile there is one chunk: the compiler fuses the operations, and a loop would need a graph for every T.
    """
    shape = tensors[0].shape
    rows = shape[:-1].numel()
    flat_or_none = [_flat_view(x) for x in tensors]
    flat = [view for view in flat_or_none if view is not None]
    if len(flat) == len(tensors) and torch.compiler.is_compiling():
        yield slice(0, rows), flat
        return
    if len(flat) == len(tensors):
        elements = CHUNK_ELEMENTS if tensors[0].device.type == "cpu" else CHUNK_ELEMENTS_ACCELERATOR
        step = max(1, elements // shape[-1])
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows)), [x[start : start + step] for x in flat]
        return
    inner = shape[1:-1].numel()
    for i in range(shape[0]):
        for part, views in row_chunks(*(x[i] for x in tensors)):
            yield slice(i * inner + part.start, i * inner + part.stop), views


def _flat_view(x: Tensor) -> Tensor | None:
    with contextlib.suppress(RuntimeError):  # view() raises if it would have to copy
        return x.view(x.shape[:-1].numel(), x.shape[-1])
    return None


class RowLayout(NamedTuple):
    """Where row t of a tensor begins: at (t // inner) * stride_outer + (t % inner) * stride_inner elements."""

    inner: int  # 1 where all leading axes fold into one, which saves the kernels a division
    stride_outer: int
    stride_inner: int


def row_layout(x: Tensor) -> RowLayout | None:
    """Returns where rows begin; None if the leading axes do not fold into two, or the columns are not adjacent."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    axes: list[tuple[int, int]] = []  # (size, stride), folded
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        elif size != 1:
            axes.append((size, stride))
    if len(axes) > 2:
        return None
    if len(axes) == 2:
        (_, stride_outer), (inner, stride_inner) = axes
        return RowLayout(inner, stride_outer, stride_inner)
    return RowLayout(1, axes[0][1] if axes else 0, 0)


def addressable_rows(x: Tensor) -> tuple[Tensor, RowLayout]:
    """Returns x, or a contiguous copy of it where the kernels cannot address its rows, and where its rows begin."""
    layout = row_layout(x)
    return (x.contiguous(), RowLayout(1, x.shape[-1], 0)) if layout is None else (x, layout)


def rows_begin_at_boundaries(x: Tensor) -> bool:
    """Returns whether every row surely begins at an address that VECTOR_BYTES divides; False under torch.compile."""
    vector = VECTOR_BYTES // x.element_size()
    return _misplacement(x) == 0 and all(stride % vector == 0 for stride in _row_strides(x))


def rows_lie_alike(x: Tensor, y: Tensor) -> bool | None:
    """Returns whether each row of x begins as far from a boundary of VECTOR_BYTES as the same row of y.

    Under torch.compile, which hides where tensors begin, None means that all rows do if the first ones do.
    """
    if x.element_size() != y.element_size():
        return False
    vector = VECTOR_BYTES // x.element_size()
    if any((a - b) % vector for a, b in zip(_row_strides(x), _row_strides(y), strict=True)):
        return False
    first, second = _misplacement(x), _misplacement(y)
    return None if first is None or second is None else first == second


def empty_with_rows_like(x: Tensor) -> Tensor:
    """Allocates a tensor like x, of which rows_lie_alike(x, result) is true, with its axes in the same order in memory.

    Strides are those of x, or the smallest that hold the rows and differ from them by whole VECTOR_BYTES.
    """
    vector = VECTOR_BYTES // x.element_size()
    strides = [1] * x.dim()
    extent = x.shape[-1]
    for axis in sorted(range(x.dim() - 1), key=lambda axis: (x.stride(axis), -axis)):
        strides[axis] = extent + (x.stride(axis) - extent) % vector
        extent = strides[axis] * x.shape[axis]
    place = _misplacement(x) or 0
    return x.new_empty(place + extent).as_strided(x.shape, strides, place)


def _row_strides(x: Tensor) -> list[int]:
    return [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]


def _misplacement(x: Tensor) -> int | None:
    """Returns how many elements x begins after a boundary of VECTOR_BYTES; None under torch.compile."""
    if torch.compiler.is_compiling():
        return None
    return x.data_ptr() % VECTOR_BYTES // x.element_size()
