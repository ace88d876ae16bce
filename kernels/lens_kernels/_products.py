"""Multiplies the LM head's matrices: the logits and both gradients, with float32 sums whatever the factors' dtype is.

A float32 factor may be split into bfloat16 parts, x = x0 + x1 + x2 + ..., each the rounded rest of those before it. Two
parts have 16 significant bits, three have 24. Of the products x_i @ y_j those with i + j below the number of parts are
added, the smallest first: the others are smaller than the error of the split itself. Source: arXiv 1904.06376.

On a GPU half-precision factors are multiplied as they are, on tensor cores. Elsewhere they are turned to float32 a
block at a time, so that every product is exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lens_kernels._checks import require

PrecisionName = Literal["auto", "bfloat16", "bfloat16x2", "bfloat16x3", "float32"]
_PRECISIONS = get_args(PrecisionName)  # here, because torch.compile cannot look into typing
BLOCK_ELEMENTS = 1 << 26  # elements of a factor that are turned to another dtype at a time on a GPU: 128 MiB
BLOCK_ELEMENTS_CPU = 1 << 22  # 16 MiB in float32
TOTAL_BLOCK_ROWS = 1 << 13  # rows of a float32 total whose addend is formed apart where cuBLAS cannot add in place

Parts = tuple[Tensor, ...]
"""The parts of one factor, largest first."""


class Precision(NamedTuple):
    """What the factors of the head's products are."""

    dtype: torch.dtype  # float32, bfloat16 or float16
    parts: int  # of a bfloat16 factor: 1 to 3

    @property
    def is_half(self) -> bool:
        """Whether a factor is one half-precision number, so that the logits' gradient may be rounded to bfloat16."""
        return self.dtype != torch.float32 and self.parts == 1


_NAMED = {
    "bfloat16": Precision(torch.bfloat16, 1),
    "bfloat16x2": Precision(torch.bfloat16, 2),
    "bfloat16x3": Precision(torch.bfloat16, 3),
    "float32": Precision(torch.float32, 1),
}


def _has_autocast(kind: str) -> bool:
    """Returns whether devices of this kind have autocast; the meta device has none.

    In a graph, where no meta device is, the answer is taken for granted: torch 2.11 cannot trace the question.
    """
    return torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)


def resolve_precision(name: str, hidden: Tensor, weight: Tensor) -> Precision:
    """Returns what a `precision` argument stands for. Raises ValueError for an unknown one, and for mixed operands."""
    require(name in _PRECISIONS, "precision", repr(name), f"one of {', '.join(_PRECISIONS)}")
    if name != "auto":
        return _NAMED[name]
    kind = hidden.device.type
    if _has_autocast(kind) and torch.is_autocast_enabled(kind):
        return Precision(torch.get_autocast_dtype(kind), 1)
    need = (
        "one dtype for both, or torch.autocast around the call, or a precision that says what to multiply: "
        "'bfloat16', 'bfloat16x3' (nearly as exact as float32, on tensor cores) or 'float32'"
    )
    same = hidden.dtype == weight.dtype
    require(same, "precision", f"'auto' with hidden {hidden.dtype} and weight {weight.dtype}", need)
    return Precision(hidden.dtype, 1)


def split(x: Tensor, precision: Precision) -> Parts:
    """Returns the parts of a factor of any floating-point dtype. One that bfloat16 holds has one part."""
    if precision.parts == 1 or x.dtype == precision.dtype:
        return (x.to(precision.dtype),)
    rest, parts = x.float(), []
    for _ in range(precision.parts):
        parts.append(rest.to(precision.dtype))
        rest = rest - parts[-1]
    return tuple(parts)


def split_gradient(d_logits: Tensor, precision: Precision) -> Parts:
    """Returns the parts of the logits' gradient [n, V], which is never rounded to fewer bits than it came with."""
    return split(d_logits, precision) if precision.parts > 1 else (d_logits,)


def multiplies_as_is(device: torch.device) -> bool:
    """Returns whether half-precision factors are multiplied as they are."""
    return device.type == "cuda"


