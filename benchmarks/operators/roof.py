"""Measures what the device itself reaches in this very run: the roof that each result is a fraction of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.operators.shapes import Shape
from benchmarks.operators.timing import Runner

COPY_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
GEMM_RESULT_BYTES = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    runner: Runner
    amount: float
    """Bytes moved (read and written), or floating-point operations."""


def bandwidth(device: torch.device) -> dict[str, Roof]:
    """Measures the memory: `copy` counts bytes read and written; `read` only sums, so it writes nothing."""
    size = COPY_BYTES[device.type]
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return {
        "roof copy": Roof(runner=Runner(run=lambda: target.copy_(source)), amount=2 * size),
        "roof read": Roof(runner=Runner(run=source.sum), amount=size),
    }


def gemms(shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool) -> dict[str, Roof]:
    """Times torch.mm (cuBLAS) at the operator's own shapes: logits, and for a backward pass dH and dW.

    Rows are capped so that the logits stay under 4 GiB: the rate no longer depends on them there.
    """
    rows = min(shape.rows, GEMM_RESULT_BYTES // (shape.vocab * dtype.itemsize))
    hidden = torch.randn(rows, shape.hidden, dtype=dtype, device=device)
    weight = torch.randn(shape.vocab, shape.hidden, dtype=dtype, device=device)
    logits = torch.mm(hidden, weight.T)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
    calls = {"roof gemm logits": lambda: torch.mm(hidden, weight.T, out=logits)}
    if backward:
        # Random data of the logits' own scale: a GEMM's clock, and so its rate, depends on the values.
        d_logits = torch.randn_like(logits)
        calls["roof gemm dH"] = lambda: torch.mm(d_logits, weight, out=d_hidden)
        calls["roof gemm dW"] = lambda: torch.mm(d_logits.T, hidden, out=d_weight)
    operations = 2 * rows * shape.vocab * shape.hidden
    return {name: Roof(runner=Runner(run=call), amount=operations) for name, call in calls.items()}
