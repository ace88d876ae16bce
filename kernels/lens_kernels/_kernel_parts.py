"""Holds what several kernels share: where rows begin, and an accurate exponential.

Rows move 16 bytes at a time wherever they begin. Kernels with constants VECTOR and EDGES know three kinds:
    EDGES false, VECTOR > 1     every row begins at a 16-byte boundary and has a multiple of VECTOR elements
    EDGES true, VECTOR > 1      a row is `lead` elements, then a body that begins at a boundary, then a remainder; lead
                                and remainder, the edges, have fewer than VECTOR elements each
    EDGES false, VECTOR 1       element by element, where two tensors' rows do not begin alike
"""

from __future__ import annotations

from typing import no_type_check

from lens_kernels._backend import jit, tl


@jit
@no_type_check
def row_start(
    pointer,
    row,
    inner,
    stride_outer,
    stride_inner,
    ALIGNED: tl.constexpr,  # every row begins at a 16-byte boundary
):
    """Returns the address of a row's first element."""
    offset = (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner
    if ALIGNED:
        # The compiler reads the alignment off a product with a constant; division and product cancel in the rows' case.
        VECTOR: tl.constexpr = 128 // pointer.dtype.element_ty.primitive_bitwidth
        offset = offset // VECTOR * VECTOR
    return pointer + offset


@jit
@no_type_check
def elements_before_boundary(pointer):
    """Returns how many elements lie between an address and the next 16-byte boundary."""
    BYTES: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
    return ((16 - pointer.to(tl.int64) % 16) % 16 // BYTES).to(tl.int32)


@jit
@no_type_check
def edge_columns(
    i,  # [n], from 0, n at least 2 * VECTOR
    lead,
    body_end,  # the column after the body
    columns,
    VECTOR: tl.constexpr,
):
    """Returns (column of the i-th edge element [n], whether there is one): first the lead, then the remainder."""
    column = tl.where(i < VECTOR, i, body_end + i - VECTOR)
    return column, (column < columns) & ((i < lead) | (i >= VECTOR))


@jit
@no_type_check
def exp_accurate(x):
    """Computes exp to about 1 ulp for |x| < 80; the hardware's exp2 alone loses a digit where |x| is large."""
    # x = n * ln 2 + r: subtracting n * ln 2 in two parts is exact.
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693145751953125) - n * 1.42860677000e-6
    return tl.exp2(n) * tl.exp2(r * 1.4426950408889634)