def multiply_logits(
    hidden: Parts,  # [n, H]
    weight: Parts,  # [V, H]
    out: Tensor,  # [n, V] float32
) -> None:
    """Writes hidden @ weight.T."""
    for add, h, w in _terms(hidden, weight):
        dtype = _multiplied_dtype(h)
        h = h.to(dtype)
        for columns in _blocks(w, dtype):
            _multiply(h, w[columns].to(dtype).T, out[:, columns], add)


def multiply_d_hidden(
    d_logits: Parts,  # [n, V]
    weight: Parts,  # [V, H]
    out: Tensor,  # [n, H] float32
) -> None:
    """Writes d_logits @ weight. Float16 weights are rounded to the gradient's bfloat16, whose range it needs."""
    for add, d, w in _terms(d_logits, weight):
        dtype = _multiplied_dtype(d)
        for columns in _blocks(w, dtype):
            _multiply(d[:, columns].to(dtype), w[columns].to(dtype), out, add or columns.start > 0)


def multiply_d_weight(
    d_logits: Parts,  # [n, V]
    hidden: Parts,  # [n, H]
    total: Tensor,  # [V, H] float32
    first: bool,
) -> None:
    """Adds d_logits.T @ hidden to `total`, or writes it there if it is the first."""
    for add, d, h in _terms(d_logits, hidden):
        dtype = _multiplied_dtype(d)
        h = h.to(dtype)
        for columns in _blocks(d.T, dtype):
            _multiply(d[:, columns].to(dtype).T, h, total[columns], add or not first)


def _terms(a: Parts, b: Parts) -> Iterator[tuple[bool, Tensor, Tensor]]:
    """Yields (whether something was there before, factor, factor) of each product that counts, the smallest first."""
    parts = max(len(a), len(b))
    pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if i + j < parts]
    for index, (i, j) in enumerate(sorted(pairs, key=sum, reverse=True)):
        yield index > 0, a[i], b[j]


def _multiplied_dtype(factor: Tensor) -> torch.dtype:
    return factor.dtype if multiplies_as_is(factor.device) else torch.float32


def _blocks(factor: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Yields slices of the first axis: all of it, or as much as is turned to `dtype` at a time."""
    rows, step = len(factor), len(factor)
    if factor.dtype != dtype:
        elements = BLOCK_ELEMENTS if multiplies_as_is(factor.device) else BLOCK_ELEMENTS_CPU
        step = max(1, elements // factor.shape[1])
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """Writes a @ b into float32 `out`, or adds it to what is there."""
    if a.dtype == torch.float32:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif not add:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        _add_half(a, b, out)


def _add_half(a: Tensor, b: Tensor, out: Tensor) -> None:
    try:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        # PyTorch 2.8 refuses a float32 total of bfloat16 factors.
        for start in range(0, len(out), TOTAL_BLOCK_ROWS):
            block = slice(start, start + TOTAL_BLOCK_ROWS)
            out[block] += torch.mm(a[block], b, out_dtype=torch.float32)


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Prevents an outer autocast, and the user's leave to round float32 factors, from reaching the products inside."""
    has_autocast = torch.amp.is_autocast_available(device.type)  # False for the meta device
    autocast_off = torch.autocast(device.type, enabled=False) if has_autocast else contextlib.nullcontext()
    with autocast_off, _float32_as_it_is():
        yield


@contextlib.contextmanager
def _float32_as_it_is() -> Iterator[None]:
    """Turns TF32 off, and on a CPU bfloat16 in float32's place; what was allowed is allowed again afterwards."""
    allowed = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set at run time
    before = [getattr(setting, "fp32_precision", None) for setting in allowed]
    if None in before:
        yield from _float32_as_it_is_before_torch_29()
        return
    changed = [(setting, was) for setting, was in zip(allowed, before, strict=True) if was in ("tf32", "bf16")]
    try:
        for setting, _ in changed:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, was in changed:
            setting.fp32_precision = was


def _float32_as_it_is_before_torch_29() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)
