"""Measures what the device itself reaches in this very run: the roof that each result is a fraction of."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.operators.shapes import Shape
from benchmarks.operators.timing import Runner

COPY_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
GEMM_RESULT_BYTES = 4 << 30
GEMM_ROWS = 256  # a tile of cuBLAS has at most so many rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    runner: Runner
    amount: float
    """Bytes moved (read and written), or floating-point operations."""
    part: str = ""
    """The part of the work whose limit it is. Of several for one part, the quickest is the limit; one without a part is
    for information only."""


def bandwidth(device: torch.device) -> dict[str, Roof]:
    """Measures the memory: `copy` counts bytes read and written; `read` only sums, so it writes nothing.

    The limit is the copy, also for an operator that only reads and may therefore come out above it.
    """
    size = COPY_BYTES[device.type]
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return {
        "roof copy": Roof(runner=Runner(run=lambda: target.copy_(source)), amount=2 * size, part="bytes"),
        "roof read": Roof(runner=Runner(run=source.sum), amount=size),
    }


def gemm_rows(shape: Shape) -> int:
    """Returns how many of the operator's rows a GEMM of the roof has: all, or as many as 4 GiB of float32 logits hold.

    The rate no longer depends on them there. A cut count is a multiple of GEMM_ROWS, so that no tile is part empty.
    """
    most = GEMM_RESULT_BYTES // (shape.vocab * torch.float32.itemsize)
    return shape.rows if shape.rows <= most else max(GEMM_ROWS, most // GEMM_ROWS * GEMM_ROWS)


def gemms(shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool) -> dict[str, Roof]:
    """Times torch.mm (cuBLAS, MKL) at the operator's own shapes: logits, and for a backward pass dH and dW.

    On CUDA the logits' GEMM is measured with results in the operands' dtype and in float32, and the quicker counts: an
    operator that needs float32 logits is held to the same limit as one that rounds them. dH sums over the vocabulary
    and dW over the rows, each in one GEMM with results in the operands' dtype; chunks make both slower, not quicker.
    """
    rows = gemm_rows(shape)
    hidden = torch.randn(rows, shape.hidden, dtype=dtype, device=device)
    weight = torch.randn(shape.vocab, shape.hidden, dtype=dtype, device=device)
    logits = torch.mm(hidden, weight.T)
    calls: dict[str, tuple[str, Callable[[], object]]] = {
        "roof gemm logits": ("logits", lambda: torch.mm(hidden, weight.T, out=logits))
    }
    if device.type == "cuda" and dtype != torch.float32:
        wide = torch.empty(logits.shape, dtype=torch.float32, device=device)
        calls["roof gemm float32 logits"] = (
            "logits",
            lambda: torch.mm(hidden, weight.T, out_dtype=torch.float32, out=wide),
        )
    if backward:
        d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
        # Random data of the logits' own scale: a GEMM's clock, and so its rate, depends on the values.
        d_logits = torch.randn_like(logits)
        calls["roof gemm dH"] = ("dH", lambda: torch.mm(d_logits, weight, out=d_hidden))
        calls["roof gemm dW"] = ("dW", lambda: torch.mm(d_logits.T, hidden, out=d_weight))
    operations = 2 * rows * shape.vocab * shape.hidden
    return {name: Roof(runner=Runner(run=call), amount=operations, part=part) for name, (part, call) in calls.items()}


def roof_seconds(roofs: dict[str, Roof], seconds: dict[str, list[float]], work: float) -> float:
    """Returns the least time for `work`: each part has an equal share of it, at the rate of its quickest roof.

    `seconds` are those of every round by roof, of which the median counts.
    """
    rates: dict[str, float] = {}
    for name, roof in roofs.items():
        if roof.part:
            rates[roof.part] = max(rates.get(roof.part, 0.0), roof.amount / statistics.median(seconds[name]))
    return sum(work / len(rates) / rate for rate in rates.values())
