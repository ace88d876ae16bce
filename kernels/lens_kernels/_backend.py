"""Which code runs: the Triton kernels on accelerators, plain PyTorch elsewhere.

LENS_KERNELS_BACKEND=reference or triton forces one; unset or `auto` goes by the tensors' device. Triton kernels run on
CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1, set before the import): slow, for checking values.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the reference is all there is
    triton = tl = None

from lens_kernels._checks import require

_in_reference: ContextVar[bool] = ContextVar("in_reference", default=False)


def jit(function: Callable) -> Callable:
    """triton.jit, or the plain function where there is no Triton to run it."""
    return function if triton is None else triton.jit(function)


def uses_triton(device: torch.device) -> bool:
    """Whether tensors of `device` go through the Triton kernels."""
    wanted = os.environ.get("LENS_KERNELS_BACKEND") or "auto"
    known = wanted in ("auto", "reference", "triton")
    require(known, "LENS_KERNELS_BACKEND", repr(wanted), "reference, triton or auto")
    if _in_reference.get() or wanted == "reference":
        return False
    if wanted == "auto":
        return triton is not None and device.type == "cuda"
    require(triton is not None, "LENS_KERNELS_BACKEND", "triton", "the package triton, which cannot be imported here")
    runs = device.type != "cpu" or triton.knobs.runtime.interpret
    require(runs, "LENS_KERNELS_BACKEND", "triton with tensors on the CPU", "TRITON_INTERPRET=1 set before the import")
    return True


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, roughly."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def reference_of(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The same operator, signature and autograd included, in plain PyTorch whatever the device."""

    @functools.wraps(operator)
    def reference(*args: Any, **kwargs: Any) -> Any:
        token = _in_reference.set(True)
        try:
            return operator(*args, **kwargs)
        finally:
            _in_reference.reset(token)

    reference.__name__ = reference.__qualname__ = f"{operator.__name__}_reference"
    return reference
