"""Chooses the code that runs: the Triton kernels on accelerators, plain PyTorch elsewhere.

LENS_KERNELS_BACKEND=reference or triton forces one; unset or `auto` goes by the tensors' device. Triton kernels run on
CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1, set before the import), which serves to check values only.

Kernels are decorated with `@jit @no_type_check`: Triton compiles their source, which a type checker cannot check. All
of them are launched by `launch`, on the device of their tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # this platform has no Triton, so that only the reference can run
    triton = tl = None

from lens_kernels._checks import require

__all__ = ["apply_outside_graphs", "jit", "launch", "multiprocessors", "tl", "triton", "uses_triton"]


def jit(function: Callable[..., Any]) -> Any:
    """Applies triton.jit, or returns the plain function where Triton is missing."""
    return function if triton is None else triton.jit(function)


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, warps: int = 4) -> None:
    """Runs `programs` programs of a kernel on the device where its tensors lie; none where there is nothing to do."""
    if not programs:
        return
    if device.type == "cuda" and not torch.compiler.is_compiling():
        # Triton launches on the current device, which need not be the one of the tensors; compiled code sets it itself.
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, num_warps=warps)
    else:
        kernel[(programs,)](*arguments, num_warps=warps)


def uses_triton(device: torch.device) -> bool:
    """Returns whether tensors of `device` use the Triton kernels. Raises ValueError for a backend that cannot run."""
    wanted = os.environ.get("LENS_KERNELS_BACKEND") or "auto"
    known = wanted in ("auto", "reference", "triton")
    require(known, "LENS_KERNELS_BACKEND", repr(wanted), "reference, triton or auto")
    if wanted == "reference":
        return False
    if wanted == "auto":
        return triton is not None and device.type == "cuda"
    require(triton is not None, "LENS_KERNELS_BACKEND", "triton", "the package triton, which cannot be imported here")
    runs = device.type != "cpu" or triton.knobs.runtime.interpret
    require(runs, "LENS_KERNELS_BACKEND", "triton with tensors on the CPU", "TRITON_INTERPRET=1 set before the import")
    return True


def apply_outside_graphs(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Returns function.apply(*arguments). Under torch.compile the graph ends before it and another begins after it.

    A graph holds neither an objective of the caller's nor a mark on a weight, so fullgraph=True refuses the call.
    """
    return _untraced_apply(function, *arguments) if torch.compiler.is_compiling() else function.apply(*arguments)


# Private, but torch.compiler.disable would import torch._dynamo together with this package, which takes 1 to 2 seconds.
@torch._disable_dynamo  # type: ignore[attr-defined]  # not exported
def _untraced_apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    return function.apply(*arguments)


def multiprocessors(device: torch.device) -> int:
    """Returns the approximate number of programs that run at once on `device`."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
